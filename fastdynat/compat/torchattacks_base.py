"""Base of the torchattacks-compatible attacks: their modes, normalisation and attributes, on our engine."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.input_checks import (
    InputCheck,
    as_labels,
    check_label_rows,
    check_model,
    check_number,
    check_targets,
    slack,
)
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.compat.replica_cache import ReplicaCache
from fastdynat.compat.runner import Runner, TrainingModes
from fastdynat.compat.speed_options import Speed, check_speed
from fastdynat.errors import UserError
from fastdynat.models.logits import with_output

TargetMap = Callable[[Tensor, Tensor | None], Tensor]


class TorchAttack(ABC):
    """Base of the attacks; `Speed` lists the arguments that torchattacks does not have.

    The attack runs on a replica of the model where one can be made (`ReplicaCache`); call `refresh` after a
    change that the cache cannot see.

    Attributes:
        model: the attacked network. It, eps, alpha, steps and the like may be changed between calls.
        attack_mode: "default" or "targeted(...)"; see the ``set_mode`` functions.
        targeted: the attack aims at a class.
        supported_mode: "default", and "targeted" where the attack has it.
        normalization_used: {"mean": ..., "std": ...} as (1, C, 1, 1) tensors, or None.
    """

    supported_mode: tuple[str, ...] = ("default", "targeted")

    def __init__(self, name: str, model: nn.Module, **speed: Unpack[Speed]) -> None:
        check_speed(name, speed)
        self._cache = ReplicaCache(**speed)
        self.attack = name
        self.set_model(model)
        self.attack_mode, self.targeted = "default", False
        self.normalization_used: dict[str, Tensor] | None = None
        self._target_map: TargetMap = _given
        self._modes, self._kth_min = TrainingModes(), 1
        self._device: torch.device | None = None
        self._check = InputCheck("tell the attack how: set_normalization_used(mean, std)")
        if self.model_name == "RobModel":  # MAIR's, which says how its images are normalised
            mean, std = (
                torch.as_tensor(getattr(model, key, default))
                for key, default in (("mean", 0.0), ("std", 1.0))
            )
            if bool((mean != 0).any() or (std != 1).any()):
                self.set_normalization_used(mean.flatten(), std.flatten())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_runner"}

    def refresh(self) -> None:
        """Drop the replica; the next call makes a new one."""
        self._cache.forget()

    @property
    def path(self) -> str:
        """The attack's execution in words, with the modes given up; known from the first call on."""
        return self._cache.path

    @property
    def device(self) -> torch.device | None:
        """The device of the attack: as set by `set_device`, else the model's."""
        some = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)
        return self._device or (None if some is None else some.device)

    def set_device(self, device: torch.device | str) -> None:
        self._device = torch.device(device)

    def set_model(self, model: nn.Module) -> None:
        check_model(model)
        self.model, self.model_name = model, type(model).__name__

    def set_normalization_used(self, mean: Any, std: Any) -> None:
        """Take and return images normalised as ``(x - mean) / std``, C numbers each.

        eps and alpha stay in pixel units.
        """
        pair = {"mean": torch.as_tensor(mean), "std": torch.as_tensor(std)}
        if (
            pair["mean"].dim() != 1
            or pair["mean"].shape != pair["std"].shape
            or not bool((pair["std"] > 0).all())
        ):
            raise UserError(f"mean and std must be one number per channel, std above 0, got {mean} and {std}")
        self.normalization_used = {key: value.float().view(1, -1, 1, 1) for key, value in pair.items()}
        self.refresh()

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Attack the model in train mode; its batch norms and dropouts stay in eval mode unless asked for.

        The attack then runs on the model itself, eagerly. Batch norm in train mode updates its running
        statistics.
        """
        if (batchnorm_training or dropout_training) and not model_training:
            self._cache.warn(
                "batchnorm_training and dropout_training have no effect without model_training=True, as in "
                "torchattacks"
            )
        self._modes = TrainingModes(model_training, batchnorm_training, dropout_training)

    def get_mode(self) -> str:
        return self.attack_mode

    def set_mode_default(self) -> None:
        self.attack_mode, self.targeted = "default", False

    def set_mode_targeted_by_function(self, target_map_function: TargetMap, quiet: bool = False) -> None:
        """Aim at ``target_map_function(images, labels)``, given images in [0, 1] on the attack's device."""
        if not callable(target_map_function):
            raise UserError(
                "target_map_function must be callable; set_mode_targeted_by_label takes the labels themselves"
            )
        self._set_mode_targeted("targeted(custom)", target_map_function)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Aim at a random class for each image, other than its label."""
        self._set_mode_targeted("targeted(random)", self._random_target)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Aim at the class with the `kth_min`-th lowest logit, the label left out."""
        if kth_min < 1:
            raise UserError(f"kth_min must be >= 1, got {kth_min}")
        self._kth_min = kth_min
        self._set_mode_targeted("targeted(least-likely)", self._least_likely_target)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Take the labels of the call as the targets."""
        self._set_mode_targeted("targeted(label)", _given)

    def _set_mode_targeted(self, mode: str, target_map: TargetMap) -> None:
        if "targeted" not in self.supported_mode:
            raise UserError(
                f"{self.attack} has no targeted mode; supported: {', '.join(self.supported_mode)}"
            )
        self.attack_mode, self.targeted, self._target_map = mode, True, target_map

    def get_logits(self, inputs: Tensor) -> Tensor:
        """The model's logits at images as a call takes them, in the model's current mode."""
        return with_output(self.model, self._cache.output)(inputs)

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Attack a batch.

        Args:
            inputs: (N, C, H, W) float images in [0, 1], or normalised as `set_normalization_used` says; moved
                to `device`.
            labels: (N,) classes, or (N, K) probabilities; also as a list or a numpy array.

        Returns:
            Images like `inputs` in dtype, memory format and normalisation, detached, on `device`.

        Raises:
            UserError: images, labels or numbers that do not fit; the message names the remedy.
        """
        check_number("eps", self.eps)
        spec = self._spec() if self.eps != 0 else None
        with torch.inference_mode(False), torch.enable_grad():
            x, labels = self._take(inputs, labels)
            runner = self._runner = self._cache.runner(self.model, x, self._modes, self.normalization_used)
            check_label_rows(labels, self._cache.classes)
            self._check(x, labels, self._cache.classes, within=slack(inputs.dtype))
            x.clamp_(0, 1)
            if spec is not None and len(x):
                goal = self._goal(runner, x, labels)
                result = runner.run(x, goal, spec, x_start=self._start(x, spec))
                self._cache.watch(result, self._modes)
                x = result.x_adv
            return self._give(x, inputs)

    def __repr__(self) -> str:
        shown: dict[str, Any] = {
            "model_name": self.model_name,
            "device": self.device,
            "attack_mode": self.attack_mode,
        }
        shown |= {"targeted": self.targeted, "normalization_used": self.normalization_used is not None}
        hidden = {"attack", "model", *shown}
        shown |= {
            key: value for key, value in vars(self).items() if key not in hidden and not key.startswith("_")
        }
        shown |= {"amp": self._cache.amp} if self._cache.amp else {}
        return f"{self.attack}({', '.join(f'{key}={value}' for key, value in shown.items())})"

    _runner: Runner  # of the latest call

    # Filled in by the attacks.
    eps: float

    @abstractmethod
    def _spec(self) -> PGDSpec: ...

    def _goal(self, runner: Runner, x: Tensor, labels: Tensor | None) -> AttackGoal:
        if labels is None:
            raise UserError(f"{self.attack} needs labels: attack(images, labels)")
        if not self.targeted:
            return AttackGoal("ce", labels)
        with self._modes(self.model):
            target = as_labels(self._target_map(x, labels), x)
        if self.attack_mode == "targeted(custom)" and target.dim() == 1:
            check_targets(target, self._cache.classes)
        return AttackGoal("ce", target, targeted=True)

    def _start(self, x: Tensor, spec: PGDSpec) -> Tensor | None:
        return None

    def _take(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Copies of images and labels on the device; the images in [0, 1] and at least float32."""
        if not isinstance(inputs, Tensor):
            raise UserError(
                f"images must be a tensor (N, C, H, W), got {type(inputs).__name__}; use torch.as_tensor"
            )
        if not inputs.is_floating_point() or inputs.dim() != 4:
            remedy = "; images.float() / 255" if inputs.dtype == torch.uint8 else ""
            raise UserError(
                f"images must be floats (N, C, H, W) in [0, 1], got {inputs.dtype} "
                f"{tuple(inputs.shape)}{remedy}"
            )
        device = self.device or inputs.device
        wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        x = inputs.detach().to(device, wide, copy=True)
        if self.normalization_used is not None:
            x = x * self.normalization_used["std"].to(device) + self.normalization_used["mean"].to(device)
        return x, None if labels is None else as_labels(labels, x)

    def _give(self, x: Tensor, inputs: Tensor) -> Tensor:
        if self.normalization_used is not None:
            x = (x - self.normalization_used["mean"].to(x.device)) / self.normalization_used["std"].to(
                x.device
            )
        return torch.empty_like(inputs, device=x.device, requires_grad=False).copy_(x)

    def _other_logits(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Eval-mode logits (N, K) with infinity at the labels."""
        if labels is None or labels.dim() != 1:
            raise UserError(f"{self.attack_mode} needs labels that are classes")
        with torch.no_grad():
            return self._runner.eval_logits(x).scatter(1, labels[:, None], float("inf"))

    def _random_target(self, x: Tensor, labels: Tensor | None) -> Tensor:
        others = self._other_logits(x, labels).isfinite()
        # torchattacks draws the n-th of the other classes, in their order.
        nth = (torch.rand(len(x), device=x.device) * (others.shape[1] - 1)).long()
        return (others.cumsum(1) == nth[:, None] + 1).int().argmax(1)

    def _least_likely_target(self, x: Tensor, labels: Tensor | None) -> Tensor:
        logits = self._other_logits(x, labels)
        if self._kth_min >= logits.shape[1]:
            raise UserError(
                f"kth_min must be below the number of classes, {logits.shape[1]}, got {self._kth_min}"
            )
        return logits.kthvalue(self._kth_min, dim=1).indices


def _given(images: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return labels
