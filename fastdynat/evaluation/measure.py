"""Accuracy of one network under one attack."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.network_modes import NotCopyable, attack_mode
from fastdynat.attack_engine.network_state import network_state
from fastdynat.attacks import NamedAttack, Nearest
from fastdynat.data import Images, eval_batches
from fastdynat.evaluation.outcome import Measurement
from fastdynat.execution.fallbacks import Fallbacks, SilentFallbacks
from fastdynat.execution.float32 import full_float32
from fastdynat.execution.uncompiled import uncompiled
from fastdynat.models.logits import half_of, logits_of, own_dtype, predicted_classes
from fastdynat.ops.image_draws import ImageDraws


class Stopped(Exception):
    """The caller asked to stop; the measurement is dropped."""


@dataclass(frozen=True)
class Attacked:
    """The gradients that attacks use; `refresh` takes over the current weights."""

    ascent: Ascent
    refresh: Callable[[], None]


@dataclass
class BatchTick:
    """A `Tick` of one batch: calls `advance` with the images done since the last call; may raise Stopped."""

    images: int
    should_stop: Callable[[], bool]
    advance: Callable[[float], None]
    told: float = 0.0

    def __call__(self, share: float) -> None:
        if self.should_stop():
            raise Stopped
        if share * self.images > self.told:
            self.advance(share * self.images - self.told)
            self.told = share * self.images


class KeptReplica:
    """The replica of a network, made at its first measurement and refreshed for each later one.

    For a caller that changes only the network's weights, as training does: nothing is traced and checked
    again. A change of other state (`network_state`) makes a new one."""

    def __init__(self) -> None:
        self._made: tuple[nn.Module, tuple[Any, ...], Attacked] | None = None
        self._marks: list[Any] = []

    def of(self, model: nn.Module, how: tuple[Any, ...], make: Callable[[], "Attacked"]) -> Ascent:
        """`make()`, or its earlier result for the same `model` and `how`, with the current weights."""
        marks, self._marks = self._marks, network_state(model).marks
        if self._made is None or self._made[0] is not model or self._made[1] != how or marks != self._marks:
            self._made = model, how, make()
        else:
            self._made[2].refresh()
        return self._made[2].ascent


@contextmanager
def exact_float32() -> Iterator[None]:
    """The precision of every evaluation: full float32, without TF32 and the caller's autocast."""
    with full_float32(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@exact_float32()
def measure(
    model: nn.Module,
    images: Images,
    attack: NamedAttack,
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    winograd: bool = True,
    source: nn.Module | None = None,
    standing: Tensor | None = None,
    numbers: Tensor | None = None,
    compile_mode: str = "off",
    kept: KeptReplica | None = None,
    fallbacks: Fallbacks | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[float], None] = lambda images: None,
) -> Measurement:
    """Accuracy of `model` (images in [0, 1] -> logits) on `images` under `attack`.

    Every image counts; a misclassified clean image stays misclassified, whatever the attack returns. The
    attack runs on a fast replica of the network; the prediction that counts is `model`'s own, in eval mode
    and full float32, at the adversarial image; one that is not finite or outside the attack's ball
    (`Nearest.eps`) does not count.
    Random numbers are functions of `seed` and the number of the image. An image's result is therefore that of
    any other batch size, order or division of the images, up to the rounding of the network; the global
    generator is left alone. Of an attack of another package (`NamedAttack.draws_per_image`), which draws from
    a generator, it depends on the batch.

    Args:
        batch_size: images per batch, which bounds memory.
        seed: of the random numbers, any integer.
        amp_dtype: autocast dtype of the attack; None is float32 without TF32.
        winograd: let the attack use Winograd's algorithm where that is faster.
        source: another network, on which the attack runs (a transfer attack); the prediction stays
            `model`'s, and a distance is that of an image that fools `model`.
        standing: (N,) bool: attack only these images; the others count as misclassified, by earlier attacks.
        numbers: (N,) int64, the images' numbers in the set that they are a part of; None is 0 to N - 1.
        compile_mode: of the attack's gradients on whole batches (`AttackSwitches.compile`).
        kept: where the replica is kept for the next measurement of the same network; None makes it for this
            one.
        fallbacks: collects what could not be compiled; None logs it.
        should_stop: called between batches and within long attacks.
        advance: called with the number of images done since the last call, also fractions.

    Raises:
        Stopped: `should_stop` returned True.
    """
    wanted = None if standing is None else standing.nonzero().squeeze(1)
    chosen = images if wanted is None else images.part(wanted)
    numbers = torch.arange(len(images)) if numbers is None else numbers
    numbers = (numbers if wanted is None else numbers[wanted]).to(device)
    victim = model if source is None else source
    robust, distances = [], []
    zero, gradients = torch.zeros((), dtype=torch.int64, device=device), 0
    start = time.perf_counter()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        attack_mode(model, "eval"),
        attack_mode(victim, "eval"),
    ):
        ascent: Ascent | None = None
        for batch in eval_batches(chosen, batch_size=batch_size, device=device, channels_last=channels_last):
            tick = BatchTick(len(batch.x), should_stop, advance)
            tick(0)
            right = predict(model, batch.x) == batch.labels
            if attack.search is not None:
                if ascent is None:
                    how = (amp_dtype, channels_last, winograd, compile_mode, batch.x.shape[1:])
                    make = partial(
                        _attacked, victim, batch.x, *how[:3], compile_mode=compile_mode, fallbacks=fallbacks
                    )
                    ascent = make().ascent if kept is None else kept.of(victim, how, make)
                    ascent = replace(ascent, final=source is None)
                with uncompiled() if len(batch.x) < batch_size <= len(chosen) else nullcontext():
                    draws = ImageDraws.of(seed, numbers[batch.indices], device)
                    result = attack.run(ascent, batch.x, batch.labels, draws=draws, tick=tick)
                zero, gradients = zero + result.zero_grads, gradients + result.gradients
                if isinstance(result, Nearest):
                    distances.append(_judged(model, batch.labels, right, result))
                x = counted(result, batch.x)
                # A misclassified clean image stays so: a targeted attack may lead it to its label.
                right &= predict(model, x) == batch.labels
            robust.append(right)
            tick(1)
        # Waits for the device before the clock stops.
        found = torch.cat([torch.zeros(0, dtype=torch.bool), *(part.cpu() for part in robust)])
    nobody = torch.zeros(len(images.labels), dtype=torch.bool)
    mask = found if wanted is None else nobody.index_copy(0, wanted, found)
    return Measurement.of(
        attack.name,
        mask,
        images.labels.cpu(),
        classes=int(images.labels.max()) + 1,
        seconds=time.perf_counter() - start,
        batch_size=batch_size,
        zero_grad_share=int(zero) / gradients if gradients else None,
        gradients=gradients if gradients else None,
        distances=torch.cat(distances).cpu() if distances else None,
        attacked=len(chosen),
    )


