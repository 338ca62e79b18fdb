"""Projected gradient ascent (Madry et al. 2018), the attack of training and evaluation."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdynat.attacks.goal import AttackGoal
from fastdynat.attacks.modes import attack_mode
from fastdynat.attacks.steps import NORMS, STARTS, pgd_step, start_point
from fastdynat.errors import UserError, unknown_name

# fp16 flushes gradients below 6e-8 to zero. Where images mix in batch norm they must keep their proportions, so one fixed
# factor on the summed loss is all that can be done; elsewhere each image is scaled by itself (`AttackGoal.logit_grad`).
FP16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class PGDSpec:
    """The numbers of one attack. Radii in [0, 1] pixel units.

    The last iterate is returned (no best-loss selection, no freezing of images that are already misclassified); with
    several restarts an image keeps the run that fools the network, or else the one with the highest loss.
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
        if self.eps <= 0 or (self.norm == "linf" and self.eps > 1):
            raise UserError(f"eps must be in (0, 1] pixel units, got {self.eps:g}; write 8/255")
        if self.step_size <= 0:
            raise UserError(f"step_size must be above 0 (pixel units), got {self.step_size:g}")
        if self.steps < 0:
            raise UserError(f"steps must be >= 0, got {self.steps}")
        if self.restarts < 1:
            raise UserError(f"restarts must be >= 1, got {self.restarts}")


@dataclass(frozen=True)
class Underflow:
    """What keeps image gradients from being flushed to zero in half precision. L-inf and L2 steps do not depend on it.

    Attributes:
        rescale: per image, see `AttackGoal.logit_grad`.
        loss_scale: one factor for all images.
    """

    rescale: bool = False
    loss_scale: float = 1.0

    @classmethod
    def guard(cls, bn: str, dtype: torch.dtype | None, rescale: bool | None = None) -> "Underflow":
        """What fits an attack in batch norm mode `bn` with the network in `dtype` (None: not in half precision).

        rescale: the caller's wish; None leaves it to this function. Raises UserError where it is wished but not exact.
        """
        if rescale and bn != "eval":
            raise UserError(f"rescale needs images that do not mix: attack BN mode eval, got {bn}")
        if rescale is None:
            rescale = bn == "eval" and dtype in (torch.float16, torch.bfloat16)
        return cls(rescale, FP16_LOSS_SCALE if dtype is torch.float16 and not rescale else 1.0)


@dataclass(frozen=True)
class AttackResult:
    """What an attack returns.

    Attributes:
        x_adv: (N, C, H, W), detached, in the ball and in [0, 1].
        zero_grads: scalar int64 on the device: how many of the `gradients` were zero (or NaN) in every pixel. Such an image
            is not attacked at all: saturation, underflow or masking, to be watched.
        gradients: image gradients computed, N * steps * restarts.
    """

    x_adv: Tensor
    zero_grads: Tensor
    gradients: int


def ascend(
    logits_of: Callable[[Tensor], Tensor],
    x: Tensor,
    goal: AttackGoal,
    spec: PGDSpec,
    *,
    x_start: Tensor,
    underflow: Underflow | None = None,
) -> AttackResult:
    """`spec.steps` steps of projected ascent from `x_start`. The caller owns modes, precision and grad mode."""
    underflow = underflow or Underflow()
    x_adv, zero_grads = x_start, torch.zeros((), dtype=torch.int64, device=x.device)
    for _ in range(spec.steps):
        # A fresh leaf per step, never updated in place: compiled backward passes do not notice a mutated input.
        x_adv = x_adv.detach().requires_grad_()
        logits = logits_of(x_adv)
        # The loss itself is never computed: its gradient has a closed form, and nothing else of it is needed.
        upstream = goal.logit_grad(logits, rescale=underflow.rescale, loss_scale=underflow.loss_scale)
        (grad,) = torch.autograd.grad(logits, x_adv, upstream)
        step = pgd_step(x_adv.detach(), grad, x, norm=spec.norm, step_size=spec.step_size, eps=spec.eps)
        x_adv, zero_grads = step.x_adv, zero_grads + (~step.moved).sum()
    # A step ends inside the image range; a Gaussian start that no step has touched may not.
    x_adv = x_adv.detach() if spec.steps else x_adv.detach().clamp(0, 1)
    return AttackResult(x_adv, zero_grads, x.shape[0] * spec.steps)


