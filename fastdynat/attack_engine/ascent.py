"""One step of projected ascent: forward, gradient at the image, projected step."""

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import AttackGoal, Kind, wide
from fastdynat.attack_engine.input_checks import check_count, check_number
from fastdynat.attack_engine.steps import NORMS, STARTS, pgd_step
from fastdynat.errors import UserError, unknown_name
from fastdynat.models.logits import NoGradient, logits_of
from fastdynat.ops import soft_margin_grad

# (x_adv, what the network reads of it, x, target) -> (x_adv, what the network reads next, how many gradients
# were zero, and for a goal that is tracked which images were still given its class)
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]
# (what the network reads, target) -> (gradient there, which images are satisfied for a goal with a
# confidence, which images are given the goal's class for one that is tracked)
Look = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]
T = TypeVar("T")
# (what the network reads, logits -> (weights of the logits (N, K), anything)) -> (that, gradient of the
# weighted sum at what was read): one forward and one backward pass. The weights are constants of the
# gradient; they may depend on the logits.
Pull = Callable[[Tensor, Callable[[Tensor], tuple[Tensor, T]]], tuple[T, Tensor]]

# fp16 flushes gradients below 6e-8 to zero. Where images mix in batch norm they must keep their proportions,
# so one fixed factor on the summed loss is all that can be done; elsewhere each image is scaled by itself
# (`AttackGoal.logit_grad`).
FP16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class PGDSpec:
    """The numbers of one attack. Sizes in [0, 1] pixel units; under L0 eps is a number of pixels, `step_size`
    an L1 length.

    The last iterate is returned (no best-loss selection, no freezing of images that are already
    misclassified); with several restarts an image keeps the run that fools the network, or else the one with
    the highest loss.
    """

    eps: float
    step_size: float
    steps: int
    norm: str = "linf"
    start: str = "uniform"
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm", self.norm, NORMS)
        if self.start not in STARTS:
            raise unknown_name("start", self.start, STARTS)
        check_number("eps", self.eps)
        check_number("step_size", self.step_size)
        if self.eps <= 0 or (self.norm == "linf" and self.eps > 1):
            raise UserError(f"eps must be in (0, 1] pixel units, got {self.eps:g}; write 8/255")
        if self.norm == "l0" and self.eps != int(self.eps):
            raise UserError(f"eps under l0 is how many pixels may change, a whole number, got {self.eps:g}")
        if self.norm == "l0" and self.start != "none":
            # Noise takes all the pixels that may change, and others are taken instead only once they have
            # come further.
            raise UserError(
                f"start must be none under l0, got {self.start}: noise would keep the attack from choosing pixels"
            )
        if not 0 < self.step_size < math.inf:
            raise UserError(f"step_size must be above 0 and finite (pixel units), got {self.step_size:g}")
        check_count("steps", self.steps, 0)
        check_count("restarts", self.restarts, 1)


@dataclass(frozen=True)
class Underflow:
    """What keeps image gradients from being flushed to zero in half precision. The steps of no norm depend on
    it.

    Attributes:
        rescale: per image, see `AttackGoal.logit_grad`.
        loss_scale: one factor for all images.
    """

    rescale: bool = False
    loss_scale: float = 1.0

    @classmethod
    def guard(cls, bn: str, dtype: torch.dtype | None, rescale: bool | None = None) -> "Underflow":
        """What fits an attack in batch norm mode `bn` with the network in `dtype` (None: not in half
        precision).

        rescale: the caller's wish; None leaves it to this function. Raises UserError where it is wished but
        not exact.
        """
        if rescale and bn != "eval":
            raise UserError(f"rescale needs images that do not mix: attack BN mode eval, got {bn}")
        if rescale is None:
            rescale = bn == "eval" and dtype in (torch.float16, torch.bfloat16)
        return cls(rescale, FP16_LOSS_SCALE if dtype is torch.float16 and not rescale else 1.0)


