"""Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884), around the update of any method.

Per weight tensor, ``v = gamma * ||w|| * grad / ||grad||`` with the gradient of the loss on the attacked batch
(one step). The loss is then taken at w + v, the update made there, and v taken away again, in the order of
the released code: its weight decay acts on w + v.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastdynat.errors import UserError


def check_awp(gamma: float, warmup: int) -> None:
    """Raise UserError for numbers that `WeightPerturbation` cannot work with."""
    if not 0 <= gamma < math.inf:
        raise UserError(f"awp must be >= 0 (the published sizes are 0.005 and 0.01), got {gamma:g}")
    if warmup < 0:
        raise UserError(f"awp_warmup must be a number of epochs, got {warmup}")


class WeightPerturbation:
    """Perturbs the weights of `module` with two dimensions or more: no biases, no normalisation layers.

    Args:
        module: the network being trained.
        gamma: size of the perturbation relative to each tensor's norm; 0 moves nothing.
        warmup: epochs without it at the start of a run.

    Raises:
        UserError: gamma is negative or not finite, warmup is negative, or `module` trains no such weights.
    """

    def __init__(self, module: nn.Module, gamma: float, warmup: int = 0) -> None:
        check_awp(gamma, warmup)
        self.gamma, self.warmup = gamma, warmup
        self._weights: list[Tensor] = [p for p in module.parameters() if p.dim() >= 2 and p.requires_grad]
        if not self._weights:
            raise UserError(
                f"awp {gamma:g}: it perturbs weights with two dimensions or more, and none of them is "
                "trained (--freeze); leave it out, or freeze fewer parameters"
            )

    @contextmanager
    def around(
        self,
        losses: Iterable[Tensor],
        sum_over_ranks: Callable[[Sequence[Tensor]], None] = lambda grads: None,
    ) -> Iterator[None]:
        """Context with the weights moved towards a higher sum of `losses`, at any scale of it.

        Frees the graph of each loss before it takes the next. `sum_over_ranks` replaces gradients by their
        sums over all processes.
        """
        grads: tuple[Tensor, ...] = ()
        for loss in losses:
            more = torch.autograd.grad(loss, self._weights, allow_unused=True, materialize_grads=True)
            grads = torch._foreach_add(grads, more) if grads else more
        sum_over_ranks(grads)
        moves = self._moves(grads)
        with torch.no_grad():
            torch._foreach_add_(self._weights, moves)
        yield
        # Not in a finally: after an error the run ends, and its last checkpoint is from before.
        with torch.no_grad():
            torch._foreach_sub_(self._weights, moves)

    @torch.no_grad()
    def _moves(self, grads: tuple[Tensor, ...]) -> list[Tensor]:
        sizes, norms = torch._foreach_norm(self._weights), torch._foreach_norm(grads)
        # The direction of a gradient that is zero, or overflowed in half precision, is NaN, which would stay
        # in the weights.
        ratios = [
            torch.nan_to_num(self.gamma * s / n, 0.0, 0.0, 0.0) for s, n in zip(sizes, norms, strict=True)
        ]
        return [torch.nan_to_num(r * g, 0.0, 0.0, 0.0) for r, g in zip(ratios, grads, strict=True)]
