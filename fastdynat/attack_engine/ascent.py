"""Gradients of the attacked network at its input, as every attack takes them."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import AttackGoal, GoalKind, margin, wide
from fastdynat.errors import UserError
from fastdynat.models.logits import NoGradient, logits_of, predicted_classes
from fastdynat.ops import soft_margin_grad

T = TypeVar("T")
# Difference of two logits, as a share of the range of all, up to which a replica may order them otherwise
# than the network: rounding moves them by less than a tenth of it.
TIE = 1e-3
# Logits (N, K) -> (gradient of a loss at these logits, any value of the loss to return beside it). The
# gradient is a constant of the backward pass; it may depend on the logits.
LogitGrad = Callable[[Tensor], tuple[Tensor, T]]

# fp16 flushes gradients below 6e-8 to zero. Where images mix in batch norm, their gradients must keep their
# proportions, so the summed loss gets one fixed factor; elsewhere each image is scaled by itself
# (`AttackGoal.logit_grad`).
FP16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Underflow:
    """Scaling that keeps input gradients from underflow in half precision. Attack steps ignore the scale.

    Attributes:
        rescale: scale the gradient of each image separately (`AttackGoal.logit_grad`).
        loss_scale: one factor for all images.
    """

    rescale: bool = False
    loss_scale: float = 1.0

    @classmethod
    def guard(cls, bn: str, dtype: torch.dtype | None, rescale: bool | None = None) -> "Underflow":
        """The scaling for an attack in batch norm mode `bn` on a network in `dtype`.

        Args:
            dtype: half-precision type of the network; None is full precision.
            rescale: scale each image separately; None does so in half precision wherever it is exact.

        Raises:
            UserError: `rescale` is True where images mix in batch norm.
        """
        if rescale and bn != "eval":
            raise UserError(f"rescale needs images that do not mix: attack BN mode eval, got {bn}")
        if rescale is None:
            rescale = bn == "eval" and dtype in (torch.float16, torch.bfloat16)
        return cls(rescale, FP16_LOSS_SCALE if dtype is torch.float16 and not rescale else 1.0)

    def scaled(self, grad: Tensor, logits: Tensor) -> Tensor:
        """`grad` (N, K), a gradient at `logits` that is not an `AttackGoal`'s, scaled, in their dtype."""
        if self.rescale:
            grad = grad / grad.abs().amax(1, keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny)
        return (grad * self.loss_scale).to(logits.dtype)


class GoalGradient(NamedTuple):
    """The gradient of an attack goal at one iterate.

    Attributes:
        gradient: (N, C, H, W) in the dtype of the model input; right up to one positive factor per image.
        satisfied: (N,) bool, `AttackGoal.satisfied`; None where no image ever is.
        kept: (N,) bool, the network still predicts the goal's class; None unless `AttackGoal.track`.
    """

    gradient: Tensor
    satisfied: Tensor | None
    kept: Tensor | None


