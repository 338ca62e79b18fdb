"""SGD whose momentum is a tensor, as its rate is: a captured step reads both anew at each replay."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD


class CycledSGD(SGD):
    """torch's SGD with `momentum` from a scalar tensor, which its own implementations take as a number of Python only.

    State and checkpoints are those of `SGD`; every parameter's ``momentum_buffer`` must be there before the first step. Not
    fused: one pass per operation, which is a small share of an update with an attack before it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, [self.state[p]["momentum_buffer"] for p in parameters], group)

    def _update(self, parameters: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
        moves = [p.grad for p in parameters]
        if group["weight_decay"] != 0:
            moves = torch._foreach_add(moves, parameters, alpha=group["weight_decay"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, moves)
        if group["nesterov"]:
            moves = torch._foreach_add(moves, torch._foreach_mul(buffers, group["momentum"]))
        else:
            moves = buffers
        torch._foreach_sub_(parameters, torch._foreach_mul(moves, group["lr"]))
