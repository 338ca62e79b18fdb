"""The interface every training method implements: a min-max problem, its two halves stated separately.

A method says what the attack maximises (`inner`) and what each network then minimises (`outer`). The engine owns the rest: it
runs the attack between the two (a method with a search of its own overrides `perturb`), the backward pass, the optimisers,
precision and compilation. Both halves of a step run once, under autocast; `inner` may leave a graph in `Inner` for `outer` to
use.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from fastdynat.attacks import AttackGoal, AttackResult
from fastdynat.data import Batch
from fastdynat.ops import DynamicLabelLoss

Network = Callable[[Tensor], Tensor]  # images in [0, 1] -> logits (N, K)
Attack = Callable[[Tensor, AttackGoal], AttackResult]  # the engine's attack on `Networks.attacked`, as configured
OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Networks:
    """The networks of a run as a method sees them.

    Attributes:
        model: the network being trained for robustness, in train mode.
        attacked: the same weights in the attack's BN mode, without parameter gradients.
        guide: the second network, in train mode (LBGAT's and DYNAT's guide, a distillation's teacher); None without one.
        guide_eval: the guide's weights in eval mode, without parameter gradients; None without a guide.
    """

    model: Network
    attacked: Network
    guide: Network | None = None
    guide_eval: Network | None = None


@dataclass(frozen=True)
class Inner:
    """The inner maximisation of one batch.

    Attributes:
        goal: what the attack maximises; None trains on the clean images.
        guide: the guide's loss to the true labels on the clean batch, with its graph, where the method computed it.
        dynamic_labels: what the guide says the model should answer: (N,) int64 classes, or the guide's logits (N, K).
        losses: scalars with their graph, keyed like `Outer.losses`, that do not depend on the attack. The engine takes their
            gradient at once, beside the attack where it can, and `Outer.losses` leaves them out.
    """

    goal: AttackGoal | None
    guide: DynamicLabelLoss | None = None
    dynamic_labels: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    """The outer minimisation of one batch.

    Attributes:
        losses: one scalar with its graph per trained network, keyed "model" and "guide", that `Inner` had no loss for.
        logs: detached scalars, averaged over the epoch's images under the same key in metrics.jsonl.
    """

    losses: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC, Generic[OptionsT]):
    """A training method. Subclasses are one file each and hold no tensors of their own."""

    name: ClassVar[str]
    options_type: ClassVar[type]  # frozen dataclass; its fields are the method's command-line options
    uses_guide: ClassVar[bool] = False
    trains: ClassVar[tuple[str, ...]] = ("model",)  # the networks that `outer` has losses for
    default_start: ClassVar[str] = "uniform"  # of the inner attack, where the user names none
    select_by: ClassVar[str] = "val_pgd10_acc"  # what makes a checkpoint the best

    epoch: int = 0  # epochs completed, set by the engine before each epoch: for warm-ups and ramps

    def __init__(self, options: OptionsT) -> None:
        """Raises UserError for an option that cannot work."""
        self.options = options

    def constants(self) -> tuple[float, ...]:
        """Every number that the halves compute in Python and that changes in the course of a run, such as a ramp's value.

        A captured step has them built in; it is captured again where they change.
        """
        return ()

    @abstractmethod
    def inner(self, nets: Networks, batch: Batch) -> Inner:
        """State the inner problem of `batch` (images (N, C, H, W) in [0, 1], labels (N,) int64)."""

    def perturb(self, batch: Batch, goal: AttackGoal, attack: Attack) -> AttackResult:
        """The attacked images: the engine's PGD on `goal`, unless a method searches in its own way."""
        return attack(batch.x, goal)

    @abstractmethod
    def outer(self, nets: Networks, batch: Batch, inner: Inner, x_adv: Tensor) -> Outer:
        """State the losses on the attacked images `x_adv` (the clean ones where `inner.goal` is None)."""


def share(count: Tensor | None, batch: Batch) -> Tensor:
    """`count` of the batch's images as a share, for a log; a loss that was given the labels has counts."""
    assert count is not None
    return count / len(batch.labels)


def clean_statistics_pass(nets: Networks, batch: Batch) -> None:
    """Let the clean batch move the model's running statistics; nothing else comes of it."""
    with torch.no_grad():
        nets.model(batch.x)


__all__ = [
    "Inner",
    "Method",
    "Network",
    "Networks",
    "OptionsT",
    "Outer",
    "clean_statistics_pass",
    "share",
]
