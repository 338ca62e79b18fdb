"""Projected gradient descent on an attack goal (PGD, Madry et al. 2018, arXiv 1706.06083), or APGD."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.adaptive_pgd import adaptive_ascend
from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.input_checks import (
    DeferredCheck,
    InputCheck,
    as_labels,
    check_label_rows,
    check_model,
)
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.pgd_spec import PGDSpec, sizes_of
from fastdynat.attack_engine.shrinking_batch import Tick, no_tick
from fastdynat.attack_engine.steps import pgd_step, start_point
from fastdynat.attack_engine.target_classes import target_classes
from fastdynat.attack_engine.zero_gradients import zero_gradient_message, zero_gradient_remedy
from fastdynat.errors import UserError
from fastdynat.models.logits import Output, half_of, logits_of, with_output
from fastdynat.ops.image_draws import Randomness

_check_images, _check_labels = InputCheck(), InputCheck()


def _warn_zero_gradients(numbers: list[int], gradients: int, remedy: str, which: str) -> None:
    if numbers[0]:
        warnings.warn(zero_gradient_message(numbers[0], gradients, remedy, which), stacklevel=4)


_warn_later = DeferredCheck(_warn_zero_gradients)


def ascend(
    ascent: Ascent,
    x: Tensor,
    goal: AttackGoal,
    spec: PGDSpec,
    *,
    x_start: Tensor,
    sizes: Tensor | None = None,
    tick: Tick = no_tick,
) -> AttackResult:
    """`spec.steps` projected steps from `x_start`. The caller sets train/eval and grad modes.

    sizes: as in `run_pgd`.
    """
    eps, step_size = sizes_of(spec, sizes)
    goal_gradient = ascent.goal_gradient(goal.kind)
    x_adv, model_input = x_start, ascent.to_model_input(x_start)
    zero_grads = torch.zeros((), dtype=torch.int64, device=x.device)
    kept = torch.zeros(len(x), dtype=torch.int64, device=x.device) if goal.track else None
    for i in range(spec.steps):
        tick(i / spec.steps)
        found = goal_gradient(model_input, goal.target)
        new = pgd_step(
            x_adv.detach(),
            found.gradient,
            x,
            norm=spec.norm,
            step_size=step_size,
            eps=eps,
            low_dtype=ascent.dtype,
        )
        x_adv = new.x_adv
        model_input = new.x_adv if new.low is None else new.low
        done = new.moved if found.satisfied is None else new.moved | found.satisfied
        zero_grads = zero_grads + (~done).sum()
        kept = None if kept is None or found.kept is None else kept + found.kept
    # Every step ends in [0, 1]; a Gaussian start without any step may not be in it.
    x_adv = x_adv.detach() if spec.steps else x_adv.detach().clamp(0, 1)
    return AttackResult(x_adv, zero_grads, x.shape[0] * spec.steps, kept, steps=spec.steps)


def aimed(ascent: Ascent, x: Tensor, goal: AttackGoal, spec: PGDSpec, generator: Randomness) -> AttackGoal:
    """`goal`, or the cross-entropy towards the classes that `spec.target` chooses: one forward pass at `x`.

    Of probabilities the likeliest class is an image's own.

    Raises:
        UserError: a goal that is not about classes, or tracked.
    """
    if spec.target == "none":
        return goal
    if goal.loss != "ce" or goal.targeted or goal.track:
        what = "tracked" if goal.track else "targeted" if goal.targeted else goal.loss
        raise UserError(f"target {spec.target} needs a cross-entropy to move away from, the goal is {what}")
    own = goal.target if goal.target.dim() == 1 else goal.target.argmax(1)
    with torch.no_grad():
        logits = ascent.logits(ascent.to_model_input(x))
    classes = target_classes(spec.target, logits, own, generator=generator)[:, 0]
    return AttackGoal("ce", classes, targeted=True)


def run_pgd(
    ascent: Ascent,
    x: Tensor,
    goal: AttackGoal,
    spec: PGDSpec,
    *,
    x_start: Tensor | None = None,
    sizes: Tensor | None = None,
    generator: Randomness = None,
) -> AttackResult:
    """The attack of `spec` with random start and restarts, or from `x_start`.

    The network is in the attack's mode.

    sizes: float64 (2,) on the device, [eps, step size], instead of those of `spec`: a captured graph reads
        them at each replay. 0 is a radius too: the attack then returns the images.
    """
    eps, _ = sizes_of(spec, sizes)
    goal = aimed(ascent, x, goal, spec, generator)
    climb = partial(adaptive_ascend if spec.algorithm == "apgd" else ascend, sizes=sizes)
    if goal.track and spec.restarts != 1:
        raise UserError(f"a goal is tracked along one run, so restarts must be 1, got {spec.restarts}")
    if x_start is not None:
        if spec.restarts != 1:
            raise UserError(f"x_start fixes the start, so restarts must be 1, got {spec.restarts}")
        return climb(ascent, x, goal, spec, x_start=x_start)
    start = start_point(x, spec.start, norm=spec.norm, eps=eps, generator=generator)
    best = climb(ascent, x, goal, spec, x_start=start)
    if spec.restarts == 1:
        return best

    def score(x_adv: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = ascent.logits(x_adv)
        return goal.reached(logits), goal.per_image(logits)

    x_adv, zero_grads = best.x_adv, best.zero_grads
    reached, loss = score(x_adv)
    for _ in range(spec.restarts - 1):
        start = start_point(x, spec.start, norm=spec.norm, eps=eps, generator=generator)
        run = climb(ascent, x, goal, spec, x_start=start)
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
    generator: Randomness = None,
    amp_dtype: torch.dtype | None = None,
    rescale: bool | None = None,
    output: Output | None = None,
    warn: bool = True,
) -> AttackResult:
    """Attack `model` at `x` by PGD.

    Works under ``no_grad`` and ``inference_mode``, leaves every parameter's ``.grad`` and every module's
    train/eval flag as they were, and returns detached tensors.

    Args:
        model: images in [0, 1] -> logits (N, K).
        x: (N, C, H, W), float32 or float64 as the model, in [0, 1]; rounded for a model in half precision.
        goal: what to maximise; its target has N rows.
        spec: norm, radius, steps, start, restarts.
        bn: batch norm during the attack: "eval", "train" or "frozen" (`set_attack_mode`).
        x_start: starting points; None draws them. Only with one run (`spec.restarts` of 1).
        generator: source of the random start, a ``torch.Generator`` or `ImageDraws` of the images; None is
            torch's global generator.
        amp_dtype: autocast the network to this dtype; the iterate keeps the dtype of `x`.
        rescale: scale each image's gradient to order one before it passes through the network
            (`AttackGoal.logit_grad`), so that the gradient of a confident network does not underflow; None
            does so wherever it is exact, that is unless `bn` mixes the images.
        output: where the logits are in the model's output: a key, an index or a function (`picked`).
        warn: warn of images that are not attacked because their gradient is zero or not finite
            (`AttackResult.zero_grads`).

    Raises:
        UserError: `x` or the target has a wrong shape, dtype or range; the model returns no logits, or no
            gradient reaches the images; `rescale` where images mix.
    """
    check_model(model)
    goal = check_batch(x, goal)
    dtype = half_of(model, x.dtype) or amp_dtype
    rescale = bn == "eval" if rescale is None else rescale
    network = _Checked(with_output(model, output), goal)
    ascent = Ascent(network, Underflow.guard(bn, dtype, rescale), dtype)
    # Autograd may save copies made outside inference mode for backward, but not inference tensors.
    with torch.inference_mode(False), torch.enable_grad(), attack_mode(model, bn):
        x, goal = x.detach().clamp(0, 1), goal.clone()  # rounding may have left [0, 1]
        x_start = None if x_start is None else x_start.detach().clone()
        result = run_pgd(ascent, x, goal, spec, x_start=x_start, generator=generator)
    if warn:
        _warn_later(
            result.zero_grads[None],
            result.gradients,
            zero_gradient_remedy(dtype, rescale, exact=bn == "eval"),
        )
    return result


class _Checked:
    """`network` that checks the labels at its first call, when the number of classes is known."""

    def __init__(self, network: Callable[[Tensor], Tensor], goal: AttackGoal) -> None:
        self._network = network
        self._goal = goal
        self._done = False

    def __call__(self, x: Tensor) -> Tensor:
        logits = logits_of(self._network(x), len(x))
        if not self._done:
            classes, target = logits.shape[1], self._goal.target
            check_label_rows(target, classes)
            if self._goal.loss == "dlr" and classes < 3:
                raise UserError(f"the loss dlr needs 3 classes, the model has {classes}; use the loss margin")
            _check_labels(None, None if self._goal.loss == "kl" else target, classes)
            self._done = True
        return logits


def check_batch(x: Tensor, goal: AttackGoal) -> AttackGoal:
    """`goal` with its target on the device of `x`; UserError unless `x` are images in [0, 1] and it fits."""
    if not isinstance(x, Tensor):
        raise UserError(f"images must be a tensor (N, C, H, W), got {type(x).__name__}; use torch.as_tensor")
    if x.dtype not in (torch.float32, torch.float64) or x.dim() != 4:
        hint = "; images.float() / 255" if x.dtype == torch.uint8 else ""
        hint = (
            "; for a half-precision network pass amp_dtype"
            if x.dtype in (torch.float16, torch.bfloat16)
            else hint
        )
        raise UserError(
            f"images must be float32 or float64 (N, C, H, W) in [0, 1], got {x.dtype} {tuple(x.shape)}{hint}"
        )
    goal = replace(goal, target=as_labels(goal.target, x))
    if goal.loss != "ce" and (goal.target.dim() == 2) != (goal.loss == "kl"):
        wanted = "(N, K) log-probabilities" if goal.loss == "kl" else "(N,) classes"
        raise UserError(
            f"the goal {goal.loss} is about {wanted}, got a target of shape {tuple(goal.target.shape)}"
        )
    _check_images(x.detach())
    return goal
