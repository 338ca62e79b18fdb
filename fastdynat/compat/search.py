"""The inner maximisation of the published loss functions, on an attack engine that follows the model."""

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from fastdynat.attacks import AttackGoal, PGDSpec
from fastdynat.attacks.steps import start_point
from fastdynat.compat.checks import RangeCheck, as_labels
from fastdynat.compat.following import Following, Speed, unwrapped
from fastdynat.compat.runner import Runner
from fastdynat.errors import UserError, unknown_name

NORMS = {"l_inf": "linf", "l_2": "l2"}

# By model, then by what was asked for. The values do not hold the model, so it goes when its script lets go of it.
_followed: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Following, RangeCheck]]] = weakref.WeakKeyDictionary()


def refresh(model: nn.Module) -> None:
    """Let the loss functions make their replicas of `model` anew at their next call.

    Needed only after a change that neither shows in the model's Python objects nor moves its logits by a thousandth, such as
    another gradient of a compiled extension.
    """
    for following, _ in _followed.get(unwrapped(model), {}).values():
        following.forget()


class Search:
    """One batch's search for adversarial images, of a model in eval mode, from ``x + 0.001 N(0, I)``.

    Attributes:
        labels: `y` beside the images, as int64 classes, or probabilities in the images' dtype.
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
    ) -> None:
        """Check everything and bring the model's replica up to date.

        Args:
            x: (N, C, H, W) float32 or float64 images in [0, 1].
            y: (N,) integer classes, or (N, K) probabilities.
            step_size: of "l_inf", in pixel units; "l_2" steps by 2 * epsilon / perturb_steps.
            epsilon: radius in pixel units; 0 searches nothing.
            speed: keywords of ours; without "amp" the attack is in the precision of the caller's autocast region.

        Raises:
            UserError: what cannot be attacked, with the remedy.
        """
        if distance not in NORMS:
            raise unknown_name("distance", distance, NORMS)
        self._spec = None
        if epsilon != 0:
            self._spec = PGDSpec(epsilon, step_size, perturb_steps, norm=NORMS[distance], start="gaussian")
        _check_images(x)
        self.labels = as_labels(y, x)
        following, check = _following(model, x, speed)
        # Copies, and made here: inference tensors cannot be saved for a backward pass.
        with torch.inference_mode(False):
            self._x = x.detach().clone()
            self._runner = following.runner(model, self._x)
        check(self._x, self.labels if self.labels.dim() == 1 else None, following.classes)

    def from_own_prediction(self) -> Tensor:
        """The images that maximise KL(p(x) || p(x'))."""
        with torch.inference_mode(False), torch.no_grad():
            log_p = self._runner.logits(self._x).to(self._x.dtype).log_softmax(1)
        return self._run(AttackGoal("kl", log_p))

    def from_classes(self, classes: Tensor) -> Tensor:
        """The images that maximise the cross-entropy to `classes`, (N,) int64."""
        return self._run(AttackGoal("ce", classes))

    def _run(self, goal: AttackGoal) -> Tensor:
        """Images like those given, detached."""
        with torch.inference_mode(False), torch.enable_grad():
            if self._spec is None:
                x_adv = self._x.clamp(0, 1)
            elif self._spec.norm == "linf":
                x_adv = self._runner.run(self._x, goal, self._spec).x_adv
            else:
                x_adv = _ascend_l2(self._runner, self._x, goal, self._spec)
            return torch.empty_like(self._x).copy_(x_adv)


def _following(model: nn.Module, x: Tensor, speed: Speed) -> tuple[Following, RangeCheck]:
    device = x.device.type
    if "amp" not in speed and torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        speed = {**speed, "amp": torch.get_autocast_dtype(device)}
    followed = _followed.setdefault(unwrapped(model), {})
    key = tuple(sorted(speed.items()))
    if key not in followed:
        followed[key] = Following(**speed), RangeCheck("make their normalisation the model's first layer")
    return followed[key]


def _check_images(x: Tensor) -> None:
    if x.dtype in (torch.float32, torch.float64) and x.dim() == 4:
        return
    remedy = "; images.float() / 255" if x.dtype == torch.uint8 else ""
    if x.dtype in (torch.float16, torch.bfloat16):
        remedy = "; leave images and model in float32 and call under torch.autocast, or with amp=True for the attack alone"
    raise UserError(f"x_natural must be float32 or float64 (N, C, H, W) in [0, 1], got {x.dtype} {tuple(x.shape)}{remedy}")


def _ascend_l2(runner: Runner, x: Tensor, goal: AttackGoal, spec: PGDSpec) -> Tensor:
    """TRADES' L2 search: SGD on the perturbation with unit gradients, clipped to the pixel range and then to the ball.

    `attack_step_l2` projects in the other order. A vanished gradient is replaced by noise.
    """
    delta = start_point(x, spec.start, norm=spec.norm, eps=spec.eps) - x
    for _ in range(spec.steps):
        grad = runner.gradient(x + delta, goal).to(x.dtype)
        length = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        ascent = torch.where(length > 0, grad / length, torch.randn_like(grad))
        delta = (x + delta + 2 * spec.eps / spec.steps * ascent).clamp(0, 1) - x
        delta = delta.renorm(2, 0, spec.eps)
    return (x + delta).clamp(0, 1)
