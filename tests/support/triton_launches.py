"""Compile the operators' Triton kernels for GPUs that are absent; test_gpu_code.py runs this script.

    python triton_launches.py FOLDER

The operators run on CPU tensors with backend "triton", and each launch compiles instead: with the types, the
alignments, the constants and the options that the launcher passes. An operator's entries in LAUNCHES make
such calls. Writes the PTX of each kernel into FOLDER and prints a line of JSON for each, and one that names
the kernels which no call launched.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

import fastdynat.kernels
from fastdynat import ops
from fastdynat.ops import _select

TARGETS = (80, 90)


class Launch(NamedTuple):
    """Calls of an operator. `wide`: every kernel that they launch reads 16 bytes at a time."""

    operator: str
    wide: bool
    call: Callable[[], Any]


def images(dtype: torch.dtype = torch.float32, side: int = 32) -> torch.Tensor:
    return torch.empty(64, 3, side, side, dtype=dtype)


def sizes() -> dict[str, torch.Tensor]:
    """Step size and radius on the device, as training passes them."""
    on_device = torch.zeros(2, dtype=torch.float64)
    return {"step_size": on_device[0], "eps": on_device[1]}


def step_linf(dtype: torch.dtype, grad_dtype: torch.dtype, low_dtype: torch.dtype | None) -> None:
    x, grad, x0 = images(dtype), images(grad_dtype), images(dtype)
    ops.pgd_step_linf(x, grad, x0, step_size=0.1, eps=0.2)
    ops.attack_step_linf(x, grad, x0, step_size=0.1, eps=0.2, low_dtype=low_dtype)
    ops.attack_step_linf(x, grad, x0, **sizes(), low_dtype=low_dtype)


def step_l2(dtype: torch.dtype, grad_dtype: torch.dtype, low_dtype: torch.dtype | None) -> None:
    for side in (32, 48, 64):  # in one kernel, and in two
        x, grad, x0 = images(dtype, side), images(grad_dtype, side), images(dtype, side)
        ops.attack_step_l2(x, grad, x0, step_size=0.1, eps=0.2, low_dtype=low_dtype)
        ops.attack_step_l2(x, grad, x0, **sizes(), low_dtype=low_dtype)


def project(dtype: torch.dtype, w_dtype: torch.dtype, norm: str) -> None:
    for side in (32, 64):  # whole in registers, and not
        x, w, at = images(dtype, side), images(w_dtype, side), images(dtype, side)
        ops.project_on_hyperplane(x, w, torch.empty(64, dtype=dtype), at, norm=norm)


def start(dtype: torch.dtype, kind: str) -> None:
    for numbers in (None, torch.zeros(64).long()):
        state = torch.zeros(2).long()
        ops.random_start(images(dtype), state, kind=kind, scale=0.1, images=numbers)
        ops.random_start(images(dtype), state, kind=kind, scale=sizes()["eps"], images=numbers)


def start_channels_last(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape).to(memory_format=torch.channels_last)
    ops.random_start(x, torch.zeros(2).long(), kind="uniform", scale=0.1)


def batch(dtype: torch.dtype, channels_last: bool) -> None:
    store, indices = torch.empty(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64).long()
    ops.augment(
        store, indices, torch.zeros(2, 64).long(), indices > 0, dtype=dtype, channels_last=channels_last
    )
    ops.augment(store, indices, dtype=dtype, channels_last=channels_last)


def step_l0(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for side in (32, 64, 112):  # whole in registers, and not
        x, grad, x0 = images(dtype, side), images(grad_dtype, side), images(dtype, side)
        ops.pgd_step_l0(x, grad, x0, step_size=0.1, pixels=8)


def step_l1(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for side in (32, 48, 64):  # whole in registers, and not
        x, grad, x0 = images(dtype, side), images(grad_dtype, side), images(dtype, side)
        ops.pgd_step_l1(x, grad, x0, step_size=0.1, eps=0.2)
        ops.pgd_step_l1(x, grad, x0, **sizes())


def logit_grad(dtype: torch.dtype, classes: int, loss: str) -> None:
    logits, labels = torch.empty(64, classes, dtype=dtype), torch.zeros(64).long()
    soft = loss in ("soft", "kl")
    ops.attack_logit_grad(
        logits, logits.float() if soft else labels, loss="ce" if loss == "soft" else loss, rescale=True
    )


def soft_margin(classes: int, dtype: torch.dtype, requires_grad: bool) -> None:
    logits = torch.empty(64, classes, dtype=dtype, requires_grad=requires_grad)
    ops.soft_margin(logits, torch.empty(64, dtype=torch.int64))


def dynamic_label(dtype: torch.dtype, classes: int, soft: bool) -> None:
    logits = torch.empty(64, classes, dtype=dtype, requires_grad=True)
    labels = torch.zeros(64).long()
    for guide in (logits.detach(), labels)[: 1 if soft else 2]:
        ops.dynamic_label_cross_entropy(logits, guide, labels=labels, soft=soft, label_smoothing=0.1)


LAUNCHES = [
    *(
        Launch("soft_margin", classes % 16 == 0, lambda k=classes, t=dtype, g=grad: soft_margin(k, t, g))
        for classes in (1000, 1024, 8192)
        for dtype, grad in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False))
    ),
    *(
        Launch(
            "dynamic_label_cross_entropy",
            False,
            lambda t=dtype, k=classes, soft=soft: dynamic_label(t, k, soft),
        )
        for dtype, classes in (
            (torch.float32, 10),
            (torch.bfloat16, 1000),
            (torch.float64, 10),
            (torch.float32, 20000),
        )
        for soft in (False, True)
    ),
    *(
        Launch("random_start", True, lambda dtype=dtype, kind=kind: start(dtype, kind))
        for dtype in (torch.float32, torch.float64)
        for kind in ("uniform", "gaussian", "l2")
    ),
    Launch("random_start", False, lambda: start_channels_last((64, 3, 32, 32))),
    Launch("random_start", False, lambda: start_channels_last((64, 3, 33, 33))),
    *(
        Launch("augment", False, lambda dtype=dtype, channels_last=channels_last: batch(dtype, channels_last))
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for channels_last in (False, True)
    ),
    *(
        Launch(
            "attack_logit_grad",
            False,
            lambda dtype=dtype, classes=classes, loss=loss: logit_grad(dtype, classes, loss),
        )
        for dtype, classes in (
            (torch.float32, 10),
            (torch.bfloat16, 1000),
            (torch.float64, 10),
            (torch.float32, 5000),
        )
        for loss in ("ce", "soft", "kl", "margin", "dlr")
    ),
    Launch("pgd_step_l0", False, lambda: step_l0(torch.float32, torch.bfloat16)),
    Launch("pgd_step_l0", False, lambda: step_l0(torch.float64, torch.float32)),
    Launch("pgd_step_l1", False, lambda: step_l1(torch.float32, torch.bfloat16)),
    Launch("pgd_step_l1", False, lambda: step_l1(torch.float64, torch.float32)),
    Launch("pgd_step_l2", True, lambda: step_l2(torch.float32, torch.float32, torch.bfloat16)),
    Launch("pgd_step_l2", True, lambda: step_l2(torch.float64, torch.float16, None)),
    Launch("pgd_step_linf", True, lambda: step_linf(torch.float32, torch.float32, torch.bfloat16)),
    Launch("pgd_step_linf", True, lambda: step_linf(torch.float32, torch.bfloat16, torch.float16)),
    Launch("pgd_step_linf", True, lambda: step_linf(torch.float64, torch.float16, None)),
    Launch("project_on_hyperplane", True, lambda: project(torch.float32, torch.float32, "linf")),
    Launch("project_on_hyperplane", True, lambda: project(torch.float32, torch.bfloat16, "l2")),
    Launch("project_on_hyperplane", True, lambda: project(torch.float64, torch.float64, "l2")),
]


class Driver:
    """The part of Triton's driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def kernels() -> dict[str, str]:
    """The file of each kernel: the jitted functions named so; others are called from kernels."""
    found = {}
    for path in sorted(Path(fastdynat.kernels.__path__[0]).glob("*.py")):
        for name, value in vars(importlib.import_module(f"fastdynat.kernels.{path.stem}")).items():
            if (
                isinstance(value, JITFunction)
                and name.endswith("_kernel")
                and inspect.getsourcefile(value.fn) == str(path)
            ):
                found[name] = path.name
    return found