def run_pgd(
    logits_of: Callable[[Tensor], Tensor],
    x: Tensor,
    goal: AttackGoal,
    spec: PGDSpec,
    *,
    generator: torch.Generator | None = None,
    underflow: Underflow | None = None,
) -> AttackResult:
    """`ascend` with random start and restarts, on a network that is already in the attack's mode."""
    start = start_point(x, spec.start, norm=spec.norm, eps=spec.eps, generator=generator)
    best = ascend(logits_of, x, goal, spec, x_start=start, underflow=underflow)
    if spec.restarts == 1:
        return best

    def score(x_adv: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = logits_of(x_adv)
        return goal.reached(logits), goal.per_image(logits)

    x_adv, zero_grads, (reached, loss) = best.x_adv, best.zero_grads, score(best.x_adv)
    for _ in range(spec.restarts - 1):
        start = start_point(x, spec.start, norm=spec.norm, eps=spec.eps, generator=generator)
        run = ascend(logits_of, x, goal, spec, x_start=start, underflow=underflow)
        run_reached, run_loss = score(run.x_adv)
        better = (run_reached & ~reached) | ((run_reached == reached) & (run_loss > loss))
        x_adv = torch.where(better[:, None, None, None], run.x_adv, x_adv)
        reached, loss = reached | run_reached, torch.where(better, run_loss, loss)
        zero_grads = zero_grads + run.zero_grads
    return AttackResult(x_adv, zero_grads, best.gradients * spec.restarts)


def pgd(
    model: nn.Module,
    x: Tensor,
    goal: AttackGoal,
    spec: PGDSpec,
    *,
    bn: str = "eval",
    x_start: Tensor | None = None,
    generator: torch.Generator | None = None,
    amp_dtype: torch.dtype | None = None,
    rescale: bool | None = None,
) -> AttackResult:
    """Attack `model` at `x`, whatever state the caller is in.

    Works under ``no_grad`` and ``inference_mode``, leaves every parameter's ``.grad`` and every module's own train/eval flag
    as they were, and returns a detached tensor.

    Args:
        model: images in [0, 1] -> logits (N, K).
        x: (N, C, H, W), float32 or float64, in [0, 1].
        goal: what to maximise; its target has N rows.
        spec: norm, radius, steps, start, restarts.
        bn: batch norm during the attack: "eval", "train" or "frozen" (`set_attack_mode`).
        x_start: begin exactly here instead of drawing a start (one run, `spec.restarts` must be 1).
        generator: source of the random start; None is torch's global one.
        amp_dtype: autocast the network to this dtype; the iterate stays in `x`'s.
        rescale: bring each image's gradient to order one before it goes through the network (`AttackGoal.logit_grad`); None
            does so in half precision wherever it is exact, that is unless `bn` mixes the images.

    Raises:
        UserError: `x` is not float32 or float64, or does not match `goal`; `rescale` where images mix.
    """
    if x.dtype not in (torch.float32, torch.float64) or x.dim() != 4:
        hint = "; for a half-precision network pass amp_dtype" if x.dtype in (torch.float16, torch.bfloat16) else ""
        raise UserError(f"images must be float32 or float64 (N, C, H, W) in [0, 1], got {x.dtype} {tuple(x.shape)}{hint}")
    if goal.target.shape[0] != x.shape[0]:
        raise UserError(f"{x.shape[0]} images but {goal.target.shape[0]} labels")
    if x_start is not None and spec.restarts != 1:
        raise UserError(f"x_start fixes the start, so restarts must be 1, got {spec.restarts}")
    underflow = Underflow.guard(bn, amp_dtype, rescale)
    cast = torch.autocast(x.device.type, amp_dtype) if amp_dtype else nullcontext()
    # Copies made outside inference mode may be saved for backward; inference tensors may not.
    with torch.inference_mode(False), torch.enable_grad(), attack_mode(model, bn), cast:
        x, goal = x.detach().clone(), goal.clone()
        if x_start is not None:
            return ascend(model, x, goal, spec, x_start=x_start.detach().clone(), underflow=underflow)
        return run_pgd(model, x, goal, spec, generator=generator, underflow=underflow)
