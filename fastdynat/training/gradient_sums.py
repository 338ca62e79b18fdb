"""Sums of gradients over the ranks: one flat collective per trained network and update."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastdynat.distributed import World
from fastdynat.distributed.flat import FlatSum, flat_sum, start_flat_sum
from fastdynat.errors import UserError


class GradientSums:
    """Replaces the gradients of networks by their sums over the ranks of `world`.

    Each rank's loss is weighted by its share of the batch, so the sum is the gradient of the global batch's
    mean. The guide's sum is begun beside the attack (`begin`); `finish` waits for it and sums the rest. A
    parameter without gradient must have none on any rank, which the first update makes sure of: flat sums of
    different sizes would be wrong, or wait for ever."""

    def __init__(self, networks: Iterable[nn.Module], world: World) -> None:
        self._world = world
        self._parameters = {id(module): [*module.parameters()] for module in networks}
        self._begun: list[tuple[list[nn.Parameter], list[Tensor], FlatSum]] = []
        self._agreed: set[int] = set()

    def begin(self, module: nn.Module) -> None:
        """Begin to sum the present gradients of `module`; its later ones are added to the sum."""
        if self._world.alone:
            return
        self._agree(id(module), self._parameters[id(module)])
        held = [p for p in self._parameters[id(module)] if p.grad is not None]
        grads = [p.grad for p in held if p.grad is not None]
        self._begun.append((held, grads, start_flat_sum(grads, self._world)))
        for parameter in held:
            parameter.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """Every gradient is the sum over the ranks afterwards."""
        if self._world.alone:
            return
        for key, parameters in self._parameters.items():
            self._agree(-key, parameters)
            flat_sum([p.grad for p in parameters if p.grad is not None], self._world)
        for held, grads, pending in self._begun:
            pending.finish()
            for parameter, grad in zip(held, grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._begun = []

    def _agree(self, moment: int, parameters: list[nn.Parameter]) -> None:
        """Refuse ranks with gradients of other weights, at the first update, which is never captured."""
        if moment in self._agreed:
            return
        self._agreed.add(moment)
        own = [number for number, parameter in enumerate(parameters) if parameter.grad is not None]
        told = self._world.gather(own)
        if any(other != told[0] for other in told):
            counts = ", ".join(f"rank {rank}: {len(other)}" for rank, other in enumerate(told))
            raise UserError(
                f"the processes have gradients of different weights ({counts} of {len(parameters)}): a "
                "network or method that skips layers at random or for some images cannot train on several "
                "processes; add 0 times those layers' outputs, or use one process"
            )

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace other gradients, those of weight perturbation, by their sums over the ranks."""
        flat_sum(tensors, self._world)
