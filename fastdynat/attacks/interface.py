"""The interface of every attack: what it is called with and what it returns."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.shrinking_batch import Tick, no_tick


@dataclass(frozen=True, kw_only=True)
class Nearest(AttackResult):
    """Result of a minimum-norm attack: `x_adv` is the nearest adversarial image found, anywhere in [0, 1].

    Attributes:
        found: (N,) bool: the attacked network misclassifies `x_adv`; where False, `x_adv` is the image
            itself. A clean image that is misclassified counts as found at distance 0.
        distance: (N,) distance of `x_adv` from the image in the attack's norm (L0: number of pixels of which
            any channel changed); infinite where nothing was found.
        eps: radius of the ball in which robustness is judged: an image is robust if nothing was found in it.
    """

    found: Tensor
    distance: Tensor
    eps: float = float("inf")

    @property
    def outside(self) -> Tensor:
        """(N,) bool: the adversarial image lies outside the ball."""
        return self.distance > self.eps


class Attack(Protocol):
    """An attack with its parameters: a frozen dataclass of plain values that fix its result."""

    @property
    def norm(self) -> str:
        """The norm of its ball, or of the distance that it minimises: linf, l2, l1 or l0."""

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        tick: Tick = no_tick,
    ) -> AttackResult:
        """Attack the images `x` (N, C, H, W), float32 in [0, 1], of classes `labels` (N,).

        The network is in eval mode and its parameters need no gradient; grad mode is on. Images that are
        already misclassified need not be attacked. Equal generators give equal results. `tick` is called at
        least every few seconds.

        The attacks of this package also take `ImageDraws`, and what they do to an image then does not depend
        on the others. Attacks of other packages are given a generator (`NamedAttack.run`), seeded from the
        draws and the first image of the batch: what they do depends on the batch.
        """
