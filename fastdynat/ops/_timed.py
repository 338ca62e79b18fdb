"""Choice of the fastest correct implementation at a size, timed on the arguments of the first call."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastdynat import verification

F = TypeVar("F", bound=Callable[..., Any])
# The attack engine decides on these against oneDNN's convolutions.
NOT_TIMED = ("image_conv_grad", "winograd_conv3x3", "winograd_weights")

_racing = False


def size_of(like: Tensor) -> str:
    """The key of a size: dtype, and the number of rows and elements up to a factor of two."""
    rows = like.shape[0] if like.dim() else 1
    return f"{str(like.dtype)[6:]} {rows.bit_length()} {like.numel().bit_length()}"


def fastest_of(
    op: str,
    implementations: Mapping[str, F],
    names: tuple[str, ...],
    like: Tensor,
    *,
    capturing: Callable[..., bool],
) -> F:
    """The fastest of `names` for tensors like `like`, or if unknown a function that times them at its call.

    Nothing is timed during CUDA graph capture, in deterministic mode, under dispatch modes or for tensor
    subclasses: there `names[0]`, the preferred one, is returned.
    """
    preferred = implementations[names[0]]
    if op in NOT_TIMED or torch.are_deterministic_algorithms_enabled():
        return preferred
    size = size_of(like)
    if (known := verification.winner(op, like.device, size)) is not None:
        return implementations[known] if known in names else preferred
    plain = type(like) in (Tensor, nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0
    if (
        _racing
        or not plain
        or like.numel() == 0
        or op not in verification.registered()
        or capturing(like.device)
    ):
        return preferred

    def find_out(*args: Any) -> Any:
        result = preferred(*args)  # raises the caller's errors as an ordinary call does
        found = _race(op, {name: implementations[name] for name in names}, like.device, size, args)
        return result if found == names[0] else implementations[found](*args)

    return cast(F, find_out)


def _race(
    op: str, implementations: Mapping[str, F], device: torch.device, size: str, args: tuple[Any, ...]
) -> str:
    global _racing
    before, _racing = _racing, True
    try:
        calls = {name: _call(run, args) for name, run in implementations.items()}
        return verification.fastest(op, device, size, calls)
    finally:
        _racing = before


def _call(run: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], object]:
    """One call, with its backward pass if the caller needs gradients."""
    given = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    leaves = (
        [a for a in given if isinstance(a, Tensor) and a.requires_grad] if torch.is_grad_enabled() else []
    )

    def call() -> None:
        outputs = run(*given)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if leaves and first.requires_grad:
            torch.autograd.grad(first.sum(), leaves, allow_unused=True)

    return call
