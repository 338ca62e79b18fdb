"""Several attempts on each image, the later ones only where the earlier ones failed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import margin, wide
from fastdynat.attack_engine.shrinking_batch import Tick, allowed_halvings, batch_sizes, no_tick, part

# (rows of the batch (n,) int64, told the share that is done) -> the attack on these images
Attempt = Callable[[Tensor, Tick], AttackResult]

# An image is given up only where it is misclassified by more than this share of the logits' range: one that
# is so by less might be classified correctly where the network rounds otherwise, as the replica that is
# attacked does, or half precision.
CLEAR = 0.01


def until_broken(
    ascent: Ascent, x: Tensor, labels: Tensor, attempts: Sequence[Attempt], *, tick: Tick = no_tick
) -> AttackResult:
    """The first attempt is on all images `x` (N, C, H, W), each further one on those that still stand.

    Where each size of a batch costs (`rebatch.halvings`), images that are given up fill the batch up; they
    keep what they have. An image keeps what the attacked network misclassifies by most, or else is nearest
    to: the largest margin over its class of `labels` (N,). Every attempt returns its last iterate; whether
    one before it was misclassified is not looked at.
    """
    rows = torch.arange(len(x), device=x.device)
    first = attempts[0](rows, part(tick, 0, len(attempts)))
    if len(attempts) == 1:
        return first
    x_adv, zero_grads, gradients = first.x_adv.clone(), first.zero_grads, first.gradients
    best = _by_how_much(ascent, x_adv, labels)
    for i, attempt in enumerate(attempts[1:], 1):
        stands = best <= CLEAR
        rows = _standing(stands, batch_sizes(len(x), allowed_halvings(ascent.max_halvings, x)))
        if len(rows) == 0:
            break
        result = attempt(rows, part(tick, i, len(attempts)))
        reached = _by_how_much(ascent, result.x_adv, labels[rows])
        better = stands[rows] & (reached > best[rows])
        x_adv[rows[better]], best[rows[better]] = result.x_adv[better], reached[better]
        zero_grads, gradients = zero_grads + result.zero_grads, gradients + result.gradients
    return AttackResult(x_adv, zero_grads, gradients)


def _standing(stands: Tensor, sizes: list[int]) -> Tensor:
    """The rows that stand, in order; with several `sizes`, filled up to the nearest of them."""
    count = int(stands.sum())
    if count == 0 or len(sizes) == 1:
        return stands.nonzero().squeeze(1)
    return (~stands).int().argsort(stable=True)[: min(size for size in sizes if size >= count)]


def _by_how_much(ascent: Ascent, x: Tensor, labels: Tensor) -> Tensor:
    """(N,): the margin as a share of the logits' range, positive where the prediction is wrong; of a NaN, no
    verdict, -inf.
    """
    with torch.no_grad():
        logits = wide(ascent.logits(x))
    range_ = (logits.amax(1) - logits.amin(1)).clamp_min(
        torch.finfo(logits.dtype).tiny
    )  # equal logits: a margin of 0
    share = margin(logits, labels) / range_
    return share.where(share.isfinite(), float("-inf"))
