"""State that a training step reads and changes besides its batch; its captured graph is checked on it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdynat.execution.graph_check import scaled
from fastdynat.methods import Method
from fastdynat.training.networks import NetworkSet

OTHER_SIZE = 0.01  # pixel units
OTHER_STEPS = 1000  # batches by which the step in the epoch is moved at most


@dataclass(frozen=True)
class StepState:
    """The state of a step, for `fastdynat.execution.graph_check`.

    The weight average and the epoch's sums change after the step, so they are not part of it.

    Attributes:
        method: its buffers are part of the state.
        rates, draws: tensors that each step reads anew.
        sizes: of the attack, as `StepRates.sizes`; read anew, too.
        constants: those of the step that follow from the method's `epoch` and `epoch_step`: a graph is
            replayed where they are equal.
    """

    networks: NetworkSet
    optimizers: list[Optimizer]
    method: Method[Any]
    rates: dict[str, Tensor]
    draws: dict[str, Tensor] = field(default_factory=dict)
    sizes: Tensor | None = None
    constants: Callable[[], tuple[Any, ...]] = tuple

    def state(self) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {f"weight {name}": parameter for name, parameter in self._parameters()}
        for role, module in self.networks.raw.items():
            found |= {f"buffer {role}.{name}": buffer for name, buffer in module.named_buffers()}
        found |= {f"buffer {name}": buffer for name, buffer in self.method.buffers.items()}
        found |= {f"rate {name}": rate for name, rate in self.rates.items()} | self.draws
        found |= {} if self.sizes is None else {"size of the attack": self.sizes}
        names = {id(parameter): name for name, parameter in self._parameters()}
        for parameter, kept in (item for optimizer in self.optimizers for item in optimizer.state.items()):
            found |= {
                f"{key} {names[id(parameter)]}": value
                for key, value in kept.items()
                if isinstance(value, Tensor)
            }
        return found

    def weights(self) -> Sequence[Tensor]:
        return [parameter for _, parameter in self._parameters() if parameter.is_floating_point()]

    def left(self) -> Mapping[str, Tensor]:
        return {f"gradient {name}": p.grad for name, p in self._parameters() if p.grad is not None}

    @torch.no_grad()
    def spoil(self) -> None:
        for tensor in self.networks.attack.replica.own_tensors().values():
            tensor.fill_(torch.nan)

    def restored(self) -> None:
        self.networks.attack.refresh()

    @contextmanager
    def disguised(self) -> Iterator[None]:
        sizes = [] if self.sizes is None else [self.sizes]
        with (
            scaled([*self.rates.values()], 0.5),
            scaled([*self.draws.values()], 3),
            scaled(sizes, 0.5, plus=OTHER_SIZE),  # not 0 where they are 0
            self._at_another_time(),
        ):
            yield

    @contextmanager
    def _at_another_time(self) -> Iterator[None]:
        """A context in another epoch and at another batch of it: the farthest from which a graph would be
        replayed here, by the constants, so that what else follows from them shows.
        """
        method, constants = self.method, self.constants()
        epoch, step = method.epoch, method.epoch_step

        def fits(name: str, number: int) -> bool:
            setattr(method, name, number)
            return self.constants() == constants

        epochs = sorted(range(method.epochs), key=lambda other: -abs(other - epoch))
        steps = range(step + OTHER_STEPS, step, -1)
        try:
            method.epoch = next((other for other in epochs if fits("epoch", other)), epoch)
            method.epoch_step = next((other for other in steps if fits("epoch_step", other)), step)
            yield
        finally:
            method.epoch, method.epoch_step = epoch, step

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for role, module in self.networks.raw.items():
            yield from ((f"{role}.{name}", parameter) for name, parameter in module.named_parameters())
