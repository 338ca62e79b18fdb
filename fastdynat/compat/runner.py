"""Runners of an attack: the engine on a replica of the model, or the model itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.pgd import run_pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.compat.turns import Turns


class Runner(Protocol):
    """Computes attacks on a network in a fixed mode. The caller sets grad mode."""

    @property
    def path(self) -> str:
        """The attack's execution in words."""

    def refresh(self) -> None:
        """Take over the model's current weights and statistics."""

    def logits(self, x: Tensor) -> Tensor:
        """The logits that the attack sees at images in [0, 1]."""

    def eval_logits(self, x: Tensor) -> Tensor:
        """The same in eval mode."""

    def gradient(self, x: Tensor, goal: AttackGoal) -> Tensor:
        """The goal's gradient at images in [0, 1], up to a positive factor per image."""

    def run(
        self, x: Tensor, goal: AttackGoal, spec: PGDSpec, *, x_start: Tensor | None = None
    ) -> AttackResult:
        """`run_pgd`."""


class OnReplica(AttackEngine):
    """The fast path, in eval mode.

    Threads and streams take turns: a refresh overwrites tensors that an attack has saved for its backward
    pass.
    """

    compares = True  # an evaluation calls it for every batch with the same weights

    def __init__(self, model: nn.Module, example: Tensor, **kwargs: Any) -> None:
        self._turn = Turns(example.device)
        with self._turn():
            super().__init__(model, example, **kwargs)

    def refresh(self) -> None:
        with self._turn():
            super().refresh()

    def logits(self, x: Tensor) -> Tensor:
        with self._turn():
            return super().logits(x)

    eval_logits = logits

    def gradient(self, x: Tensor, goal: AttackGoal) -> Tensor:
        with self._turn():
            return super().gradient(x, goal)

    def run(self, *args: Any, **kwargs: Any) -> AttackResult:
        with self._turn():
            return super().run(*args, **kwargs)


@dataclass(frozen=True)
class TrainingModes:
    """The modules in train mode during an attack, as torchattacks' ``set_model_training_mode`` names them."""

    model: bool = False
    batchnorm: bool = False
    dropout: bool = False

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Set the modes as torchattacks does, and restore each module's own flag."""
        with attack_mode(model, "eval"):  # which also restores
            if self.model:
                model.train()
                for module in model.modules():
                    name = type(module).__name__
                    if ("BatchNorm" in name and not self.batchnorm) or (
                        "Dropout" in name and not self.dropout
                    ):
                        module.eval()
            yield


@dataclass(frozen=True)
class OnModel:
    """The model itself, eagerly, in any modes: where no replica can be made.

    Batch norm in train mode updates the model's running statistics at every forward pass, as under
    torchattacks.
    """

    model: nn.Module
    modes: TrainingModes
    dtype: torch.dtype | None
    rescale: bool | None = None

    @property
    def path(self) -> str:
        state = "train" if self.modes.model else "eval"
        return (
            f"{str(self.dtype or 'eager').removeprefix('torch.')} attack on the model itself in {state} mode"
        )

    def refresh(self) -> None:
        """Do nothing: there is no copy."""

    def logits(self, x: Tensor) -> Tensor:
        with self.modes(self.model):
            return self._ascent.logits(x)

    def eval_logits(self, x: Tensor) -> Tensor:
        with attack_mode(self.model, "eval"):
            return self._ascent.logits(x)

    def gradient(self, x: Tensor, goal: AttackGoal) -> Tensor:
        with self.modes(self.model):
            return self._ascent.gradient(self._ascent.to_model_input(x), goal)

    def run(
        self, x: Tensor, goal: AttackGoal, spec: PGDSpec, *, x_start: Tensor | None = None
    ) -> AttackResult:
        with self.modes(self.model):
            return run_pgd(self._ascent, x, goal, spec, x_start=x_start)

    @property
    def _ascent(self) -> Ascent:
        # Images may depend on each other in train mode.
        guard = Underflow.guard("train" if self.modes.model else "eval", self.dtype, self.rescale)
        return Ascent(self.model, guard, self.dtype)


class Normalized(nn.Module):
    """`model`, which takes normalised images, as a network of images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> logits; the model gets the dtype that comes in."""
        return self.model(((x - self.mean) / self.std).to(x.dtype))
