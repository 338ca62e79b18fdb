"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), with a learning rate that a captured step reads."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Steps of size `lr` along the sign of a momentum.

    ``p -= lr * (sign(b1 m + (1 - b1) g) + weight_decay * p)``, then ``m = b2 m + (1 - b2) g``. torch has no
    Lion. Every parameter needs its ``exp_avg`` before the first step. A few passes per parameter, not one: a
    small share of an update with an attack before it.

    Args:
        params: parameters or groups of them.
        lr: scalar tensor on the parameters' device, read at each step.
        betas: (b1, b2), in [0, 1).
    """

    def __init__(self, params: Any, lr: Tensor, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            if gradients:
                self._update([*gradients], [*gradients.values()], group)

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        momenta, (b1, b2), lr = [self.state[p]["exp_avg"] for p in parameters], group["betas"], group["lr"]
        directions = [*torch._foreach_lerp(momenta, gradients, 1 - b1)]
        torch._foreach_sign_(directions)
        if group["weight_decay"] != 0:
            torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
        torch._foreach_add_(parameters, [*torch._foreach_mul(directions, -lr)])
        torch._foreach_lerp_(momenta, gradients, 1 - b2)
