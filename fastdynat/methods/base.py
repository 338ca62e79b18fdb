"""The interface every training method implements: a min-max problem, its two halves stated separately.

A method says what the attack maximises (`inner`) and what each network then minimises (`outer`). The engine
owns the rest: it runs the attack between the two (a method with a search of its own overrides `perturb`), the
backward pass, the optimisers, precision and compilation. Both halves of a step run under autocast; `inner`
may leave a graph in `Inner` for `outer` to use, of the guide's logits only: weight perturbation moves the
model's weights in between.

A step may be captured as a CUDA graph: nothing in a method may wait for the device or choose by the value of
a tensor, shapes are fixed, and what Python computes from the epoch is declared in `constants`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from fastdynat.errors import UserError
from fastdynat.methods.options import check_options

if TYPE_CHECKING:
    from torch import Tensor

    from fastdynat.attack_engine.engine import Attacker
    from fastdynat.attack_engine.goal import AttackGoal
    from fastdynat.attack_engine.pgd_spec import PGDSpec
    from fastdynat.attacks import AttackResult
    from fastdynat.data import Batch
    from fastdynat.ops import DynamicLabelLoss

Network: TypeAlias = "Callable[[Tensor], Tensor]"  # images in [0, 1] -> logits (N, K)
OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Networks:
    """The networks of a run as a method sees them.

    Attributes:
        model: the network being trained for robustness, in train mode.
        attacked: the same weights in the attack's BN mode, without parameter gradients.
        unmoved: the model in train mode with its parameters' gradients, but leaving its running statistics as
            they are.
        guide: the second network; None without one. In train mode where the method trains it (DYNAT, LBGAT);
            where it is a teacher trained before, the same as `guide_eval`.
        guide_eval: the guide's weights in eval mode, without parameter gradients; None without a guide.
    """

    model: Network
    attacked: Network
    unmoved: Network
    guide: Network | None = None
    guide_eval: Network | None = None


@dataclass(frozen=True)
class AttackDefaults:
    """The inner attack that a method was published with, where the user does not say otherwise.

    Attributes:
        start: as in `PGDSpec`.
        steps: number of steps.
        step_ratio: step size / eps.
    """

    start: str = "uniform"
    steps: int = 10
    step_ratio: float = 0.25


@dataclass(frozen=True)
class Inner:
    """The inner maximisation of one batch.

    Attributes:
        goal: what the attack maximises; None trains on the clean images.
        guide: the guide's loss to the true labels on the clean batch, with its graph, where the method
            computed it.
        dynamic_labels: what the guide says the model should answer: (N,) int64 classes, or the guide's logits
            (N, K).
        losses: scalars with their graph, keyed like `Outer.losses`, that do not depend on the attack. The
            engine takes their gradient at once, beside the attack where it can, and `Outer.losses` leaves
            them out.
    """

    goal: AttackGoal | None
    guide: DynamicLabelLoss | None = None
    dynamic_labels: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    """The outer minimisation of one batch.

    Attributes:
        losses: one scalar with its graph per trained network, keyed "model" and "guide", that `Inner` had no
            loss for.
        logs: detached scalars, averaged over the epoch's images under the same key in metrics.jsonl.
    """

    losses: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC, Generic[OptionsT]):
    """A training method. Subclasses are one file each and hold no tensors of their own but `buffers`."""

    name: ClassVar[str]
    options_type: ClassVar[type]  # frozen dataclass; its fields are the method's command-line options
    uses_guide: ClassVar[bool] = False
    semi_supervised: ClassVar[bool] = False  # whether labels may be UNLABELLED
    guide_made_by: str = (
        "natural"  # the method that usually trains a frozen guide, with flags where it needs them
    )
    attack_defaults: ClassVar[AttackDefaults] = AttackDefaults()
    select_by: ClassVar[str] = "val_pgd10_acc"  # what makes a checkpoint the best
    logs_adv_acc: ClassVar[bool] = (
        True  # whether `outer` logs train_adv_acc, by which a collapse of robustness is known
    )
    replays: int = 1  # updates per batch, each with both halves and the attack
    searches: bool = (
        True  # whether there is an inner search that starts from the weights of now; AWP needs one
    )
    attacks: bool = True  # whether training attacks anything
    unused_attack: tuple[str, ...] = ()  # keys of the attack that training does not look at

    # The networks that have losses. A guide that is not among them is a teacher: trained before, frozen.
    trains: tuple[str, ...] = ("model",)
    # Set by the engine before each epoch: epochs completed, and epochs in all, both after the burn-in. For
    # warm-ups and ramps.
    epoch: int = 0
    epochs: int = 1

    def __init__(self, options: OptionsT) -> None:
        """Raises UserError for an option that cannot work."""
        check_options(options)
        self.options = options
        self.buffers: dict[str, Tensor] = {}

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        """Raise UserError for an attack, or its batch norm mode, that the method cannot work with."""

    def make_buffers(self, x: Tensor) -> dict[str, Tensor]:
        """Tensors to keep from batch to batch, changed in place only; a checkpoint holds them. x: zeros like
        a full batch.
        """
        return {}

    def constants(self) -> tuple[float, ...]:
        """Every number that the halves compute in Python and that changes in the course of a run, such as a
        ramp's value.

        A captured step has them built in; it is captured again where they change.
        """
        return ()

    @abstractmethod
    def inner(self, nets: Networks, batch: Batch) -> Inner:
        """State the inner problem of `batch` (images (N, C, H, W) in [0, 1], labels (N,) int64)."""

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        """The attacked images: the engine's PGD on the goal, the clean ones without a goal; or a search of
        the method's own.

        Runs outside autocast; what it returns, which may be more than an `AttackResult`, goes to `outer`.
        """
        return unattacked(batch.x) if inner.goal is None else attack(batch.x, inner.goal)

    @abstractmethod
    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        """State the losses on what `perturb` returned."""

    def awp_loss(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Tensor:
        """What weight perturbation drives up: the model's own loss. `nets.model` leaves its running
        statistics alone here.
        """
        return self.outer(nets, batch, inner, attacked).losses["model"]

    def after_attack(self, nets: Networks, batch: Batch, attacked: AttackResult) -> None:
        """Called once `perturb` is done, before weights are perturbed; for passes that only move running
        statistics.
        """

    def after_update(self, nets: Networks, batch: Batch) -> None:
        """Called after the update, when perturbed weights are back; for passes that only move running
        statistics.
        """

    def after_backward(self, batch: Batch, attacked: AttackResult, attack: Attacker) -> None:
        """Called between backward pass and update; may change `buffers` in place."""


# The keys of the attack that only training has a use for.
TRAINING_ATTACK = ("steps", "early_steps", "step_size", "start", "attack_bn")


def unattacked(x: Tensor) -> AttackResult:
    """The images x, as the result of no attack."""
    import torch  # not above: the command line reads the options of methods without it

    from fastdynat.attacks import AttackResult

    zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return AttackResult(x, zeros.sum(), 0, kept=zeros)


def check_method(method: Any) -> None:
    """Raise UserError unless `method` is a subclass of `Method` whose options are a frozen dataclass."""
    name = getattr(method, "__name__", repr(method))
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(f"{name} is not a subclass of fastdynat.methods.Method")
    options = getattr(method, "options_type", None)
    parameters = getattr(options, "__dataclass_params__", None)
    if not isinstance(options, type) or parameters is None or not parameters.frozen:
        raise UserError(f"{name}.options_type must be a dataclass with frozen=True, which holds its options")
