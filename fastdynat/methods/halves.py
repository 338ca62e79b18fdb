"""Checks of what the two halves of a method return, which read no values of tensors."""

from typing import Any

from torch import Tensor

from fastdynat.errors import UserError
from fastdynat.methods.base import Inner, Method, Outer


def check_inner(method: Method[Any], inner: object) -> None:
    """Raise UserError unless `inner` is an `Inner`."""
    if not isinstance(inner, Inner):
        raise UserError(
            f"{type(method).__name__}.inner returned {type(inner).__name__}; return Inner(goal), or "
            "Inner(None) to train on clean images"
        )


def check_outer(method: Method[Any], inner: Inner, outer: object) -> None:
    """Raise UserError unless `outer` has a scalar loss per trained network, and scalar logs."""
    name = f"{type(method).__name__}.outer"
    if not isinstance(outer, Outer):
        got = type(outer).__name__
        raise UserError(f'{name} returned {got}; return Outer({{"model": loss}})')
    given = [*inner.losses, *outer.losses]
    if sorted(given) != sorted(method.trains):
        raise UserError(
            f"{name} returned losses of {', '.join(given) or 'no network'}, but the method trains "
            f"{', '.join(method.trains)}: give each one loss, and name in `trains` the networks with a loss"
        )
    for key, loss in outer.losses.items():
        if not _is_scalar(loss) or not loss.requires_grad:
            raise UserError(
                f"{name}: the loss of {key} must be a scalar with its graph, got {_described(loss)}"
            )
    for key, value in outer.logs.items():
        if not _is_scalar(value):
            raise UserError(f"{name}: {key} in the logs must be a scalar tensor, got {_described(value)}")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return (
            f"a {type(value).__name__}: torch.tensor({value!r})"
            if isinstance(value, int | float)
            else repr(value)
        )
    return f"a tensor of shape {tuple(value.shape)}" + ("" if value.requires_grad else " without a graph")
