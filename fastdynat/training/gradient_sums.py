"""Sums of gradients over the ranks: one flat collective per trained network and update."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastdynat.distributed import World
from fastdynat.distributed.flat import FlatSum, flat_sum, start_flat_sum


class GradientSums:
    """Replaces the gradients of networks by their sums over the ranks of `world`.

    Each rank's loss is weighted by its share of the batch, so the sum is the gradient of the global batch's
    mean. The guide's sum is begun beside the attack (`begin`); `finish` waits for it and sums the rest. A
    parameter without gradient has none on any rank, because all ranks run the same program."""

    def __init__(self, networks: Iterable[nn.Module], world: World) -> None:
        self._world = world
        self._parameters = {id(module): [*module.parameters()] for module in networks}
        self._begun: list[tuple[list[nn.Parameter], list[Tensor], FlatSum]] = []

    def begin(self, module: nn.Module) -> None:
        """Begin to sum the present gradients of `module`; its later ones are added to the sum."""
        if self._world.alone:
            return
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
        for parameters in self._parameters.values():
            flat_sum([p.grad for p in parameters if p.grad is not None], self._world)
        for held, grads, pending in self._begun:
            pending.finish()
            for parameter, grad in zip(held, grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._begun = []

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace other gradients, those of weight perturbation, by their sums over the ranks."""
        flat_sum(tensors, self._world)
