"""The soft logit margin: how far a label's logit is above a smooth maximum of the others, and its gradient,
from one pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._rows import (
    bad_classes,
    check_class_indices,
    check_logits,
    save_grad,
    scale_grad,
    wide_dtype,
)
from fastdynat.ops._select import select

OP = "soft_margin"
TEMPERATURES = (1e-30, 1e30)  # far inside float32, so that neither T nor 1/T is 0 or infinite there


class MarginGrad(NamedTuple):
    """The soft margin and its gradient.

    Attributes:
        margin: (N,), float64 for float64 logits, else float32.
        grad: (N, K) in the margin's dtype, gradient of the sum of margins with respect to the logits.
    """

    margin: Tensor
    grad: Tensor


def _eager(logits: Tensor, labels: Tensor, temperature: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """The reference: differentiable by autograd, and with its gradient in closed form if `with_grad`."""
    z = logits.to(wide_dtype(logits))
    label = labels.clamp(0, logits.shape[1] - 1)[:, None]
    own = z.gather(1, label)[:, 0]
    others = z.scatter(1, label, float("-inf"))
    top = others.detach().amax(1)  # constant for autograd: it cancels in the margin
    log_sum = ((others - top[:, None]) * temperature).logsumexp(1)
    # A factor that turns the margin and the whole gradient of an invalid row into NaN.
    valid = (
        torch.ones_like(top).masked_fill(~(own < float("inf")) | ~log_sum.isfinite(), float("nan")).detach()
    )
    valid = valid + bad_classes(OP, "labels", logits, labels)
    margin = ((own - top) - log_sum / temperature) * valid
    if not with_grad:
        return margin, margin.new_empty(0)
    p = ((others - top[:, None]) * temperature).softmax(1)
    return margin, -p.scatter(1, label, -1.0) * valid[:, None]


def _reference(logits: Tensor, labels: Tensor, temperature: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    return _eager(logits, labels, temperature, with_grad and not logits.requires_grad)


def _fake(logits: Tensor, with_grad: bool, **_: Any) -> tuple[Tensor, Tensor]:
    n, k = logits.shape
    wide = wide_dtype(logits)
    return logits.new_empty(n, dtype=wide), logits.new_empty((n, k) if with_grad else (0,), dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_grad(ctx, output[1], (), inputs[0].dtype, OP)


def _backward(ctx: Any, grad_margin: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return scale_grad(ctx, grad_margin), *(None,) * 3


IMPLEMENTATIONS = register_operator(
    OP,
    eager=_eager,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    reference=_reference,
)


def soft_margin(logits: Tensor, labels: Tensor, *, temperature: float = 5.0, backend: str = "auto") -> Tensor:
    """The soft margin of each row z of the logits, with y its label: z_y - (1/T) log sum_{k != y} exp(T z_k).

    It lies at most log(K - 1) / T below the margin z_y - max_{k != y} z_k; a larger T is closer to the
    margin. It is positive only if y is the prediction. The gradient with respect to z, 1 at y and minus the
    softmax of T z over the other classes, comes from the same pass. Source: DyART (arXiv 2302.03015), where
    its zeros are the decision boundary.

    It does not overflow if the differences of logits are finite: gaps of 1e4 are as exact as the logits'
    dtype. A class with logit -inf adds nothing; at the label it makes the margin -inf and leaves the gradient
    as it is. A row that holds NaN or +inf, or -inf in all classes but the label, has a NaN margin and
    gradient; other rows are not affected. Second derivatives and torch.func need backend "eager".

    Args:
        logits: (N, K) with K >= 2, float32, float64, bfloat16 or float16. Computed in float32 at least.
        labels: (N,) int64 classes. Backends "cpp" and on the CPU "eager" raise for one outside [0, K);
            others, which would have to wait for the device, and compiled code return NaN.
        temperature: T, in units of 1 / logit; from 1e-30 to 1e30.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Returns:
        (N,), in units of the logits; float32, float64 for float64 logits.

    Raises:
        ValueError: shapes, dtypes, devices or the temperature do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here, or a label is out of range (see `labels`).
    """
    margin, _ = _run(logits, labels, temperature, torch.is_grad_enabled() and logits.requires_grad, backend)
    return margin


def soft_margin_grad(
    logits: Tensor, labels: Tensor, *, temperature: float = 5.0, backend: str = "auto"
) -> MarginGrad:
    """`soft_margin` and its gradient with respect to the logits, both detached, for vector-Jacobian products.

    Arguments and errors as `soft_margin`.
    """
    return MarginGrad(*_run(logits.detach(), labels, temperature, True, backend))


def _run(
    logits: Tensor, labels: Tensor, temperature: float, with_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    check_logits(OP, "logits", logits, 2)
    check_class_indices(OP, "labels", labels, logits)
    if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
        raise ValueError(
            f"{OP}: temperature must be positive, from 1e-30 to 1e30, got {temperature}; DyART takes 5"
        )
    run = select(OP, IMPLEMENTATIONS, backend, logits)
    margin, grad = run(logits, labels, float(temperature), with_grad)
    return margin, grad
