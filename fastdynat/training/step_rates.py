"""Learning rate, momentum and sizes of the attack by update, in tensors that a captured step reads anew."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class StepRates:
    """Rates by number of the update.

    Attributes:
        lr, momentum: scalar tensors on the device, which `write` fills. Groups with an ``lr_scale`` have a
            tensor of their own.
        momentum_at: the momentum of an update; None where it is not cycled.
        sizes: float64 (2,), [eps, step size] of the attack, filled by `write`; None where they do not change.
    """

    def __init__(
        self,
        learning_rate: Callable[[int], float],
        momentum: float,
        momentum_at: Callable[[int], float] | None,
        device: torch.device,
        sizes_at: Callable[[int], tuple[float, float]] | None = None,
    ) -> None:
        """
        Args:
            learning_rate: by number of the update, counted from 0.
            momentum: where it is not cycled.
            sizes_at: (eps, step size) of the attack by number of the update.
        """
        # The fused update reads float32 on CUDA devices, and anything on the CPU.
        exact = torch.float32 if device.type == "cuda" else torch.float64
        self.lr = torch.zeros((), dtype=exact, device=device)
        self.momentum = torch.full_like(self.lr, momentum)
        self.momentum_at, self._learning_rate = momentum_at, learning_rate
        self._scaled: dict[float, Tensor] = {}
        self.sizes = None if sizes_at is None else torch.zeros(2, dtype=torch.float64, device=device)
        self._sizes_at = sizes_at

    def adopt(self, optimizers: Iterable[Optimizer]) -> None:
        """Make a tensor for each `lr_scale` of the optimisers' groups, before a step is captured."""
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            if (scale := group.get("lr_scale", 1.0)) != 1:
                self._scaled.setdefault(scale, torch.zeros_like(self.lr))

    def write(self, update: int, optimizers: Iterable[Optimizer]) -> None:
        """Fill the tensors for update number `update`, without waiting for the device."""
        rate = self._learning_rate(update)
        self.lr.fill_(rate)
        for scale, scaled in self._scaled.items():
            scaled.fill_(rate * scale)
        if self.sizes is not None and self._sizes_at is not None:
            for size, value in zip(self.sizes, self._sizes_at(update), strict=True):
                size.fill_(value)  # a copy from the host would wait for the device
        if self.momentum_at is not None:
            self.momentum.fill_(self.momentum_at(update))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            scale = group.get("lr_scale", 1.0)
            # Loading a state has put another tensor there.
            group["lr"] = self.lr if scale == 1 else self._scaled[scale]
            if self.momentum_at is not None:
                group["momentum"] = self.momentum

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        scaled = {f"of learning times {scale!r}": tensor for scale, tensor in self._scaled.items()}
        return {"of learning": self.lr, "of momentum": self.momentum, **scaled}
