"""The released DYNAT training loop in plain PyTorch, the baseline of our step.

`lusti-Yu/Dynamic-label` at e079ace, with all its work: float32, contiguous images, start noise made on the
CPU, and the guide run again in every attack step for a label that cannot change. The clean pass, whose result
the release does not use, builds no graph here, which is to the loop's advantage.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

NOISE = 0.001


class PlainDynat:
    """One update of guide and model per call."""

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        *,
        eps: float,
        step_size: float,
        steps: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        draw: Callable[[torch.Size], Tensor] = torch.randn,
    ) -> None:
        """eps, step_size: [0, 1] pixel units, L-inf. draw: normal noise of a shape, for the start."""
        self.model, self.guide = model, guide.train()
        self.eps, self.step_size, self.steps, self.draw = eps, step_size, steps, draw
        self.optimizers = [
            SGD(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
            for network in (model, guide)
        ]

    def attack(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) in [0, 1]. Returns the attacked images, detached."""
        self.model.eval()
        x_adv = x.detach() + NOISE * self.draw(x.shape).to(x)
        for _ in range(self.steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                label = self.guide(x).argmax(1)
                loss = F.cross_entropy(self.model(x_adv), label)
            grad = torch.autograd.grad(loss, [x_adv])[0]
            x_adv = x_adv.detach() + self.step_size * torch.sign(grad.detach())
            x_adv = torch.min(torch.max(x_adv, x - self.eps), x + self.eps)
            x_adv = torch.clamp(x_adv, 0.0, 1.0)
        self.model.train()
        return torch.clamp(x_adv, 0.0, 1.0).detach()

    def __call__(self, x: Tensor, labels: Tensor) -> float:
        """Update on images `x`, (N, C, H, W) in [0, 1], with int64 `labels`, (N,); returns the loss."""
        x_adv = self.attack(x)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        logits_adv = self.model(x_adv)
        with torch.no_grad():
            self.model(x)
        guide_logits = self.guide(x)
        loss = F.cross_entropy(guide_logits, labels) + F.cross_entropy(logits_adv, guide_logits.argmax(1))
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()
