"""Outputs of two networks on the same images and how far they differ, both in full float32 (no TF32)."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdynat.execution.float32 import full_float32

# Largest difference of logits, and of the sum of input gradients, as a share of their largest value and their
# sum, between two ways of computing the same thing. Single units that rounding switches on or off move
# gradients more than logits.
LOGITS, GRADIENTS = 1e-3, 1e-2
# Rounding in float32 with folded batch norms and Winograd convolutions is mostly below a tenth of `LOGITS`,
# always below this.
ROUNDING = 1e-2
HALF = {torch.float16: (2e-2, 1e-1), torch.bfloat16: (1e-1, 3e-1)}


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Leaves the random streams of torch, Python and NumPy as they were: what runs in the next such block
    draws the same.
    """
    numpy: Any = sys.modules.get("numpy")
    kept, others = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(kept)
            if numpy is not None:
                numpy.random.set_state(others)


def answer(network: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Detached logits, (N, K)."""
    with full_float32(), torch.inference_mode(False), torch.no_grad(), same_draws(x.device):
        return network(x).detach()


def answer_and_gradient(network: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Detached logits, and the input gradient of a combination of them; of zeros where none reaches the
    input.
    """
    with full_float32(), torch.inference_mode(False), torch.enable_grad(), same_draws(x.device):
        leaf = x.detach().clone().requires_grad_()
        logits = network(leaf)
        grad = None
        if logits.requires_grad:
            upstream = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=x.device).view(
                logits.shape
            )
            grad = torch.autograd.grad(logits, leaf, upstream, allow_unused=True)[0]
    return logits.detach(), torch.zeros_like(leaf).detach() if grad is None else grad


def differs(want: Tensor, got: Tensor, most: float = LOGITS) -> Tensor:
    """Whether logits differ by more than rounding: a bool on their device."""
    difference, size = _difference(want, got)
    # NaN, where one alone is finite, is no agreement.
    return ~(difference <= most * size.amax().clamp_min(torch.finfo(torch.float32).tiny)).all()


def share(want: Tensor, got: Tensor, by: Callable[[Tensor], Tensor]) -> float:
    """How large ``got - want`` is, as a share of `want`, both measured by `by`; NaN or infinite where one
    alone is finite.
    """
    difference, size = (float(by(value)) for value in _difference(want, got))
    return difference / size if size > 0 else difference


def disagreement(
    want: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor], most: tuple[float, float] = (LOGITS, GRADIENTS)
) -> str:
    """In words, by how much two `answer_and_gradient` differ; "" where rounding explains it."""
    most = HALF.get(want[0].dtype, most)
    measures: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("logits", torch.max),
        ("input gradients", torch.sum),
    ]
    for i, (what, by) in enumerate(measures):
        found = share(want[i], got[i], by)
        if not found <= most[i]:  # NaN fails too
            return f"{what} differ by {found:.1g} of theirs"
    return ""


def _difference(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Of each element; 0 where both are the same, NaN and infinity included. And the sizes, 0 where not
    finite.
    """
    want, got = want.double(), got.double()
    same = (want == got) | (want.isnan() & got.isnan())
    return (want - got).abs().masked_fill(same, 0), want.abs().masked_fill(~want.isfinite(), 0)