@dataclass(frozen=True)
class Ascent:
    """How an attack gets from one iterate to the next on `network`, whose modes are the caller's business.

    Attributes:
        network: images in [0, 1] -> logits (N, K).
        underflow: guard for half precision.
        dtype: the network is called under autocast to it and reads the iterate rounded to it; None is full
            precision. The iterate itself stays in the images' dtype: bfloat16 has a spacing of 1/256 near
            1.0, half a usual step, so steps would not add up. What the first layer sees is therefore within
            1/512 (bfloat16) or 1/4096 (float16) of the iterate.
        closed_form: take the loss's gradient at the logits from its formula instead of from autograd.
        blind: go on where no gradient reaches the images, with gradients of 0; else that is an error. For
            evaluations, which count such gradients and also have attacks that need none.
    """

    network: Callable[[Tensor], Tensor]
    underflow: Underflow = Underflow()
    dtype: torch.dtype | None = None
    closed_form: bool = True
    blind: bool = field(default=False, kw_only=True)

    @property
    def shapes(self) -> int:
        """How often a batch may halve for compiled code (`rebatch.halvings`): 0, to any size, where none
        is.
        """
        return 0

    def reads(self, x_adv: Tensor) -> Tensor:
        """What the network reads of the first iterate."""
        return x_adv if self.dtype is None else x_adv.to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of images in the attack's precision; UserError where the network returns something else
        (`logits_of`).
        """
        with self.autocast(x):
            return logits_of(self.network(x), len(x))

    def autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """The region in which the network runs, whatever region the caller is in."""
        return torch.autocast(x.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def step(self, goal: AttackGoal, spec: PGDSpec) -> Step:
        """The step towards `goal`, of which only the kind is used: its target comes with each call."""
        look = self.look(goal.kind)

        def step(
            x_adv: Tensor, read: Tensor, x: Tensor, target: Tensor
        ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            grad, satisfied, kept = look(read, target)
            new = pgd_step(
                x_adv.detach(),
                grad,
                x,
                norm=spec.norm,
                step_size=spec.step_size,
                eps=spec.eps,
                low_dtype=self.dtype,
            )
            stuck = ~new.moved if satisfied is None else ~(new.moved | satisfied)
            return new.x_adv, new.x_adv if new.low is None else new.low, stuck.sum(), kept

        return step

    def look(self, kind: Kind) -> Look:
        """The `Look` at iterates for goals of `kind`; compiled as one graph where this ascent compiles."""
        return self._look(kind, self.linearize)

    def _look(self, kind: Kind, linearize: Callable[[Tensor, AttackGoal], tuple[Tensor, Tensor]]) -> Look:
        def look(read: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
            goal = AttackGoal.of(kind, target)
            logits, grad = linearize(read, goal)
            kept = ~goal.reached(logits) if goal.track else None
            return grad, None if goal.drives else goal.satisfied(logits), kept

        return look

    def gradient(self, read: Tensor, goal: AttackGoal) -> Tensor:
        """The gradient of the goal at what the network reads, in its dtype; per image up to a positive
        factor.
        """
        return self.linearize(read, goal)[1]

    def linearize(self, read: Tensor, goal: AttackGoal) -> tuple[Tensor, Tensor]:
        """The logits at what the network reads, detached, and the `gradient`."""
        if self.closed_form:
            # The loss itself is never computed: its gradient has a closed form, and nothing else of it is
            # needed.
            return self.pull(read, lambda logits: (self.upstream(logits, goal), logits))
        leaf = read.detach().requires_grad_()
        logits = self.logits(leaf)
        return logits.detach(), self._gradient(goal.per_image(logits).sum() * self.underflow.loss_scale, leaf)

    def pull(self, read: Tensor, weigh: Callable[[Tensor], tuple[Tensor, T]]) -> tuple[T, Tensor]:
        """`Pull` on the network; `weigh` gets detached logits and gives weights in their dtype."""
        # A fresh leaf per step, never updated in place: compiled backward passes do not notice a mutated
        # input.
        leaf = read.detach().requires_grad_()
        logits = self.logits(leaf)
        weights, found = weigh(logits.detach())
        return found, self._gradient(logits, leaf, weights)

    def linear(self, read: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The logits, detached, and a map that may be called several times: weights of them (N, K) ->
        gradient of the weighted sum, one backward pass each. Never compiled.
        """
        leaf = read.detach().requires_grad_()
        logits = self.logits(leaf)
        return logits.detach(), lambda weights: self._gradient(logits, leaf, weights, retain_graph=True)

    def _gradient(
        self, value: Tensor, leaf: Tensor, weights: Tensor | None = None, *, retain_graph: bool = False
    ) -> Tensor:
        """Of `value`, weighted, at `leaf`; see `blind`."""
        grad = None
        if value.requires_grad:
            grad = torch.autograd.grad(value, leaf, weights, retain_graph=retain_graph, allow_unused=True)[0]
        if grad is None and not self.blind:
            raise NoGradient
        return torch.zeros_like(leaf) if grad is None else grad

    def upstream(self, logits: Tensor, goal: AttackGoal) -> Tensor:
        """The goal's gradient at the logits, in their dtype, guarded against underflow."""
        return goal.logit_grad(logits, rescale=self.underflow.rescale, loss_scale=self.underflow.loss_scale)

    def margin_gradient(self, read: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The soft margin of each label at what the network reads, (N,), and its gradient there; both at
        least float32.

        Unlike an attack's step, whoever wants a plane needs the gradient's length, so it is never rescaled
        per image.
        """
        return self.pull_margin(self.pull, read, labels, temperature)

    def pull_margin(
        self, pull: Pull[Tensor], read: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """`margin_gradient` by `pull`, which `one_graph` gives."""
        margin, grad = pull(read, lambda logits: self._margin(logits, labels, temperature))
        return margin, wide(grad) / self._margin_scale

    def _margin(self, logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        found = soft_margin_grad(logits, labels, temperature=temperature)
        return (found.grad * self._margin_scale).to(logits.dtype), found.margin

    @property
    def _margin_scale(self) -> float:
        return FP16_LOSS_SCALE if self.dtype is torch.float16 else 1.0

    def one_graph(
        self, kind: Hashable, make: Callable[[Pull[Any]], Callable[..., Any]], names: Sequence[str] = ()
    ) -> Callable[..., Any]:
        """What `make` makes of `pull`; compiled as one graph where this ascent compiles, once per `kind`.

        names: of the results, for whoever compares compiled ones with others; "" for a result that rounding
        decides.
        """
        return make(self.pull)
