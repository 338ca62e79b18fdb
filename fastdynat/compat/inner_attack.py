"""The inner maximisation of the published loss functions, on a cached replica of the model."""

import threading
import weakref
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.input_checks import (
    InputCheck,
    as_labels,
    check_label_rows,
    check_model,
    check_number,
)
from fastdynat.attack_engine.lengths import length as length_of
from fastdynat.attack_engine.lengths import per_image
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks import AttackResult
from fastdynat.compat.replica_cache import ReplicaCache, unwrapped
from fastdynat.compat.runner import Runner
from fastdynat.compat.speed_options import Speed, check_speed, hashable
from fastdynat.errors import UserError, unknown_name
from fastdynat.models.logits import HALF, own_dtype

NORMS = {"l_inf": "linf", "l_2": "l2"}

# By model, then by options. The values do not hold the model, so the script's last reference frees it.
_replicas: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[ReplicaCache, InputCheck]]] = (
    weakref.WeakKeyDictionary()
)
_replicas_lock = threading.Lock()
MOST = 4  # options per model: a script that makes new ones at every call keeps no more replicas than this


def refresh(model: nn.Module) -> None:
    """Drop the loss functions' replicas of `model`; their next call makes new ones.

    Needed only after a change that is invisible in the model's Python objects and moves its logits by less
    than a thousandth, such as a different gradient in a compiled extension.
    """
    for cache, _ in _replicas.get(unwrapped(model), {}).values():
        cache.forget()


class InnerAttack:
    """The attack on one batch, of a model in eval mode, from ``x + 0.001 N(0, I)``.

    Attributes:
        labels: `y` on the images' device, as int64 classes, or probabilities in the images' dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        step_size: float,
        epsilon: float,
        perturb_steps: int,
        distance: str,
        speed: Speed,
        one_class: str = "",
    ) -> None:
        """Check the arguments and bring the model's replica up to date.

        Args:
            x: (N, C, H, W) float32 or float64 images in [0, 1].
            y: (N,) integer classes, or (N, K) probabilities.
            step_size: of "l_inf", in pixel units; "l_2" steps by 2 * epsilon / perturb_steps.
            epsilon: radius in pixel units; 0 returns the images.
            one_class: name of the loss, where its labels cannot be probabilities.
            speed: options of the engine; without "amp" the attack runs in the precision of the caller's
                autocast region.

        Raises:
            UserError: images, labels or numbers that do not fit; the message names the remedy.
        """
        check_speed(one_class or "trades_loss", speed)
        if distance not in NORMS:
            raise unknown_name("distance", distance, NORMS)
        check_model(model)
        check_number("epsilon", epsilon)
        self._spec = None
        if epsilon != 0:
            self._spec = PGDSpec(epsilon, step_size, perturb_steps, norm=NORMS[distance], start="gaussian")
        _check_images(model, x)
        self.labels = as_labels(y, x)
        if one_class and self.labels.dim() != 1:
            raise UserError(
                f"{one_class} needs y to be one class per image, got shape {tuple(self.labels.shape)}"
            )
        cache, check = _replica_cache(model, x, speed)
        # Copies, and made here: inference tensors cannot be saved for a backward pass.
        with torch.inference_mode(False):
            self._x = x.detach().clone()
            self._runner = cache.runner(model, self._x)
        check_label_rows(self.labels, cache.classes)
        check(self._x, self.labels, cache.classes)
        self._x.clamp_(0, 1)
        self._watch = cache.watch

    def from_own_prediction(self) -> Tensor:
        """The images that maximise KL(p(x) || p(x'))."""
        with torch.inference_mode(False), torch.no_grad():
            log_p = self._runner.logits(self._x).to(self._x.dtype).log_softmax(1)
        return self._run(AttackGoal("kl", log_p))

    def from_classes(self, classes: Tensor) -> Tensor:
        """The images that maximise the cross-entropy to `classes`, (N,) int64."""
        return self._run(AttackGoal("ce", classes))

    def _run(self, goal: AttackGoal) -> Tensor:
        """The adversarial images, detached, in the memory format of the images."""
        with torch.inference_mode(False), torch.enable_grad():
            if self._spec is None:
                return self._x.clone()
            ascend = _ascend_l2 if self._spec.norm == "l2" else _ascend_linf
            result = ascend(self._runner, self._x, goal, self._spec)
            self._watch(result)
            return torch.empty_like(self._x).copy_(result.x_adv)


def _replica_cache(model: nn.Module, x: Tensor, speed: Speed) -> tuple[ReplicaCache, InputCheck]:
    device = x.device.type
    if "amp" not in speed and torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        speed = {**speed, "amp": torch.get_autocast_dtype(device)}
    key = hashable(speed)
    with _replicas_lock:
        caches = _replicas.setdefault(unwrapped(model), {})
        known = caches.pop(key) if key in caches else (ReplicaCache(**speed), InputCheck())
        caches[key] = known  # the latest is last
        if len(caches) > MOST:
            del caches[next(iter(caches))]
        return known


def _check_images(model: nn.Module, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise UserError(
            f"x_natural must be a tensor (N, C, H, W), got {type(x).__name__}; use torch.as_tensor"
        )
    half = (
        "; leave images and model in float32 and call under torch.autocast, "
        "or with amp=True for the attack alone"
    )
    if x.dtype not in (torch.float32, torch.float64) or x.dim() != 4:
        remedy = half if x.dtype in HALF else "; images.float() / 255" if x.dtype == torch.uint8 else ""
        raise UserError(
            f"x_natural must be float32 or float64 (N, C, H, W) in [0, 1], got {x.dtype} "
            f"{tuple(x.shape)}{remedy}"
        )
    if own_dtype(model) in HALF:
        raise UserError(f"images are {x.dtype} and the model {own_dtype(model)}{half}")


def _ascend_linf(runner: Runner, x: Tensor, goal: AttackGoal, spec: PGDSpec) -> AttackResult:
    return runner.run(x, goal, spec)


def _ascend_l2(runner: Runner, x: Tensor, goal: AttackGoal, spec: PGDSpec) -> AttackResult:
    """TRADES' L2 attack: SGD on the perturbation with unit gradients, clipped to [0, 1], then to the ball.

    `attack_step_l2` projects in the other order. A vanished gradient is replaced by noise.
    """
    delta = start_point(x, spec.start, norm=spec.norm, eps=spec.eps) - x
    zeros = torch.zeros((), dtype=torch.int64, device=x.device)
    for _ in range(spec.steps):
        grad = runner.gradient(x + delta, goal).to(x.dtype)
        length = per_image(length_of(grad, "l2"), grad)
        zeros = zeros + (~(length > 0)).sum()
        ascent = torch.where(length > 0, grad / length, torch.randn_like(grad))
        delta = (x + delta + 2 * spec.eps / spec.steps * ascent).clamp(0, 1) - x
        delta = delta.renorm(2, 0, spec.eps)
    return AttackResult((x + delta).clamp(0, 1), zeros, len(x) * spec.steps)
