"""Restarts of an attack, the later ones only on images where the earlier ones failed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import margin, wide
from fastdynat.attack_engine.shrinking_batch import Tick, allowed_halvings, batch_sizes, no_tick, part

# (rows of the batch (n,) int64, progress callback) -> the attack on these images
Attempt = Callable[[Tensor, Tick], AttackResult]

# Share of the logits' range by which an image must be misclassified before it is given up: below it, a
# network that rounds differently from the attacked replica might still classify the image correctly.
CLEAR = 0.01


def until_broken(
    ascent: Ascent, x: Tensor, labels: Tensor, attempts: Sequence[Attempt], *, tick: Tick = no_tick
) -> AttackResult:
    """Run the first attempt on all images `x` (N, C, H, W), each further one on those still robust.

    Where each new batch size costs (`allowed_halvings`), finished images fill the batch up; they keep their
    result. Each image keeps the result that the attacked network, or its strict `Ascent.judge`, misclassifies
    by most, or comes closest to misclassifying: the largest margin over its class of `labels` (N,). Every
    attempt returns its last iterate; earlier iterates are not checked.
    """
    rows = torch.arange(len(x), device=x.device)
    first = attempts[0](rows, part(tick, 0, len(attempts)))
    if len(attempts) == 1:
        return first
    x_adv, zero_grads, gradients = first.x_adv.clone(), first.zero_grads, first.gradients
    best = _relative_margin(ascent, x_adv, labels)
    for i, attempt in enumerate(attempts[1:], 1):
        stands = best <= CLEAR
        rows = _standing(stands, batch_sizes(len(x), allowed_halvings(ascent.max_halvings, x)))
        if len(rows) == 0:
            break
        result = attempt(rows, part(tick, i, len(attempts)))
        reached = _relative_margin(ascent, result.x_adv, labels[rows])
        better = stands[rows] & (reached > best[rows])
        x_adv[rows[better]], best[rows[better]] = result.x_adv[better], reached[better]
        zero_grads, gradients = zero_grads + result.zero_grads, gradients + result.gradients
    return AttackResult(x_adv, zero_grads, gradients)


def _standing(stands: Tensor, sizes: list[int]) -> Tensor:
    """The robust rows, in order; with several `sizes`, filled up to the next of them."""
    count = int(stands.sum())
    if count == 0 or len(sizes) == 1:
        return stands.nonzero().squeeze(1)
    return (~stands).int().argsort(stable=True)[: min(size for size in sizes if size >= count)]


def _relative_margin(ascent: Ascent, x: Tensor, labels: Tensor) -> Tensor:
    """(N,) margin as a share of the logits' range, positive where the prediction is wrong; -inf for NaN.

    That of the judging network where the ascent is `strict`: half precision may err by more than `CLEAR`.
    """
    with torch.no_grad():
        judge = ascent.judge if ascent.strict else None
        logits = wide(ascent.logits(ascent.to_model_input(x)) if judge is None else judge(x))
    # Equal logits have a margin of 0.
    range_ = (logits.amax(1) - logits.amin(1)).clamp_min(torch.finfo(logits.dtype).tiny)
    share = margin(logits, labels) / range_
    return share.where(share.isfinite(), float("-inf"))
