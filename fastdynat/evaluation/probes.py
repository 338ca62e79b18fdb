"""Measurements of the masking checks: accuracy, repeatability of the logits, and missing gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.goal import AttackGoal, AttackLoss, margin
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks import NamedAttack
from fastdynat.data import Batch, Images, eval_batches
from fastdynat.evaluation.halving import with_halving
from fastdynat.evaluation.measure import Stopped, attacked, measure, model_logits
from fastdynat.evaluation.measure_on_ranks import measure_on_ranks, on_all_ranks
from fastdynat.evaluation.outcome import Measurement, unpack_bits
from fastdynat.ops.image_draws import ImageDraws

T = TypeVar("T")
PASSES = 5
GOALS: tuple[AttackLoss, ...] = ("ce", "margin", "dlr")


@dataclass(frozen=True)
class RobustImages:
    """The images that are robust under `attack`: (N,) bool."""

    attack: str
    robust: Tensor


@dataclass
class ProbedNetwork:
    """A network under test, with the measurements of it.

    Attributes:
        batch_size: images per batch; halved where memory runs out.
        on_ranks: deal the images out to the processes of the world, which must all do the same.
        runs: expected calls of `run`; each advances the progress by an equal part of ``len(images)``.
    """

    model: nn.Module
    images: Images
    device: torch.device
    batch_size: int
    seed: int
    should_stop: Callable[[], bool]
    advance: Callable[[float], None]
    on_ranks: bool = False
    runs: int = 1
    measurements: list[Measurement] = field(default_factory=list)

    def run(
        self, attack: NamedAttack, *, source: nn.Module | None = None, standing: Tensor | None = None
    ) -> RobustImages:
        """`measure` `attack`; images that are not `standing` count as broken."""
        total, told = len(self.images), 0.0

        def advance(images: float) -> None:
            nonlocal told
            told += images
            self.advance(images / self.runs)

        def measured(own: Tensor | None, batch_size: int) -> Measurement:
            return measure(
                self.model,
                self.images,
                attack,
                device=self.device,
                batch_size=batch_size,
                seed=self.seed,
                source=source,
                standing=own,
                should_stop=self.should_stop,
                advance=advance,
            )

        labels, size = self.images.labels, self.batch_size
        if self.on_ranks:
            found = measure_on_ranks(measured, attack, labels, batch_size=size, standing=standing)
        else:
            found = with_halving(partial(measured, standing), size)
        advance(total - told)
        self.measurements.append(found)
        return RobustImages(attack.name, unpack_bits(found.robust_bits, total))

    def instability(self) -> float:
        """Largest difference of logits between passes over the first batch, relative to the largest logit.

        NaN if a logit is not finite.
        """

        def passes_of(size: int) -> Tensor:
            with self._batches(size) as batches, torch.no_grad():
                x = next(batches).x
                return torch.stack([model_logits(self.model, x) for _ in range(PASSES)]).cpu()

        passes = self._alike(passes_of)
        if not bool(passes.isfinite().all()):
            return float("nan")
        largest = passes.abs().amax().clamp_min(torch.finfo(passes.dtype).tiny)
        return float((passes.amax(0) - passes.amin(0)).amax() / largest)

    def median_lead(self) -> float:
        """Median lead of the label's logit over correctly classified images; 0 without any."""

        def leads_of(size: int) -> Tensor:
            with self._batches(size) as batches, torch.no_grad():
                return torch.cat([-margin(model_logits(self.model, b.x), b.labels) for b in batches]).cpu()

        leads = self._alike(leads_of)
        right = leads[leads > 0]
        return float(right.median()) if len(right) else 0.0

    def without_gradient(self, norm: str, eps: float) -> tuple[dict[AttackLoss, int], int]:
        """Count images that are correct at a random start in the ball but have a zero or NaN gradient there.

        Misclassified images are left out, because the DLR loss is constant once the label is third. Gradients
        are not rescaled, as in other libraries' attacks.

        Returns:
            Their number for each goal (dlr needs three classes), and the number of correct images.
        """
        return self._alike(lambda size: self._without_gradient(norm, eps, size))

    def _without_gradient(self, norm: str, eps: float, size: int) -> tuple[dict[AttackLoss, int], int]:
        silent: dict[AttackLoss, int] = {}
        correct = 0
        with self._batches(size) as batches:
            ascent = None
            for batch in batches:
                x, labels = batch.x, batch.labels
                ascent = ascent or attacked(self.model, x, rescale=False)
                draws = ImageDraws.of(self.seed, batch.indices, self.device)
                start = start_point(x, "uniform", norm=norm, eps=eps, generator=draws)
                with torch.no_grad():
                    logits = model_logits(self.model, start)
                right = logits.argmax(1) == labels
                correct += int(right.sum())
                for goal in GOALS if logits.shape[1] > 2 else GOALS[:-1]:
                    gradient = ascent.gradient(start, AttackGoal(goal, labels)).flatten(1)
                    silent[goal] = silent.get(goal, 0) + int((right & ~(gradient.abs().amax(1) > 0)).sum())
        return silent, correct

    def _alike(self, run: Callable[[int], T]) -> T:
        """``run(batch_size)``, of rank 0 where there are several: what follows must be the same on all."""
        halving = partial(with_halving, run, self.batch_size)
        return on_all_ranks(halving)[0] if self.on_ranks else halving()

    @contextmanager
    def _batches(self, size: int) -> Iterator[Iterator[Batch]]:
        """The images, with the model in eval mode; checks `should_stop` before each batch."""

        def batches() -> Iterator[Batch]:
            for batch in eval_batches(self.images, batch_size=size, device=self.device):
                if self.should_stop():
                    raise Stopped
                yield batch

        with torch.inference_mode(False), torch.enable_grad(), attack_mode(self.model, "eval"):
            yield batches()
