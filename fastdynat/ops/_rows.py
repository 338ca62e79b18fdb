"""Shared parts of the operators on logits: argument checks, and the backward pass from a stored gradient."""

from typing import Any

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def wide_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the computation: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_logits(op: str, name: str, logits: Tensor, classes: int) -> None:
    """Raise ValueError unless `logits` are (N, K) of a floating dtype with K >= `classes`."""
    if logits.dim() != 2 or logits.shape[1] < classes:
        raise ValueError(f"{op}: {name} must be (N, K) with K >= {classes}, got shape {tuple(logits.shape)}")
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {logits.dtype}")


def check_per_row(op: str, name: str, values: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless `values` is (N,) for (N, K) `logits`, on their device."""
    if values.shape != logits.shape[:1]:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(logits.shape[:1])}, one per row, got {tuple(values.shape)}"
        )
    check_same_device(op, name, values, logits)


def check_same_device(op: str, name: str, values: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless `values` is on the device of `logits`."""
    if values.device != logits.device:
        raise ValueError(f"{op}: {name} is on {values.device} but the logits are on {logits.device}")


def check_class_indices(op: str, name: str, classes: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless `classes` is (N,) int64; its values are not read."""
    check_per_row(op, name, classes, logits)
    if classes.dtype != torch.int64:
        raise ValueError(f"{op}: {name} must be int64 class indices, got {classes.dtype}")


def save_grad(ctx: Any, grad: Tensor, others: tuple[Tensor, ...], dtype: torch.dtype, op: str) -> None:
    """Save output `grad` of an operator for `scale_grad`; `others` are its outputs without a gradient."""
    ctx.save_for_backward(grad)
    ctx.mark_non_differentiable(grad, *others)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.op = dtype, op


def scale_grad(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
    """The gradient saved by `save_grad` times `grad_output`, scalar or (N,), rounded to the logits' dtype."""
    if grad_output is None:
        return None
    if torch.is_grad_enabled():
        # The stored gradient is a constant to autograd: a second derivative would lack its main part.
        raise RuntimeError(f'{ctx.op}: no second derivative (create_graph=True); backend="eager" has one')
    (grad,) = ctx.saved_tensors
    if grad.dim() != 2:
        raise RuntimeError(f"{ctx.op}: called without with_grad: there is no gradient to return")
    if grad.dtype == ctx.dtype and _is_one(grad_output):
        return grad  # autograd copies it before it adds to it, because it is saved
    return (grad * (grad_output if grad_output.dim() == 0 else grad_output[:, None])).to(ctx.dtype)


def _is_one(value: Tensor) -> bool:
    """True for a scalar 1 that can be read at once, as ``loss.backward()`` sends it: not on a GPU, nor
    under vmap or in a trace, whose tensors have no value."""
    if type(value) is not Tensor or value.dim() != 0 or value.device.type != "cpu":
        return False
    try:
        # Read by NumPy: an operator that reads a value would be a wait for the device.
        return not torch.compiler.is_compiling() and float(value.numpy()) == 1.0
    except (RuntimeError, TypeError):
        return False


def _false_indices(values: Tensor) -> list[int]:
    """Where the bool `values` (N,) are False; empty for values that cannot be read at once (`_is_one`)."""
    if type(values) is not Tensor or values.device.type != "cpu" or torch.compiler.is_compiling():
        return []
    try:
        found: list[int] = (~values.numpy()).nonzero()[0].tolist()
    except (RuntimeError, TypeError):
        return []
    return found


def bad_classes(op: str, name: str, logits: Tensor, classes: Tensor) -> Tensor:
    """(N,) zeros, NaN for a class outside [0, K); for eager forms.

    On the CPU it raises RuntimeError instead, as the C++ kernels do, naming the first such class: which of
    the two forms runs there is a matter of timing. Raising would wait for a GPU, and a trace has no values.
    """
    known = (classes >= 0) & (classes < logits.shape[1])
    for i in _false_indices(known):
        raise RuntimeError(
            f"{op}: {name}[{i}] is {int(classes.numpy()[i])}, expected a class in [0, {logits.shape[1]})"
        )
    return torch.zeros_like(classes, dtype=wide_dtype(logits)).masked_fill(~known, float("nan"))
