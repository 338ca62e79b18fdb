"""Count the Triton kernels that verification would compile; test_first_contact.py runs this script.

Prints a line of JSON for each case of each operator: the kernels that it launches, each by name, types,
constants and options.
"""

import json
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction
from triton_launches import Driver

import fastdynat.ops.checks  # noqa: F401
from fastdynat import verification
from fastdynat.ops import _select


class Kernel:
    """Stands for a compiled kernel."""

    def __init__(self, launch: str) -> None:
        self.launch = launch


def described(
    self: JITFunction[Any],
    key: Any,
    signature: Any,
    device: Any,
    constants: Any,
    options: Any,
    attrs: Any,
    warmup: bool,
) -> Kernel:
    """Replaces JITFunction._do_compile, which is called once per specialisation."""
    types = [kind for kind in signature.values() if kind != "constexpr"]
    kernel = Kernel(
        f"{self.__name__} on {' '.join(types)}, {constants}, {attrs}, num_warps={options.num_warps}"
    )
    self.device_caches[device][0][key] = kernel
    return kernel


def main() -> None:
    launched: list[str] = []
    specialise = JITFunction.run

    def only_specialise(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = specialise(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append(kernel.launch)
        return kernel

    JITFunction._do_compile = described
    JITFunction.run = only_specialise
    _select.why_unavailable = lambda name, device_type: None
    triton.runtime.driver.set_active(Driver(90))
    for name, check in verification.registered().items():
        for case in check.cases() if "triton" in check.candidates else ():
            launched.clear()
            check.candidates["triton"](*case.make(torch.device("cpu")))
            print(json.dumps({"operator": name, "case": case.name, "deep": case.deep, "kernels": launched}))


if __name__ == "__main__":
    main()
