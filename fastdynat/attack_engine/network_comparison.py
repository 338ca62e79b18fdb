"""Comparison of two networks on the same images, both in full float32 (no TF32)."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdynat.execution.float32 import full_float32

# Largest relative difference between two ways of computing the same thing: of the largest logit, and of the
# sum of input gradients. Rounding switches single units on or off, which moves gradients more than logits.
LOGIT_TOLERANCE, GRAD_TOLERANCE = 1e-3, 1e-2
# Float32 rounding with folded batch norms and Winograd convolutions is mostly below a tenth of
# `LOGIT_TOLERANCE`, and always below this.
FLOAT32_TOLERANCE = 1e-2
# (logits, input gradients) of networks in half precision.
HALF_TOLERANCES = {torch.float16: (2e-2, 1e-1), torch.bfloat16: (1e-1, 3e-1)}


@contextmanager
def preserve_rng(device: torch.device) -> Iterator[None]:
    """Restores the random state of torch, Python and NumPy at the end of the block.

    Everything that runs in the next such block draws the same numbers.
    """
    numpy: Any = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def reference_logits(network: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Detached logits (N, K), in full float32."""
    with full_float32(), torch.inference_mode(False), torch.no_grad(), preserve_rng(x.device):
        return network(x).detach()


def reference_logits_and_grad(network: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Detached logits, and the input gradient of a fixed combination of them; zeros if none reaches `x`."""
    with full_float32(), torch.inference_mode(False), torch.enable_grad(), preserve_rng(x.device):
        leaf = x.detach().clone().requires_grad_()
        logits = network(leaf)
        grad = None
        if logits.requires_grad:
            weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=x.device)
            grad = torch.autograd.grad(logits, leaf, weights.view(logits.shape), allow_unused=True)[0]
    return logits.detach(), torch.zeros_like(leaf).detach() if grad is None else grad


def logits_differ(expected: Tensor, actual: Tensor, tolerance: float = LOGIT_TOLERANCE) -> Tensor:
    """True if logits differ by more than rounding: a bool on their device."""
    difference, size = _difference(expected, actual)
    # A NaN in one of them alone is a difference.
    return ~(difference <= tolerance * size.amax().clamp_min(torch.finfo(torch.float32).tiny)).all()


def relative_difference(expected: Tensor, actual: Tensor, by: Callable[[Tensor], Tensor]) -> float:
    """``by(|actual - expected|) / by(|expected|)``; NaN or infinite where an element of one alone is finite.

    by: a norm of non-negative values, as `torch.max`.
    """
    difference, size = (float(by(value)) for value in _difference(expected, actual))
    return difference / size if size > 0 else difference


def disagreement(
    expected: tuple[Tensor, Tensor],
    actual: tuple[Tensor, Tensor],
    tolerances: tuple[float, float] = (LOGIT_TOLERANCE, GRAD_TOLERANCE),
) -> str:
    """The difference of two `reference_logits_and_grad`, in words; "" where rounding explains it."""
    tolerances = HALF_TOLERANCES.get(expected[0].dtype, tolerances)
    measures: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("logits", torch.max),
        ("input gradients", torch.sum),
    ]
    for i, (what, by) in enumerate(measures):
        found = relative_difference(expected[i], actual[i], by)
        if not found <= tolerances[i]:  # NaN fails too
            return f"{what} differ by {found:.1g} of theirs"
    return ""


def _difference(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """``|actual - expected|``, 0 for equal NaN or infinity; and ``|expected|``, 0 where not finite."""
    expected, actual = expected.double(), actual.double()
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    return (expected - actual).abs().masked_fill(same, 0), expected.abs().masked_fill(~expected.isfinite(), 0)
