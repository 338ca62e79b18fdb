"""What every attack of an evaluation has in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.shrinking_batch import Tick, no_tick


@dataclass(frozen=True, kw_only=True)
class Nearest(AttackResult):
    """What an attack returns that looks for the nearest adversarial image: `x_adv`, anywhere in [0, 1].

    Attributes:
        found: (N,) bool: the attacked network misclassifies `x_adv`; where False, `x_adv` is the image
            itself. An image that is misclassified as it is counts as found at distance 0.
        distance: (N,) distance of `x_adv` from the image in the attack's norm (L0: pixels of which any
            channel changed); infinite where not found.
        eps: radius of the ball that a verdict is about: an image is robust if nothing was found in it.
    """

    found: Tensor
    distance: Tensor
    eps: float = float("inf")

    @property
    def outside(self) -> Tensor:
        """(N,) bool: what was found is not in the ball."""
        return self.distance > self.eps


class Search(Protocol):
    """An attack with its numbers: a frozen dataclass of plain values, which with the seed decide its
    result.
    """

    @property
    def norm(self) -> str:
        """The norm in which it stays in a ball or looks for the nearest: linf, l2, l1 or l0."""

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
        misclassified as they are need not be attacked. Equal generators give equal results. `tick` is called
        at least every few seconds.
        """


@dataclass(frozen=True, kw_only=True)
class Radii:
    """What names of attacks leave open. Sizes in [0, 1] pixel units.

    Attributes:
        eps: radius of the ball.
        step_size: of attacks with a fixed one.
        norm: linf, l2, l1 or l0.
    """

    eps: float
    step_size: float
    norm: str = "linf"


# A name and the radii -> the attack of this name; None where the name is another parser's. UserError: mine,
# but wrong.
Parser = Callable[[str, Radii], Search | None]
