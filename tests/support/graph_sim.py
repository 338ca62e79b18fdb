"""CUDA graphs on the CPU: record a function's operators, undo them, replay them on the same memory.

Whatever Python computed while recording is frozen in the record, random numbers are drawn anew at each
replay, and an operator that would make the host wait for the device is refused: as on a GPU. What torch.cuda
does around a capture, and leaves undone when one fails, is in `cuda_graph_sim`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdynat.execution.graph_capture import CaptureFailed

UNFILLED = ("empty", "new_empty", "empty_like")
WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Tape(TorchDispatchMode):
    """A recorded call: operator, arguments, and the earlier memory that it wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.broken = False  # as a capture is after a call that is not permitted in it: it can only be ended
        self._own: dict[int, Any] = {}  # storages made while recording, held so that no address is used twice
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in WAITS):
            self.broken = True
            raise RuntimeError(f"{func} waits for the device: not permitted while capturing")
        kwargs = kwargs or {}
        written = written_tensors(func, args, kwargs)
        for value in written:
            address = value.untyped_storage().data_ptr()
            if address not in self._own and address not in self._before:
                self._before[address] = (
                    value,
                    torch.tensor([], dtype=value.dtype).set_(value.untyped_storage()).clone(),
                )
        results = func(*args, **kwargs)
        made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in given]
        self._own.update({t.untyped_storage().data_ptr(): t.untyped_storage() for t in fresh})
        if fresh or written:  # a view stays what it is
            self.calls.append((func, args, kwargs, made))
        return results

    def undo(self) -> None:
        """Put back everything that was there before the recording."""
        for value, before in self._before.values():
            torch.tensor([], dtype=value.dtype).set_(value.untyped_storage()).copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again, into the tensors of the recording."""
        for func, args, kwargs, made in self.calls:
            results = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(made, results, strict=True):
                # New memory holds nothing yet, and `set_` may have given the tensor another's since.
                if old.data_ptr() != new.data_ptr() and func._opname not in UNFILLED:
                    old.detach().copy_(new)


def written_tensors(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that `func` writes to, by its schema (batch norm's does not tell of running statistics)."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        silent = func._opname == "native_batch_norm" and argument.name.startswith("running_")
        if silent or (argument.alias_info is not None and argument.alias_info.is_write):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


class SimulatedRecorder:
    """Replaces `fastdynat.execution.CudaRecorder`. A `fault` changes each tape before it is replayed.

    Attributes:
        warmed, replayed: calls of a function and of its graphs, without those of the check
            (`fastdynat.execution.Check`).
        captured: graphs.
    """

    def __init__(self, fault: Callable[[Tape], None] | None = None) -> None:
        self.warmed = self.captured = self.replayed = 0
        self._fault = fault

    def warm(self, fn: Callable[[], Any]) -> Any:
        self.warmed += 1
        return fn()

    def capture(self, fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tape, random = Tape(), torch.get_rng_state()
        self.warmed -= 1  # the last run was the one that a replay is to be compared with
        try:
            with tape:
                outputs = fn()
        except Exception as error:
            raise CaptureFailed(str(error)) from None
        finally:
            tape.undo()
            torch.set_rng_state(random)
        if self._fault is not None:
            self._fault(tape)
        self.captured += 1
        self.replayed -= 1  # the first replay is compared with it

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return outputs, replay