def described(kernel: Any) -> str:
    """Name, constants, options, types of the rest."""
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    types = [kind for name, kind in kernel.src.signature.items() if name not in constants]
    options = [f"{name}={value}" for name, value in constants.items()] + [
        f"num_warps={kernel.metadata.num_warps}"
    ]
    return f"{kernel.name}({', '.join(options)}) on {' '.join(types)}"


def main(folder: Path) -> None:
    compiled: dict[str, Any] = {}
    compile_and_launch = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(kernel.hash, kernel)
        return kernel

    JITFunction.run = compile_only
    _select.why_unavailable = lambda name, device_type: None
    missing = kernels()
    for capability in TARGETS:
        triton.runtime.driver.set_active(Driver(capability))
        for launch in LAUNCHES:
            before = set(compiled)
            with ops.use_backend("triton"):
                launch.call()
            for kernel in (compiled[key] for key in compiled.keys() - before):
                path = folder / f"{kernel.hash[:16]}_sm{capability}.ptx"
                path.write_text(kernel.asm["ptx"])
                missing.pop(kernel.name, None)
                about = {"kernel": kernel.name, "launch": described(kernel), "capability": capability}
                print(
                    json.dumps(
                        about | {"wide": launch.wide, "ptx": str(path), "ptxas": get_ptxas(capability).path}
                    )
                )
    print(json.dumps({"not launched": sorted(f"{name} ({file})" for name, file in missing.items())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
