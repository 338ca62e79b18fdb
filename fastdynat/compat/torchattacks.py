"""torchattacks' attacks (Kim 2020, arXiv 2010.01950; version 3.5.1) with its signatures, on our engine.

Change one import line: ``from fastdynat import PGD``. Constructors, modes, normalisation, attributes and
results are torchattacks' own; in float32 the images agree with its images to rounding. These differences are
intended:

- the attack runs on a replica of the model (`AttackEngine`), in half precision with ``amp=True``;
- gradients are computed also under ``no_grad`` and ``inference_mode``; the caller's autocast is not
  inherited;
- each module's own train/eval flag is put back, so a frozen batch norm stays frozen;
- `PGDL2` takes a full step however small the gradient is, where torchattacks adds ``eps_for_division`` to its
  norm;
- images outside [0, 1] and labels that are not classes of the model are refused;
- nothing is printed, so ``quiet`` has no effect.

``save``, ``load`` and ``MultiAttack`` are not provided.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.compat.runner import Runner
from fastdynat.compat.speed_options import Speed
from fastdynat.compat.torchattacks_base import TorchAttack


class PGD(TorchAttack):
    """L-inf projected gradient ascent (Madry et al. 2018, arXiv 1706.06083) from a uniformly random start.

    Args:
        model: maps images in [0, 1] to logits (N, K).
        eps: radius in pixel units.
        alpha: step size in pixel units.
        steps: number of steps.
        random_start: start from a uniformly random point of the ball instead of the image.
        speed: `amp`, `compile`, `channels_last`, `graphs`, `fold`, `winograd`, `output`, `rescale` (`Speed`).
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        **speed: Unpack[Speed],
    ) -> None:
        super().__init__("PGD", model, **speed)
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start

    def _spec(self) -> PGDSpec:
        return PGDSpec(self.eps, self.alpha, self.steps, start="uniform" if self.random_start else "none")


class PGDL2(TorchAttack):
    """L2 projected gradient ascent from a point at a random direction and distance. `eps_for_division` has no
    effect.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
        **speed: Unpack[Speed],
    ) -> None:
        super().__init__("PGDL2", model, **speed)
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start
        self.eps_for_division = eps_for_division

    def _spec(self) -> PGDSpec:
        return PGDSpec(
            self.eps, self.alpha, self.steps, norm="l2", start="uniform" if self.random_start else "none"
        )


class FGSM(TorchAttack):
    """One step of size eps from the image (Goodfellow et al. 2015, arXiv 1412.6572)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, **speed: Unpack[Speed]) -> None:
        super().__init__("FGSM", model, **speed)
        self.eps = eps

    def _spec(self) -> PGDSpec:
        return PGDSpec(self.eps, self.eps, 1, start="none")


class FFGSM(TorchAttack):
    """One step of size alpha from a uniformly random start (Wong et al. 2020, arXiv 2001.03994)."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 10 / 255, **speed: Unpack[Speed]
    ) -> None:
        super().__init__("FFGSM", model, **speed)
        self.eps, self.alpha = eps, alpha

    def _spec(self) -> PGDSpec:
        return PGDSpec(self.eps, self.alpha, 1)


class BIM(TorchAttack):
    """L-inf projected gradient ascent from the image (Kurakin et al. 2017, arXiv 1607.02533).

    steps=0 takes the paper's number of steps.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        **speed: Unpack[Speed],
    ) -> None:
        super().__init__("BIM", model, **speed)
        self.eps, self.alpha = eps, alpha
        self.steps = steps or int(min(eps * 255 + 4, 1.25 * eps * 255))

    def _spec(self) -> PGDSpec:
        return PGDSpec(self.eps, self.alpha, self.steps, start="none")


class TPGD(TorchAttack):
    """L-inf ascent of the KL divergence from the clean prediction (Zhang et al. 2019, arXiv 1901.08573).

    Takes no labels.
    """

    supported_mode = ("default",)

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        **speed: Unpack[Speed],
    ) -> None:
        super().__init__("TPGD", model, **speed)
        self.eps, self.alpha, self.steps = eps, alpha, steps

    def _spec(self) -> PGDSpec:
        return PGDSpec(self.eps, self.alpha, self.steps, start="gaussian")

    def _start(self, x: Tensor, spec: PGDSpec) -> Tensor | None:
        return start_point(x, spec.start, norm=spec.norm, eps=spec.eps).clamp(0, 1)

    def _goal(self, runner: Runner, x: Tensor, labels: Tensor | None) -> AttackGoal:
        with torch.no_grad():
            logits = runner.logits(x)
        return AttackGoal("kl", logits.to(x.dtype).log_softmax(1))
