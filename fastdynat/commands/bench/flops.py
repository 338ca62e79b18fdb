"""Floating-point operations (a multiply-add is two) of a step's products and convolutions, by counting."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.network_modes import frozen_twin
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.data import Batch
from fastdynat.methods import Method, Networks
from fastdynat.methods.base import unattacked
from fastdynat.ops import conv_relu as _registered  # noqa: F401  (the operator that is looked up below)

IMAGES = 2  # of a counted batch where its size does not matter; batch norm needs two
Kernels = Counter[tuple[int, int]]  # how often a kernel of so many (FLOPs, elements read and written)


def _conv_backward_flops(
    grad: Any, x: Any, weight: Any, *others: Any, out_val: tuple[Tensor | None, ...], **more: Any
) -> int:
    """As much as the forward pass for each of the two gradients; torch's formula ignores groups."""
    transposed, mask = others[4], others[7]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed=transposed)
    return forward * sum(mask[:2])


def _cpu_attention_flops(query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *others: Any, **more: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _conv_relu_flops(x: Any, weight: Any, *others: Any, out_val: Tensor) -> int:
    return conv_flop_count(list(x.shape), list(weight.shape), list(out_val.shape))


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.fastdynat_cudnn.conv_relu: _conv_relu_flops,
    torch.ops.aten.convolution_backward: _conv_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}


class FlopCount(TorchDispatchMode):
    """Adds up torch's flop formulas over operator calls (torch's own counter fails under autograd.grad).

    Attributes:
        kernels: the calls that were counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Kernels = Counter()

    @property
    def total(self) -> int:
        return total(self.kernels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            elements = sum(t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            self.kernels[formula(*args, **kwargs, out_val=out), elements] += 1
        return out


def total(kernels: Kernels) -> int:
    """FLOPs of all of them."""
    return sum(flops * times for (flops, _), times in kernels.items())


def count(work: Callable[[], object]) -> int:
    """FLOPs of `work`, in eager mode."""
    return total(kernels_of(work))


def kernels_of(work: Callable[[], object]) -> Kernels:
    """The products and convolutions of `work`, in eager mode."""
    with FlopCount() as counter:
        work()
    return counter.kernels


@dataclass(frozen=True)
class StepFlops:
    """FLOPs per image.

    Attributes:
        forward: one forward pass of the model.
        attack_step: forward and gradient at the image, which is 2 forwards.
        step: a whole training step of the method: its two halves, the attack between them and the backward
            passes.
        attack, update, guide: what `step` consists of: the attack's steps, the model's passes outside of it,
            and all passes of the guide.
        kernels: of a whole batch, by the same three names.
    """

    forward: int
    attack_step: int
    step: int
    attack: int = 0
    update: int = 0
    guide: int = 0
    kernels: dict[str, Kernels] = field(default_factory=dict)

    def values(self) -> dict[str, int]:
        """Plain numbers for JSON."""
        names = ("forward", "attack_step", "step", "attack", "update", "guide")
        return {name: getattr(self, name) for name in names}


def count_step(
    method: Method[Any],
    model: nn.Module,
    guide: nn.Module | None,
    shape: tuple[int, int, int],
    attack_steps: int,
    *,
    batch_size: int = IMAGES,
    awp: bool = False,
) -> StepFlops:
    """Count on the meta device, where the networks are left: pass disposable ones. `awp`: with its pass."""
    model, guide = model.to("meta").train(), None if guide is None else guide.to("meta").train()
    twin = frozen_twin(model, "eval")
    guide_eval = None if guide is None else frozen_twin(guide, "eval")
    nets = Networks(model, twin, model, guide if "guide" in method.trains else guide_eval, guide_eval)
    x = torch.empty(batch_size, *shape, device="meta")
    method.num_classes, method.num_images = twin(x).shape[1], batch_size
    method.buffers = method.make_buffers(x)
    method.epoch_step = 1  # not an epoch's first batch, in which a method may do more
    attacked = [False]

    def attack_step() -> None:
        leaf = x.clone().requires_grad_()
        logits: Tensor = twin(leaf)
        torch.autograd.grad(logits.sum(), leaf)

    halves = kernels_of(lambda: attacked.append(_halves(method, nets, x, awp=awp)))
    update = halves
    if guide is not None:
        # The same with a guide that answers without computing anything.
        answer = torch.empty_like(guide(x)).requires_grad_()
        idle = replace(nets, guide=lambda x: answer * 1, guide_eval=lambda x: answer.detach())
        update = kernels_of(lambda: _halves(method, idle, x, awp=awp))
    forward, one = kernels_of(lambda: twin(x)), kernels_of(attack_step)
    steps = attack_steps if attacked[-1] else 0
    attack: Kernels = Counter({kernel: times * steps for kernel, times in one.items() if steps})
    parts = {"attack": attack, "update": update, "guide": halves - update}
    per_image = {name: total(kernels) // batch_size for name, kernels in parts.items()}
    step = sum(map(total, parts.values())) // batch_size
    return StepFlops(total(forward) // batch_size, total(one) // batch_size, step, **per_image, kernels=parts)


def _halves(method: Method[Any], nets: Networks, x: Tensor, *, awp: bool) -> bool:
    """All of a step of `method` but the attack; whether it has one."""
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    batch = Batch(x, labels, labels)
    inner = method.inner(nets, batch)
    tracked = inner.goal is not None and inner.goal.track
    result = replace(unattacked(x), kept=torch.zeros_like(labels) if tracked else None)
    if not method.searches:  # the attack, if there is one, is made of the passes of the update
        attack = Attacker(cast(Any, None), PGDSpec(1 / 255, 1 / 255, 1, start="none"))
        result = method.perturb(nets, batch, inner, attack)
    method.after_attack(nets, batch, result)
    if awp:
        method.awp_loss(nets, batch, inner, result).backward(retain_graph=True)
    outer = method.outer(nets, batch, inner, result)
    torch.stack([*inner.losses.values(), *outer.losses.values()]).sum().backward()
    method.after_update(nets, batch)
    return inner.goal is not None
