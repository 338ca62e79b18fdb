"""The attacks of AutoAttack on batches, for `staged.run_stages`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attacks import NamedAttack
from fastdynat.attacks.ball import inside
from fastdynat.evaluation.defences import check_gradients, warn
from fastdynat.evaluation.halving import with_halving
from fastdynat.evaluation.measure import attacked, predict_in_batches
from fastdynat.models.logits import NO_CLASS
from fastdynat.ops.image_draws import ImageDraws


class BatchAttacks:
    """Attacks batches on a replica; the network itself decides whether they are fooled."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        chosen: Sequence[NamedAttack],
        example: Tensor,
        norm: str,
        eps: float,
        seed: int,
        size: int,
    ) -> None:
        self.model, self.norm, self.eps, self.seed, self.size = model, norm, eps, seed, size
        self.device = example.device
        self.stages = {stage.name: stage for stage in chosen}
        plain = Ascent(model, Underflow(rescale=True), allow_no_gradient=True)
        self.ascent = attacked(model, example) if isinstance(model, nn.Module) else plain
        self.lost = 0  # images misclassified by NaN or infinite logits
        self.zero: dict[str, tuple[Tensor, int]] = {}

    def attack(self, name: str, x: Tensor, y: Tensor, numbers: Tensor) -> Tensor:
        """Adversarial images of stage `name`; in smaller batches when memory runs out.

        numbers: (N,) int64, the images' numbers in the evaluated set, by which they draw random numbers.
        """

        def pieces(size: int) -> Tensor:
            self.size = size
            parts = zip(x.split(size), y.split(size), numbers.split(size), strict=True)
            return torch.cat([self._piece(name, *part) for part in parts])

        return with_halving(pieces, self.size)

    def _piece(self, name: str, x: Tensor, y: Tensor, numbers: Tensor) -> Tensor:
        draws = ImageDraws.of(self.seed, numbers, self.device)
        result = self.stages[name].run(self.ascent, x.to(self.device), y.to(self.device), draws=draws)
        zero, gradients = self.zero.get(name, (0, 0))
        self.zero[name] = zero + result.zero_grads, gradients + result.gradients
        return result.x_adv.to(x.device)

    def fooled(self, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(N,) bool: the network misclassifies `x_adv`, which lies in the ball."""
        classes = predict_in_batches(self.model, x_adv, self.size, self.device)
        fooled = (classes != y) & inside(x_adv, x, self.norm, self.eps)
        self.lost += int((fooled & (classes == NO_CLASS)).sum())
        return fooled

    def warn(self) -> None:
        """Warn of images lost to NaN logits and of zero gradients."""
        if self.lost:
            warn(
                f"{self.lost} images count as misclassified because the network's logits are NaN or infinite "
                "at their adversarial images: look for an overflow or a division by 0 in the network"
            )
        for name, (zero, gradients) in self.zero.items():
            check_gradients(name, int(zero), gradients)
