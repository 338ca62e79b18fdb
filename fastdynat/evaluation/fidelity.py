"""Fidelity of the fast attack: the engine's attack against the reference's, from the same starting points."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.shortfall import SIGMAS, falls_short
from fastdynat.attack_engine.steps import start_point
from fastdynat.errors import UserError
from fastdynat.execution.float32 import full_float32
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.execution.uncompiled import uncompiled
from fastdynat.ops.image_draws import ImageDraws


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Two attacks from the same starts, both judged by the eager, unfolded network in full float32 (no TF32).

    Attributes:
        images: how many were attacked.
        loss_clean, loss_reference, loss_fast: mean of the goal at clean images and at each attack's images.
        loss_error: standard error of ``loss_fast - loss_reference``, from the differences per image.
        acc_reference, acc_fast: share still classified as labelled.
        only_fast_right, only_reference_right: images that just one of the attacks left classified as
            labelled.
        sign_mass: share of the reference gradient's L1 norm, at the start, on pixels where the fast gradient
            has the same sign; a mean over images.
        zero_reference, zero_fast: share of image gradients, over all steps, that were zero in every pixel.
    """

    images: int
    loss_clean: float
    loss_reference: float
    loss_fast: float
    loss_error: float
    acc_reference: float
    acc_fast: float
    only_fast_right: int
    only_reference_right: int
    sign_mass: float
    zero_reference: float
    zero_fast: float

    @property
    def weaker(self) -> bool:
        """The fast attack is weaker than the reference by more than rounding and chance explain.

        Either of:

        - its loss falls short by more than 1 % of the reference's rise over the clean loss, and by more than
          two standard errors. The scale is the rise, because the clean loss is no merit of the attack; a rise
          below 0.001 counts as 0.001, so that rounding errors of a useless attack are not compared. Rounding
          sends single images to other maxima, better and worse alike; the standard error is its effect on the
          mean.
        - it leaves more images correct than the reference, by more than two standard deviations. Both attack
          the same images from the same starts, so only images on which they disagree count: under equal
          strength each goes either way with probability 1/2, and the difference of the two counts has
          variance ``only_fast_right + only_reference_right`` (McNemar 1947).

        Two standard deviations, one-sided, are a false alarm in 2 % of the borderline checks.
        """
        short = falls_short(
            self.loss_fast, reference=self.loss_reference, clean=self.loss_clean, error=self.loss_error
        )
        surplus, discordant = (
            self.only_fast_right - self.only_reference_right,
            self.only_fast_right + self.only_reference_right,
        )
        return short or surplus > SIGMAS * discordant**0.5

    def columns(self) -> dict[str, float | bool]:
        """Columns of the log."""
        kept = (
            "loss_fast",
            "loss_reference",
            "acc_fast",
            "acc_reference",
            "sign_mass",
            "zero_fast",
            "zero_reference",
            "weaker",
        )
        return {f"fidelity_{name}": getattr(self, name) for name in kept}


def check_fidelity(
    engine: AttackEngine,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    spec: PGDSpec,
    *,
    bn: str = "eval",
    seed: int = 0,
) -> Fidelity:
    """Attack `batches` with `engine` and with `pgd` on `model` in full float32, from the same starts.

    Where `engine` captures attacks, all full batches go through the graph: the first one is attacked until
    there is one.

    Weights, buffers, modes, gradients and global random streams are restored. With `bn` "train", both attacks
    and the judge use batch statistics as "frozen" does.

    Args:
        engine: of `model`; refreshed first.
        model: images in [0, 1] -> logits, float32 or float64.
        batches: (N, C, H, W) images in [0, 1] and (N,) labels, on the model's device.
        spec: the attack, run once without restarts.
        bn: batch norm during the attack, the engine's.
        seed: of the random starts, each of which depends on its image's place in the sequence only.

    Raises:
        UserError: no images.
    """
    spec, bn = replace(spec, restarts=1, target="none"), "frozen" if bn == "train" else bn
    with _untouched(model), torch.inference_mode(False), torch.enable_grad():
        engine.refresh()
        device = next(model.parameters()).device
        parts: list[dict[str, Tensor]] = []
        whole = images = 0
        for x, y in batches:
            if not whole:
                whole = len(x)
                _until_captured(engine, x, AttackGoal("ce", y), spec)
            draws = ImageDraws.of(seed, range(images, images + len(x)), device)
            images += len(x)
            # Nothing is compiled for a smaller last batch.
            with uncompiled() if len(x) < whole else nullcontext():
                parts.append(_compare(engine, model, x, y, AttackGoal("ce", y), spec, bn, draws))
        if not sum(len(part["sign_mass"]) for part in parts):
            raise UserError("fidelity needs at least one image")
        return _summary(
            {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}, spec.steps
        )


def _until_captured(engine: AttackEngine, x: Tensor, goal: AttackGoal, spec: PGDSpec) -> None:
    """Attack until the next attack on images like `x`, from a given start, is a graph's."""
    for _ in range(WARM_UP_CALLS if engine.captures else 0):
        engine.run(x, goal, spec, x_start=x)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random streams: an engine in batch norm's train mode updates shared buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _compare(
    engine: AttackEngine,
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    goal: AttackGoal,
    spec: PGDSpec,
    bn: str,
    draws: ImageDraws,
) -> dict[str, Tensor]:
    """Goal and correctness per image, clean and after each attack, sign agreement, and zero gradients."""
    start = start_point(x, spec.start, norm=spec.norm, eps=spec.eps, generator=draws)
    fast = engine.run(x, goal, spec, x_start=start)
    signs = engine.gradient(start, goal).sign().to(x.dtype)
    with full_float32():
        # `Fidelity.zero_reference` counts zero gradients in place of the warning.
        reference = pgd(model, x, goal, spec, bn=bn, x_start=start, warn=False)
    with full_float32(), attack_mode(model, bn):
        judge = Ascent(model)
        exact = judge.gradient(start, goal)
        with torch.no_grad():
            logits = {
                "clean": judge.logits(x),
                "reference": judge.logits(reference.x_adv),
                "fast": judge.logits(fast.x_adv),
            }
    same = signs == exact.sign()
    mass = exact.abs().flatten(1).sum(1)
    found = {f"loss_{name}": goal.per_image(value) for name, value in logits.items()}
    found |= {f"right_{name}": value.argmax(1) == labels for name, value in logits.items()}
    found["sign_mass"] = torch.where(mass > 0, (exact.abs() * same).flatten(1).sum(1) / mass, 1.0)
    return found | {"zero_reference": reference.zero_grads[None], "zero_fast": fast.zero_grads[None]}


def _summary(found: dict[str, Tensor], steps: int) -> Fidelity:
    images = len(found["sign_mass"])
    gradients = max(images * steps, 1)
    difference = found["loss_fast"] - found["loss_reference"]
    fast, reference = found["right_fast"], found["right_reference"]
    return Fidelity(
        images=images,
        loss_clean=float(found["loss_clean"].mean()),
        loss_reference=float(found["loss_reference"].mean()),
        loss_fast=float(found["loss_fast"].mean()),
        loss_error=float(difference.std(correction=0)) / images**0.5,
        acc_reference=float(reference.mean()),
        acc_fast=float(fast.mean()),
        only_fast_right=int((fast * (1 - reference)).sum()),
        only_reference_right=int((reference * (1 - fast)).sum()),
        sign_mass=float(found["sign_mass"].mean()),
        zero_reference=float(found["zero_reference"].sum()) / gradients,
        zero_fast=float(found["zero_fast"].sum()) / gradients,
    )
