"""The interface of a training method: a min-max problem, stated in two halves.

`inner` states what the attack maximises, `outer` what each network then minimises. Training does the rest:
the attack between the two (a method with its own search overrides `perturb`), backward pass, optimisers,
precision and compilation. Both halves run under autocast. `inner` may pass a graph to `outer` in `Inner`, but
only that of the guide's logits, because weight perturbation changes the model's weights in between.

A step may be captured as a CUDA graph. A method must therefore never synchronise with the device or branch on
the value of a tensor; shapes are fixed, and numbers that Python computes from the epoch are declared in
`constants`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from fastdynat.errors import UserError
from fastdynat.methods.options import MethodOptions, check_options

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
        unmoved: the model in train mode, with parameter gradients but without updating its running
            statistics.
        guide: the second network; None without one. In train mode if the method trains it (DYNAT, LBGAT); the
            same as `guide_eval` if it is frozen.
        guide_eval: the guide's weights in eval mode, without parameter gradients; None without a guide.
    """

    model: Network
    attacked: Network
    unmoved: Network
    guide: Network | None = None
    guide_eval: Network | None = None


@dataclass(frozen=True)
class AttackDefaults:
    """The inner attack that a method was published with, the default of its runs.

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
        guide: the guide's loss on the clean batch and true labels, with its graph; None if not computed.
        dynamic_labels: labels from the guide: (N,) int64 classes, or the guide's logits (N, K).
        losses: scalars with their graph, keyed like `Outer.losses`, that do not depend on the attack. Their
            gradient is taken at once, beside the attack where possible, and `Outer.losses` leaves them out.
    """

    goal: AttackGoal | None
    guide: DynamicLabelLoss | None = None
    dynamic_labels: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    """The outer minimisation of one batch.

    Attributes:
        losses: one scalar with its graph per trained network, keyed "model" and "guide", unless
            `Inner.losses` has it.
        logs: detached scalars; metrics.jsonl has their average over the epoch's images under the same key.
            `logged_mean` makes those of a mean over some of the images.
    """

    losses: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC, Generic[OptionsT]):
    """A training method. Subclasses are one file each and hold tensors in `buffers` only.

    Attributes:
        name: its name on the command line and in tables.
        options_type: a frozen dataclass; its fields are the method's flags and keys. By default it has none.
        uses_guide: whether there is a second network.
        trains: the networks that have losses. A guide that is not among them was trained before and is
            frozen.
        guide_made_by: the method, with its flags, that usually trains a frozen guide.
        guide_settings: keys of the guide's run, and the values that the method needs; a run with others is
            warned of.
        semi_supervised: whether labels may be UNLABELLED.
        attack_defaults: the attack that the method was published with.
        select_by: the validation score that selects the best checkpoint.
        logs_adv_acc: whether `outer` logs train_adv_acc, which `--on-collapse` compares with validation.
        replays: updates per batch, each with both halves and the attack.
        searches: whether there is an attack on the current weights that is separate from the update; weight
            perturbation needs one.
        takes_targets: whether the goal is the cross-entropy with labels, neither tracked nor compared with
            others, so that --targeted can aim at another class.
        attacks: whether training attacks at all.
        takes_any_attack: whether images are attacked only through ``attack(x, goal)``, so that the run may
            choose the attack, such as --attack apgd.
        couples_images: whether the loss of an image depends on other images of the batch, beyond batch norm,
            or batch norm has to see several kinds of images together: then --grad-accum-steps cannot split a
            batch. Sums over the batch cover all processes, by `batch_world`.
        smooths_labels: whether every cross-entropy with labels comes from `fit`, or smooths them by
            `label_smoothing`; if not, --label-smoothing is refused. A class that overrides `inner`, `outer`
            or `awp_loss` has to set it again, and `takes_mixed_labels` too.
        takes_mixed_labels: whether losses and goal accept labels that are probabilities, as `fit` and
            `true_goal` do; if not, MixUp and CutMix are refused.
        label_smoothing: s of --label-smoothing; set before the first step.
        num_classes: K; set before `make_buffers`.
        num_images: number of training images, which `Batch.indices` count from 0; set before `make_buffers`.
        follows_images: whether `buffers` have a row per training image (`methods.image_state`), so that
            --extra-data is refused.
        retains_graph: whether a pass of `nets.model` is differentiated twice, with ``retain_graph=True``.
        follows_ramp: whether the attack follows --eps-ramp and --step-ramp, as that of `Method` does. A class
            that overrides `perturb` or `after_backward` has to set it again, and to read `attack.eps` and
            `attack.step_size` instead of `attack.spec`.
        unused_attack: keys of the attack that training ignores.
        epoch: epochs completed, after the burn-in; set before each epoch.
        epochs: epochs in all, after the burn-in; set before each epoch.
        epoch_step: batches done in this epoch; set before each batch. What a captured step computes from it
            belongs to `constants`.
    """

    name: ClassVar[str]
    options_type: ClassVar[type] = MethodOptions
    uses_guide: ClassVar[bool] = False
    trains: tuple[str, ...] = ("model",)
    guide_made_by: str = "natural"
    semi_supervised: ClassVar[bool] = False
    attack_defaults: ClassVar[AttackDefaults] = AttackDefaults()
    select_by: ClassVar[str] = "val_pgd10_acc"
    logs_adv_acc: ClassVar[bool] = True
    replays: int = 1
    searches: bool = True
    attacks: bool = True
    takes_any_attack: bool = True
    takes_targets: bool = False
    couples_images: bool = False
    follows_ramp: bool = True
    smooths_labels: bool = False
    takes_mixed_labels: bool = False
    label_smoothing: float = 0.0
    num_classes: int = 0
    num_images: int = 0
    follows_images: bool = False
    retains_graph: bool = False
    unused_attack: tuple[str, ...] = ()
    epoch: int = 0
    epochs: int = 1
    epoch_step: int = 0

    def __init__(self, options: OptionsT) -> None:
        """Raises UserError for an option that cannot work."""
        check_options(options)
        self.options = options
        self.guide_settings: dict[str, Any] = {}
        self.buffers: dict[str, Tensor] = {}

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        """Raise UserError for an attack, or its batch norm mode, that the method cannot work with."""

    def check_sync_bn(self, attack_bn: str) -> None:
        """Raise UserError if the method cannot train in processes that share batch norm's statistics."""

    def notes(self, spec: PGDSpec) -> list[str]:
        """Lines for the start of a run about the method under the attack `spec`."""
        return []

    def takes_ramp(self) -> bool:
        """True if the attack follows a ramp: it is that of `Method`, or the class that makes it says so."""
        order = type(self).__mro__
        stated, made = (
            min(n for n, cls in enumerate(order) if not names.isdisjoint(vars(cls)))
            for names in ({"follows_ramp"}, {"perturb", "after_backward"})
        )
        return self.follows_ramp and stated <= made

    def make_buffers(self, x: Tensor) -> dict[str, Tensor]:
        """Tensors to keep from batch to batch, changed in place only; checkpoints hold them.

        x: zeros of a full batch's shape.
        """
        return {}

    def begin_epoch(self) -> None:
        """Update `buffers` in place at the start of the epoch `self.epoch`.

        Called before its first step, and again when a run resumes within it: store in a buffer which epoch
        the values belong to. May wait for the device. ``--resume --epochs N`` calls it on buffers of one
        image and refuses N if, together with `constants`, it gives other values for the epochs so far.
        """

    def begins(self) -> dict[str, float]:
        """Options that say when a part of the method begins: the share of the epochs completed by then."""
        return {}

    def begun(self, option: str) -> bool:
        """True in the epochs that the part of `option` (`begins`) is in; `constants` has to have it."""
        return self.epoch >= first_epoch(self.begins()[option], self.epochs)

    def constants(self) -> tuple[float, ...]:
        """The numbers that the halves compute in Python and that change during a run, such as a ramp's value.

        A captured step has them built in; it is captured again when they change.
        """
        return ()

    @abstractmethod
    def inner(self, nets: Networks, batch: Batch) -> Inner:
        """State the inner problem of `batch` (images (N, C, H, W) in [0, 1], labels (N,) int64)."""

    def fit(self, logits: Tensor, batch: Batch, *, weights: Tensor | None = None) -> DynamicLabelLoss:
        """The cross-entropy of `logits` with the labels of `batch`, smoothed and mixed as the run asks.

        A label y is the distribution (1 - s) y + s / K, with s = `label_smoothing` and K classes; of a mixed
        image, y are its probabilities `Batch.mixed`. Correct predictions are those of `Batch.labels`.

        Args:
            logits: (N, K); gradient flows into them.
            weights: (N,) constant factors of the images' losses; None is 1.
        """
        from fastdynat.ops import dynamic_label_cross_entropy

        return dynamic_label_cross_entropy(
            logits,
            batch.labels if batch.mixed is None else batch.mixed.log(),
            labels=batch.labels,
            weights=weights,
            soft=batch.mixed is not None,
            label_smoothing=self.label_smoothing,
        )

    def true_goal(self, batch: Batch, *, track: bool = False) -> AttackGoal:
        """The cross-entropy with the labels of `batch` as the goal of the attack.

        Labels of one class are not smoothed: the releases smooth them in the loss alone (DM-Improves-AT,
        FastAT_Benchmark). Mixed labels are: timm's Mixup smooths them before the attack sees them
        (revisiting-at, ARES).

        track: as of `AttackGoal`.
        """
        from fastdynat.attack_engine.goal import AttackGoal

        smoothing, labels = self.label_smoothing, batch.targets
        if batch.mixed is not None and smoothing > 0:
            labels = batch.mixed * (1 - smoothing) + smoothing / batch.mixed.shape[1]
        return AttackGoal("ce", labels, track=track)

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        """The attacked images: by default PGD on the goal, or the clean images if there is no goal.

        Runs outside autocast. Its result, which may be a subclass of `AttackResult`, is passed to `outer`.
        What it draws itself comes from `attack.draws`, unless that is None; ``attack.take(rows)`` attacks
        some of the images.
        """
        return unattacked(batch.x) if inner.goal is None else attack(batch.x, inner.goal)

    @abstractmethod
    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        """State the losses on what `perturb` returned."""

    def awp_loss(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Tensor:
        """The loss that weight perturbation maximises: the model's own.

        `nets.model` does not update its running statistics here.
        """
        return self.outer(nets, batch, inner, attacked).losses["model"]

    def after_attack(self, nets: Networks, batch: Batch, attacked: AttackResult) -> None:
        """Update running statistics by further passes after `perturb`, before weights are perturbed."""

    def after_update(self, nets: Networks, batch: Batch) -> None:
        """Update running statistics by passes of the method's own, after the update."""

    def after_backward(self, batch: Batch, attacked: AttackResult, attack: Attacker) -> None:
        """Change `buffers` in place, between backward pass and update."""


SHARE_OF = "share of images in "  # before a log's key: the share of the batch's images that the log is about


def logged_mean(key: str, values: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Logs of the mean of `values` (N,) over the images `chosen` (N,), however many each batch has of them.

    A mean per batch would count a batch with one such image as much as a full one, and one without any as 0.
    So the two logs are sums, over the number N of the batch's images: of the chosen values, and of the chosen
    images. The epoch's mean is the quotient of their averages; an epoch without chosen images logs nothing.
    """
    own = values.detach().double().masked_fill(~chosen, 0)
    return {key: own.mean(), SHARE_OF + key: chosen.double().mean()}


def first_epoch(share: float, epochs: int) -> int:
    """The first of `epochs` epochs, counted from 0, by whose start the share `share` of them is completed."""
    return math.ceil(round(share * epochs, 9))  # 0.55 of 100 epochs is 55.00000000000001 of them


# The attack's keys that matter to training only.
TRAINING_ATTACK = ("steps", "early_steps", "step_size", "start", "attack_bn")


def unattacked(x: Tensor) -> AttackResult:
    """The images x, as the result of no attack."""
    import torch  # not above: the command line reads the options of methods without it

    from fastdynat.attacks import AttackResult

    zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return AttackResult(x, zeros.sum(), 0, kept=zeros)


def check_method(method: Any) -> None:
    """Raise UserError unless `method` is a complete subclass of `Method` with frozen options."""
    name = getattr(method, "__name__", repr(method))
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(f"{name} is not a subclass of fastdynat.methods.Method")
    if missing := sorted(method.__abstractmethods__):
        raise UserError(f"{name} does not define {' and '.join(missing)}, which every method has")
    options: Any = method.options_type
    # Of the class itself: an undecorated subclass of a dataclass would have flags for inherited fields only.
    parameters = vars(options).get("__dataclass_params__") if isinstance(options, type) else None
    if parameters is None or not parameters.frozen:
        got = getattr(options, "__name__", repr(options))
        raise UserError(
            f"{name}.options_type must be a frozen dataclass, got {got}: decorate it with "
            "@dataclass(frozen=True)"
        )
