"""Counted floating-point operations (a multiply-add is two) of the products and convolutions in a step, without running it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastdynat.attacks import frozen_twin
from fastdynat.data import Batch
from fastdynat.methods import Method, Networks
from fastdynat.methods.base import unattacked

IMAGES = 2  # of a counted batch; batch norm needs two


class FlopCount(TorchDispatchMode):
    """Adds up what torch's table of formulas says of every operator call (torch's own counter fails under autograd.grad)."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def count(work: Callable[[], object]) -> int:
    """FLOPs of `work`, in eager mode."""
    with FlopCount() as counter:
        work()
    return counter.total


@dataclass(frozen=True)
class StepFlops:
    """FLOPs per image.

    Attributes:
        forward: one forward pass of the model.
        attack_step: forward and gradient at the image, which is 2 forwards.
        step: a whole training step of the method: its two halves, the attack between them and the backward passes.
    """

    forward: int
    attack_step: int
    step: int


def count_step(
    method: Method[Any], model: nn.Module, guide: nn.Module | None, shape: tuple[int, int, int], attack_steps: int
) -> StepFlops:
    """Count on the meta device; the networks are moved there, so hand over ones that nobody needs."""
    model, guide = model.to("meta").train(), None if guide is None else guide.to("meta").train()
    twin = frozen_twin(model, "eval")
    guide_eval = None if guide is None else frozen_twin(guide, "eval")
    nets = Networks(model, twin, model, guide if "guide" in method.trains else guide_eval, guide_eval)
    x = torch.empty(IMAGES, *shape, device="meta")
    labels = torch.empty(IMAGES, dtype=torch.int64, device="meta")
    attacked = [False]

    def halves() -> None:
        batch = Batch(x, labels, labels)
        inner = method.inner(nets, batch)
        attacked[0] = inner.goal is not None
        tracked = inner.goal is not None and inner.goal.track
        result = replace(unattacked(x), kept=torch.zeros_like(labels) if tracked else None)
        outer = method.outer(nets, batch, inner, result)
        torch.stack([*inner.losses.values(), *outer.losses.values()]).sum().backward()

    def attack_step() -> None:
        leaf = x.clone().requires_grad_()
        logits: Tensor = twin(leaf)
        torch.autograd.grad(logits.sum(), leaf)

    forward, one, rest = (count(work) // IMAGES for work in (lambda: twin(x), attack_step, halves))
    return StepFlops(forward, one, rest + (attack_steps * one if attacked[0] else 0))
