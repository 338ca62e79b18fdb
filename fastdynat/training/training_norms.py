"""The norms of a training step: one, one after the other, the worst for each image, or the mean of all."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.methods import logged_mean
from fastdynat.training.micro_batches import MicroBatch

ADV_ACC = "train_adv_acc"


@dataclass(frozen=True)
class TrainingNorms:
    """The attacks of training and the choice between them.

    Attributes:
        specs: one per norm.
        choice: "alternate": update number n takes spec n modulo their number; "worst": an image gets the one
            with the highest loss; "average": the batch is attacked under each, and losses are averaged.
    """

    specs: tuple[PGDSpec, ...]
    choice: str

    def turn(self, step: int) -> int:
        """The number of the spec whose turn it is in update number `step`; 0 where they take no turns."""
        return step % len(self.specs) if self.choice == "alternate" else 0

    @property
    def attacks_per_batch(self) -> int:
        """Attacks on a batch, each with a pass through the losses."""
        return len(self.specs) if self.choice == "average" else 1

    def choices(self, step: int, steps: int) -> list[tuple[PGDSpec, ...]]:
        """The attacks of update number `step` with `steps` steps; of several in a tuple the worst counts."""
        specs = tuple(replace(spec, steps=steps) for spec in self.specs)
        if self.choice == "average":
            return [(spec,) for spec in specs]
        return [specs if self.choice == "worst" else (specs[self.turn(step)],)]

    def logs(self, part: MicroBatch, logs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logs per norm of a `part` of the batch, whose method logs `logs`; none for one norm.

        train_adv_acc_NORM is the accuracy on images attacked under it; worst_NORM the share of attacked
        images whose highest loss it has. Images that are not attacked have the norm -1.
        """
        if len(self.specs) == 1:
            return {}
        norm = part.attacked.norm
        if norm is not None:
            return {
                key: value
                for number, spec in enumerate(self.specs)
                for key, value in logged_mean(f"worst_{spec.norm}", norm == number, norm >= 0).items()
            }
        if self.choice == "worst" or ADV_ACC not in logs:
            return {}
        # Parts of one batch are averaged, and only one of them has this norm.
        return {f"{ADV_ACC}_{part.attack.spec.norm}": logs[ADV_ACC] * self.attacks_per_batch}
