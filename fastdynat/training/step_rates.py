"""Learning rate and momentum of each update, in tensors that a captured step reads anew."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class StepRates:
    """Rates by number of the update.

    Attributes:
        lr, momentum: scalar tensors on the device, which `write` fills.
        momentum_at: the momentum of an update; None where it is not cycled.
    """

    def __init__(
        self,
        learning_rate: Callable[[int], float],
        momentum: float,
        momentum_at: Callable[[int], float] | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            learning_rate: by number of the update, counted from 0.
            momentum: where it is not cycled.
        """
        # The fused update reads float32 on CUDA devices, and anything on the CPU.
        exact = torch.float32 if device.type == "cuda" else torch.float64
        self.lr = torch.zeros((), dtype=exact, device=device)
        self.momentum = torch.full_like(self.lr, momentum)
        self.momentum_at, self._learning_rate = momentum_at, learning_rate

    def write(self, update: int, optimizers: Iterable[Optimizer]) -> None:
        """Fill the tensors for update number `update`, without waiting for the device."""
        self.lr.fill_(self._learning_rate(update))
        if self.momentum_at is not None:
            self.momentum.fill_(self.momentum_at(update))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = self.lr  # loading a state has put another tensor there
            if self.momentum_at is not None:
                group["momentum"] = self.momentum

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"of learning": self.lr, "of momentum": self.momentum}