def attacked(
    model: nn.Module,
    x: Tensor,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    winograd: bool = True,
    *,
    rescale: bool = True,
    compile_mode: str = "off",
    fallbacks: Fallbacks | None = None,
) -> Ascent:
    """Gradients of `model` for attacks: by a replica (`AttackEngine`) if one can be made, else by the model.

    Each image's gradient is rescaled by default, so that a confident network can be attacked. A network
    without gradients is no error: an evaluation counts zero gradients, and gradient-free attacks still run.

    x: example images on the model's device; a model in half precision takes them rounded.
    """
    return _attacked(
        model,
        x,
        amp_dtype,
        channels_last,
        winograd,
        rescale=rescale,
        compile_mode=compile_mode,
        fallbacks=fallbacks,
    ).ascent


def _attacked(
    model: nn.Module,
    x: Tensor,
    amp_dtype: torch.dtype | None,
    channels_last: bool,
    winograd: bool,
    *,
    rescale: bool = True,
    compile_mode: str = "off",
    fallbacks: Fallbacks | None = None,
) -> Attacked:
    own = half_of(model, x.dtype)
    dtype = own or amp_dtype
    # Under autocast the attack searches another network than the one that judges its images. A model that is
    # itself in half precision is rounded otherwise than a replica, with folded batch norm by a visible share
    # of the logits.
    judge, strict = partial(_in_eval_mode, model), dtype is not None
    example = x[:2].to(own_dtype(model) or x.dtype)
    try:
        switches = AttackSwitches.fastest(
            x.device,
            dtype,
            channels_last=channels_last or None,
            winograd=winograd,
            fold=own is None,
            compile=compile_mode,
        )
        fallbacks = SilentFallbacks() if compile_mode == "off" else fallbacks or Fallbacks()
        engine = AttackEngine(
            model, example, switches=switches, rescale=rescale, allow_no_gradient=True, fallbacks=fallbacks
        )
    except NotCopyable:
        underflow = Underflow.guard("eval", dtype, rescale)
        plain = Ascent(model, underflow, dtype, allow_no_gradient=True, strict=strict)
        return Attacked(replace(plain, judge=judge) if strict else plain, lambda: None)
    engine.prepare(x.to(example.dtype))
    return Attacked(replace(engine.ascent, judge=judge, strict=strict), engine.refresh)


def _in_eval_mode(model: nn.Module, x: Tensor) -> Tensor:
    """Logits in the mode of the replica, whichever mode the caller's network is in."""
    evaluates = not any(module.training for module in model.modules())
    with nullcontext() if evaluates else attack_mode(model, "eval"):
        return model_logits(model, x)


def counted(result: AttackResult, x: Tensor) -> Tensor:
    """The images of `result` that count as adversarial, the clean ones `x` (N, C, H, W) in place of others.

    Others are not finite, which no ball holds and every network gets wrong, or outside of a `Nearest`'s ball.
    """
    counts = result.x_adv.isfinite().flatten(1).all(1)
    if isinstance(result, Nearest):
        counts &= ~result.outside
    return torch.where(counts[:, None, None, None], result.x_adv, x)


def _judged(model: nn.Module, labels: Tensor, right: Tensor, result: Nearest) -> Tensor:
    """(N,) distances for `model` of images found on a replica or on another network.

    0 where `model` is not `right` (N,) about the clean image, infinite where it is not fooled.
    """
    fooled = (predict(model, result.x_adv) != labels) & result.x_adv.isfinite().flatten(1).all(1)
    return torch.where(fooled, result.distance, torch.inf).masked_fill(~right, 0.0)


def model_logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The logits (N, K) of `model` at `x`, rounded to the model's dtype if that is a half precision.

    Raises:
        UserError: the model returns no logits, or its dtype and the images' are float32 and float64.
    """
    half = half_of(model, x.dtype)
    return logits_of(model(x if half is None else x.to(half)), len(x))


def predict(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Predicted classes (N,) of `model` at `x`; `NO_CLASS` where a logit is NaN or +inf."""
    with torch.no_grad():
        return predicted_classes(model_logits(model, x))


def predict_in_batches(
    model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """`predict` in batches moved to `device`; (N,) on the device of `x`."""
    return torch.cat([predict(model, part.to(device)).to(x.device) for part in x.split(batch_size)])
