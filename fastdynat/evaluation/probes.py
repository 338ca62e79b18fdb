"""What the masking checks ask a network beside its accuracy: does it answer twice alike, and does it have
gradients?
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.goal import AttackGoal, AttackLoss, margin
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks import NamedAttack
from fastdynat.data import ImageSet, eval_batches
from fastdynat.evaluation.measure import Stopped, answers, attacked, measure
from fastdynat.evaluation.outcome import Measurement, unpack_bits

PASSES = 5
GOALS: tuple[AttackLoss, ...] = ("ce", "margin", "dlr")


class ScaledLogits(nn.Module):
    """`network` with its logits divided by `scale`: the same predictions, another cross-entropy."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) / self.scale


@dataclass(frozen=True)
class RobustImages:
    """Which images stand after `attack`: (N,) bool."""

    attack: str
    robust: Tensor


@dataclass
class ProbedNetwork:
    """A network under examination, and what was measured of it.

    Attributes:
        runs: how many calls of `run` there will be; each tells `advance` an equal part of ``len(images)``.
    """

    model: nn.Module
    images: ImageSet
    device: torch.device
    batch_size: int
    seed: int
    should_stop: Callable[[], bool]
    advance: Callable[[float], None]
    runs: int = 1
    measurements: list[Measurement] = field(default_factory=list)

    def run(
        self, attack: NamedAttack, *, source: nn.Module | None = None, standing: Tensor | None = None
    ) -> RobustImages:
        """`measure`; images that are not `standing` count as broken."""
        total, told = len(self.images), 0.0

        def advance(images: float) -> None:
            nonlocal told
            told += images
            self.advance(images / self.runs)

        found = measure(
            self.model,
            self.images,
            attack,
            device=self.device,
            batch_size=self.batch_size,
            seed=self.seed,
            source=source,
            standing=standing,
            should_stop=self.should_stop,
            advance=advance,
        )
        advance(total - told)
        self.measurements.append(found)
        return RobustImages(attack.name, unpack_bits(found.robust_bits, total))

    def instability(self) -> float:
        """By how much logits differ between passes over the same images (the first batch), over the largest
        of them; NaN where some are no numbers.
        """
        with self._batches() as batches, torch.no_grad():
            x = next(batches)[0]
            passes = torch.stack([answers(self.model, x) for _ in range(PASSES)])
        if not bool(passes.isfinite().all()):
            return float("nan")
        largest = passes.abs().amax().clamp_min(torch.finfo(passes.dtype).tiny)
        return float((passes.amax(0) - passes.amin(0)).amax() / largest)

    def median_lead(self) -> float:
        """The label's logit minus the largest other: the median over correctly classified images; 0 without
        any.
        """
        with self._batches() as batches, torch.no_grad():
            leads = torch.cat([-margin(answers(self.model, x), labels) for x, labels in batches])
        right = leads[leads > 0]
        return float(right.median()) if len(right) else 0.0

    def without_gradient(self, norm: str, eps: float) -> tuple[dict[AttackLoss, int], int]:
        """How many images that are classified correctly at a random start in the ball have no gradient there
        (zero or NaN).

        Only those: the ratio of logits is constant, and rightly so, once the label is third. The gradients
        are the plain ones, as other libraries' attacks take them, and not rescaled as in our own.

        Returns:
            Their number for each goal (dlr needs three classes), and how many are classified correctly.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed)
        silent: dict[AttackLoss, int] = {}
        correct = 0
        with self._batches() as batches:
            ascent = None
            for x, labels in batches:
                ascent = ascent or attacked(self.model, x, rescale=False)
                start = start_point(x, "uniform", norm=norm, eps=eps, generator=generator)
                with torch.no_grad():
                    logits = answers(self.model, start)
                right = logits.argmax(1) == labels
                correct += int(right.sum())
                for goal in GOALS if logits.shape[1] > 2 else GOALS[:-1]:
                    gradient = ascent.gradient(start, AttackGoal(goal, labels)).flatten(1)
                    silent[goal] = silent.get(goal, 0) + int((right & ~(gradient.abs().amax(1) > 0)).sum())
        return silent, correct

    @contextmanager
    def _batches(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Images and labels, with the model in eval mode; asks `should_stop` before each batch."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in eval_batches(self.images, batch_size=self.batch_size, device=self.device):
                if self.should_stop():
                    raise Stopped
                yield batch.x, batch.labels

        with torch.inference_mode(False), torch.enable_grad(), attack_mode(self.model, "eval"):
            yield batches()
