"""The network as one file that runs without this library: a torch.export program (.pt2) or ONNX (.onnx)."""

import importlib.util
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.commands.export.export_check import largest_difference
from fastdynat.errors import UserError, first_line

Shape = tuple[int, int, int]


def write_torch(model: nn.Module, shape: Shape, path: Path) -> float:
    """Write `model` (images in [0, 1] -> logits) as a torch.export program with a dynamic batch size.

    Returns the largest difference of the logits after reading it again. Raises: UserError where there is no
    such program.
    """

    def write() -> Callable[[Tensor], Tensor]:
        args, dynamic_shapes = _example(shape)
        program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes)
        content = BytesIO()  # torch's writer aborts the process where a disk is full
        torch.export.save(program, content)
        path.write_bytes(content.getvalue())
        return torch.export.load(path).module()

    return largest_difference(model, _quietly(write), shape)


def write_onnx(model: nn.Module, shape: Shape, path: Path) -> float:
    """Write `model` in ONNX: input `x`, output `logits`. Verified with onnxruntime on the CPU."""

    def write() -> Callable[[Tensor], Tensor]:
        args, dynamic_shapes = _example(shape)
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["logits"]}
        program = torch.onnx.export(
            model, args, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes, **names
        )
        assert program is not None  # only the old exporter returns nothing
        program.save(path)
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(["logits"], {"x": x.numpy()})[0])

    return largest_difference(model, _quietly(write), shape)


def _example(shape: Shape) -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    """Arguments to trace with, and which of their dimensions are free: the batch's."""
    return (torch.rand(2, *shape),), ({0: torch.export.Dim("batch", min=1)},)


def _quietly(write: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """The result of `write`, without the exporters' deprecation warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return write()
    except OSError:
        raise
    # Tracing fails in as many ways as networks can be written.
    except Exception as error:
        raise UserError(
            f"this network cannot be exported in this format ({type(error).__name__}: {first_line(error)})"
        ) from error


def check_onnx() -> None:
    """Raise UserError unless everything that `write_onnx` uses is installed."""
    missing = [
        name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'fastdynat[export]'")
