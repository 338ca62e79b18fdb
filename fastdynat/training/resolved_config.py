"""Resolved configuration: the types of `fastdynat.config` after `resolve` has filled them in.

A resolved configuration has the fields of the one that the user wrote, in the same order, so both are stored
alike; the types here say which of them can no longer be "auto" or None. Some stay open on purpose: `graphs`,
`guide_stream` and `fused_conv`, because a run may be resumed on another device; `loader` until
`resolve_loader` and `compile` until `settle_compile`, which need the images.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.config import (
    AttackConfig,
    DataConfig,
    EngineConfig,
    OptimConfig,
    OptionsT,
    Switch,
    TrainConfig,
)
from fastdynat.config.attack_config import norms_of
from fastdynat.methods import Method

GroupT = TypeVar("GroupT")
# TRADES, LBGAT and DYNAT train at 0.031 and are evaluated at 8/255.
PUBLISHED_EPS, EVAL_EPS = 0.031, 8 / 255


@dataclass(frozen=True, kw_only=True)
class ResolvedData(DataConfig):
    """`DataConfig` with augmentation and batch size known."""

    augment: Literal["none", "flip", "crop", "crop-flip"]
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class ResolvedAttack(AttackConfig):
    """`AttackConfig` with every size a number, in [0, 1] pixel units."""

    eps: float
    step_size: float
    steps: int
    start: Literal["none", "uniform", "gaussian"]
    eval_eps: float

    @property
    def ramps(self) -> bool:
        """True if radius or step size change during the run."""
        return self.eps_ramp > 0 or bool(self.step_ramp)

    def radii(self) -> dict[str, float]:
        """The radius of training under each norm, in order."""
        if self.norms is None:
            return {self.norm: self.eps}
        radii = (float(eps) for eps in self.norm_eps.split(","))
        return dict(zip(norms_of(self), radii, strict=True))

    def eval_radii(self) -> dict[str, float]:
        """The radius of evaluation under each norm: `eval_eps` under the first, else as auto is for it."""
        usual = {
            norm: EVAL_EPS if (norm, eps) == ("linf", PUBLISHED_EPS) else eps
            for norm, eps in self.radii().items()
        }
        return usual | {self.norm: self.eval_eps}

    def specs(self) -> tuple[PGDSpec, ...]:
        """The attack of training under each norm; steps are in proportion to the radii.

        Under a ramp, with the final sizes.
        """
        return tuple(
            PGDSpec(
                eps,
                self.step_size if norm == self.norm else self.step_size / self.eps * eps,
                self.steps,
                norm=norm,
                start=self.start,
                algorithm=self.attack,
                target=self.targeted,
            )
            for norm, eps in self.radii().items()
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedOptim(OptimConfig):
    """`OptimConfig` with the number of epochs, the peak learning rate and the weight decay known."""

    epochs: int
    lr: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class ResolvedEngine(EngineConfig):
    """`EngineConfig` for the device that `device` names."""

    amp: Literal["off", "bf16", "fp16"]
    channels_last: Literal["on", "off"]
    fold: Literal["on", "off"]

    @property
    def on_gpu(self) -> bool:
        """True if `device` is a CUDA device."""
        return self.device.startswith("cuda")

    @property
    def uses_fused_conv(self) -> bool:
        """True if the attacked network's convolutions run as cuDNN kernels with bias, residual and ReLU."""
        return switched_on(self.fused_conv, self.on_gpu and self.fold == "on")

    @property
    def uses_graphs(self) -> bool:
        """True if the training step is captured as a CUDA graph, wherever it can be."""
        return switched_on(self.graphs, self.on_gpu)

    def uses_guide_stream(self, method: Method[Any]) -> bool:
        """True if the guide of `method` runs on a separate CUDA stream."""
        return switched_on(self.guide_stream, self.on_gpu and method.uses_guide)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainConfig[OptionsT]):
    """A `TrainConfig` that `resolve` has filled in: what a run computes with, and what it stores."""

    data: ResolvedData
    attack: ResolvedAttack
    optim: ResolvedOptim
    engine: ResolvedEngine


def filled_in(kind: type[GroupT], group: object, **values: object) -> GroupT:
    """`group` as its resolved type `kind`, with `values` in the place of what was automatic."""
    return kind(**{**vars(group), **values})


def switched_on(value: Switch, automatic: bool) -> bool:
    """True if a switch is on, where "auto" means `automatic`."""
    return automatic if value == "auto" else value == "on"