@dataclass(frozen=True)
class Ascent:
    """Logits and input gradients of `network`; the caller sets its train/eval modes.

    Attributes:
        network: images in [0, 1] -> logits (N, K).
        underflow: gradient scaling for half precision.
        dtype: half-precision type of the network, which runs under autocast to it and gets the iterate
            rounded to it; None is full precision. The iterate itself stays in the dtype of the images:
            bfloat16 has a spacing of 1/256 near 1.0, half a usual step, so steps would not add up. The model
            input is therefore within 1/512 (bfloat16) or 1/4096 (float16) of the iterate.
        closed_form: compute the loss gradient at the logits from its formula instead of by autograd.
        allow_no_gradient: return zeros where no gradient reaches the images; otherwise raise `NoGradient`.
            For evaluations, which count zero gradients and also run attacks without gradients.
        judge: the network itself, images -> logits, where `network` is a replica that rounds differently: it
            decides where the replica's logits nearly tie (`settle_ties`).
        strict: the replica may err by more than a tie, as one in half precision does: `judge` decides about
            every image that it misclassifies; on a GPU, about every image.
        final: an image that is misclassified stays so. False where another network judges the images, as for
            a transfer attack: an attack may then not stop at the first misclassified point.
    """

    network: Callable[[Tensor], Tensor]
    underflow: Underflow = Underflow()
    dtype: torch.dtype | None = None
    closed_form: bool = True
    allow_no_gradient: bool = field(default=False, kw_only=True)
    judge: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)
    strict: bool = field(default=False, kw_only=True)
    final: bool = field(default=True, kw_only=True)

    @property
    def max_halvings(self) -> int:
        """Largest number of halvings of a shrinking batch for compiled code; 0 allows any size."""
        return 0

    def to_model_input(self, x: Tensor) -> Tensor:
        """`x` rounded to the dtype of the network's input."""
        return x if self.dtype is None else x.to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, K) under the attack's autocast.

        Raises:
            UserError: the network returns no logits (`logits_of`).
        """
        with self.autocast(x):
            return logits_of(self.network(x), len(x))

    def settle_ties(self, x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """(N,) bool: which images `x` of classes `labels` are misclassified, of their replica's `logits`.

        NaN and +inf are never right. Where the label's logit and the largest other one are nearly equal,
        `judge` decides; if `strict`, also where the replica errs. On a GPU, where counting these images would
        wait for the device, the replica decides, or if `strict`, the judge of every image.
        """
        wrong = predicted_classes(logits) != labels
        if self.judge is None or (x.is_cuda and not self.strict):
            return wrong
        if x.is_cuda:
            with torch.no_grad():
                return predicted_classes(self.judge(x)) != labels
        asked = nearly_ties(logits, labels)
        rows = (asked | wrong if self.strict else asked).nonzero().squeeze(1)
        if len(rows):
            with torch.no_grad():
                wrong[rows] = predicted_classes(self.judge(x[rows])) != labels[rows]
        return wrong

    def autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """The autocast region of the network, independent of the caller's.

        Without torch's cache of cast weights, which nested regions share whatever their dtypes. A replica's
        weights need no gradient, so they are never in it.
        """
        dtype, enabled = self.dtype or torch.bfloat16, self.dtype is not None
        return torch.autocast(x.device.type, dtype, enabled=enabled, cache_enabled=False)

    def goal_gradient(self, kind: GoalKind) -> Callable[[Tensor, Tensor], GoalGradient]:
        """A function (model input, target) -> `GoalGradient` for goals of `kind`, compiled where possible."""
        return partial(goal_gradient, self, kind=kind)

    def compiled(
        self, fn: Callable[..., Any], *, key: Hashable, names: Sequence[str] = ()
    ) -> Callable[..., Any]:
        """`fn` with an ascent as its first argument; `CompiledAscent` compiles it, once per `key`.

        Args:
            fn: ``fn(ascent, *args)``; all its gradients must come from that `ascent`.
            key: equal for functions that compute the same.
            names: of the results, for the comparison of compiled with eager code; "" for a result that
                rounding decides.
        """
        return partial(fn, self)

    def gradient(self, model_input: Tensor, goal: AttackGoal) -> Tensor:
        """The gradient of `goal` at `model_input`, in its dtype, up to one positive factor per image."""
        return self.logits_and_grad(model_input, goal)[1]

    def logits_and_grad(self, model_input: Tensor, goal: AttackGoal) -> tuple[Tensor, Tensor]:
        """Detached logits (N, K), and the `gradient` of `goal`."""
        if self.closed_form:  # the value of the loss is never needed
            return self.value_and_grad(model_input, lambda logits: (self.logit_grad(logits, goal), logits))
        return self._logits_and_autograd(model_input, goal)

    def _logits_and_autograd(self, model_input: Tensor, goal: AttackGoal) -> tuple[Tensor, Tensor]:
        leaf = model_input.detach().requires_grad_()
        logits = self.logits(leaf)
        loss = goal.per_image(logits).sum() * self.underflow.loss_scale
        return logits.detach(), self._input_grad(loss, leaf)

    def value_and_grad(self, model_input: Tensor, logit_grad: LogitGrad[T]) -> tuple[T, Tensor]:
        """The value that `logit_grad` returns, and the gradient at `model_input`: one forward, one backward.

        Args:
            logit_grad: detached logits -> (loss gradient at the logits, in their dtype, value).
        """
        # A new leaf per step, never updated in place: compiled backward passes do not notice a mutated input.
        leaf = model_input.detach().requires_grad_()
        logits = self.logits(leaf)
        grad, value = logit_grad(logits.detach())
        return value, self._input_grad(logits, leaf, grad)

    def vjp(self, model_input: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Detached logits, and a function (N, K) -> vector-Jacobian product, one backward pass per call.

        As `torch.func.vjp`, but never compiled.
        """
        leaf = model_input.detach().requires_grad_()
        logits = self.logits(leaf)
        return logits.detach(), lambda cotangent: self._input_grad(logits, leaf, cotangent, retain_graph=True)

    def logit_grad(self, logits: Tensor, goal: AttackGoal) -> Tensor:
        """The gradient of `goal` at the logits, in their dtype, with the scaling of `underflow`."""
        return goal.logit_grad(logits, rescale=self.underflow.rescale, loss_scale=self.underflow.loss_scale)

    def margin_and_grad(
        self, model_input: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Soft margin of each label (N,) and its gradient at `model_input`; both at least float32.

        The gradient has its true length, which a hyperplane needs: it is never rescaled per image.
        """
        scale = FP16_LOSS_SCALE if self.dtype is torch.float16 else 1.0

        def logit_grad(logits: Tensor) -> tuple[Tensor, Tensor]:
            found = soft_margin_grad(logits, labels, temperature=temperature)
            return (found.grad * scale).to(logits.dtype), found.margin

        margin, grad = self.value_and_grad(model_input, logit_grad)
        return margin, wide(grad) / scale

    def _input_grad(
        self, value: Tensor, leaf: Tensor, cotangent: Tensor | None = None, *, retain_graph: bool = False
    ) -> Tensor:
        grad = None
        if value.requires_grad:
            # Else parts of a backward pass computed in the precision of the caller's region.
            with torch.autocast(leaf.device.type, enabled=False):
                found = torch.autograd.grad(
                    value, leaf, cotangent, retain_graph=retain_graph, allow_unused=True
                )
            grad = found[0]
        if grad is None and not self.allow_no_gradient:
            raise NoGradient
        return torch.zeros_like(leaf) if grad is None else grad


def nearly_ties(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: the label's logit is within `TIE` of the largest other one; NaN counts as near."""
    logits = wide(logits)
    return ~(margin(logits, labels).abs() > TIE * (logits.amax(1) - logits.amin(1)))


def goal_gradient(ascent: Ascent, model_input: Tensor, target: Tensor, *, kind: GoalKind) -> GoalGradient:
    """The gradient at `model_input` of the goal of `kind` with `target`."""
    goal = AttackGoal.from_kind(kind, target)
    logits, gradient = ascent.logits_and_grad(model_input, goal)
    kept = ~goal.reached(logits) if goal.track else None
    return GoalGradient(gradient, None if goal.open_ended else goal.satisfied(logits), kept)
