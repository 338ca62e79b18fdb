"""SGD with momentum and learning rate in tensors, which a captured step reads at each replay."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD


class CycledSGD(SGD):
    """torch's SGD with a scalar tensor for `momentum`; torch's own takes a Python number only.

    State and checkpoints are those of `SGD`; every parameter needs its ``momentum_buffer`` before the first
    step. Not fused: the extra passes are a small share of an update with an attack before it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            if gradients:
                self._update([*gradients], [*gradients.values()], group)

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        if group["weight_decay"] != 0:
            gradients = [*torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        moves = buffers
        if group["nesterov"]:
            moves = [*torch._foreach_mul(buffers, group["momentum"])]
            torch._foreach_add_(moves, gradients)
        torch._foreach_add_(parameters, [*torch._foreach_mul(moves, -group["lr"])])
