"""One training step: inner attack, outer losses, backward, update."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from fastdynat.attacks import AttackGoal, AttackResult, PGDSpec, run_pgd
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.engine.networks import NetworkSet
from fastdynat.engine.precision import Precision
from fastdynat.methods import Inner, Method


def build_optimizers(networks: dict[str, nn.Module], config: OptimConfig) -> list[SGD]:
    """SGD over all parameters of each network ("separate"), or one SGD with a group per network ("joint")."""
    assert config.lr is not None
    lr = config.lr
    groups = [{"params": list(module.parameters())} for module in networks.values()]

    def sgd(members: list[dict[str, Any]]) -> SGD:
        return SGD(
            members,
            lr=lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )

    return [sgd(groups)] if config.optimizers == "joint" else [sgd([group]) for group in groups]


class TrainStep:
    """Runs a method's min-max problem on one batch and updates the networks.

    Attributes:
        optimizers: updated together after one backward pass over the sum of the method's losses.
        global_step: updates done so far; drives the schedule.
    """

    def __init__(
        self,
        method: Method[Any],
        networks: NetworkSet,
        spec: PGDSpec,
        optim: OptimConfig,
        precision: Precision,
        lr_factor: Callable[[int], float],
    ) -> None:
        self.method, self.networks, self.spec = method, networks, spec
        self.optim, self.precision, self.lr_factor = optim, precision, lr_factor
        assert optim.lr is not None
        self.peak_lr = optim.lr
        self.optimizers = build_optimizers({name: networks.raw[name] for name in method.trains}, optim)
        self.global_step = 0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Update on `batch`; returns detached scalars on the device, each a mean over the batch's images."""
        with self.precision.autocast():
            inner = self.method.inner(self.networks.views, batch)
            x_adv, logs = self._attack(batch, inner)
            outer = self.method.outer(self.networks.views, batch, inner, x_adv)
        self._update(torch.stack(list(outer.losses.values())).sum())
        return {**outer.logs, **logs}

    def _attack(self, batch: Batch, inner: Inner) -> tuple[Tensor, dict[str, Tensor]]:
        if inner.goal is None:
            return batch.x, {}
        result = self.method.perturb(batch, inner.goal, self._pgd)
        return result.x_adv, {"zero_grad_share": result.zero_grads / max(result.gradients, 1)}

    def _pgd(self, x: Tensor, goal: AttackGoal) -> AttackResult:
        return run_pgd(self.networks.views.attacked, x, goal, self.spec, underflow=self.precision.underflow)

    def _update(self, loss: Tensor) -> None:
        scaler, lr = self.precision.scaler, self.learning_rate()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if self.optim.clip_grad > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.optim.clip_grad)
            scaler.step(optimizer)
        scaler.update()
        self.networks.average()
        self.global_step += 1

    def learning_rate(self) -> float:
        """The rate of the next update."""
        return self.peak_lr * self.lr_factor(self.global_step)
