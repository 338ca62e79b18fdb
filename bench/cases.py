"""Cases to time: each operator at the sizes that matter, beside the plain torch that it replaces.

A case builds its tensors once and hands out thunks. `plain` is the usual way to write the operation in torch,
which is also what `torch.compile` gets; `operator(backend)` is ours. `bytes` is what a perfect single pass
moves, for comparison with a copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat import ops

EPS, STEP = 8 / 255, 2 / 255
IMAGES = {"cifar": (256, 3, 32, 32), "large-batch": (2048, 3, 32, 32), "imagenet": (64, 3, 224, 224)}
LOGITS = {"2048x10": (2048, 10), "2048x1000": (2048, 1000)}
Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        plain: the composed torch function and its arguments.
        operator: by backend, a thunk that runs our operator.
        bytes: read and written by one ideal pass.
        tolerance: largest difference between the two that still counts as the same result.
    """

    name: str
    size: str
    plain: Callable[..., Any]
    args: tuple[Tensor, ...]
    operator: Callable[[str], Thunk]
    bytes: int
    tolerance: float = 1e-6


def _images(size: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(IMAGES[size], generator=generator)
    x_adv = (x0 + EPS * (2 * torch.rand(x0.shape, generator=generator) - 1)).clamp(0, 1)
    grad = torch.randn(x0.shape, generator=generator)
    return x_adv.to(device), grad.to(device), x0.to(device)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def plain_step_linf(x_adv: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
    moved = x_adv + STEP * grad.sign()
    return (x0 + (moved - x0).clamp(-EPS, EPS)).clamp(0, 1)


def plain_step_l2(x_adv: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
    shape = (-1, 1, 1, 1)
    moved = x_adv + STEP * grad / (grad.flatten(1).norm(dim=1).view(shape) + 1e-10)
    delta = moved - x0
    return (x0 + delta * (EPS / (delta.flatten(1).norm(dim=1).view(shape) + 1e-10)).clamp_max(1)).clamp(0, 1)


def plain_start(x: Tensor) -> Tensor:
    return (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)


def plain_dynamic_label(
    logits: Tensor, guide: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dynamic = guide.argmax(1)
    loss = F.cross_entropy(logits, dynamic)
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad, (logits.argmax(1) == labels).sum(), (dynamic == labels).sum()


def plain_logit_grad(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    return grad


def plain_soft_margin(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    margin = true.squeeze(1) - (5.0 * others).logsumexp(1) / 5.0
    (grad,) = torch.autograd.grad(margin.sum(), logits)
    return margin.detach(), grad


def plain_augment(images: Tensor, indices: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    chosen = images[indices]
    count, _, height, width = chosen.shape
    windows = F.pad(chosen, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)
    cut = windows[torch.arange(count, device=images.device), :, shifts[0], shifts[1]]
    return torch.where(flips.view(-1, 1, 1, 1), cut.flip(3), cut).float() / 255


def plain_projection(x: Tensor, w: Tensor, value: Tensor, at: Tensor) -> Tensor:
    """The published way, a sort of each image's distances to the box and sums along it, in batched torch.

    The multiplier is found in the sorted list without a wait for the device, which the release makes.
    """
    start, normal = x.flatten(1), w.flatten(1)
    offset = value + (normal * (start - at.flatten(1))).sum(1)
    direction = -offset.sign()[:, None] * normal.sign()
    room = torch.where(direction > 0, 1 - start, start)
    rooms, order = room.sort(1)
    sizes = normal.abs().gather(1, order)
    gained = sizes * rooms
    total, free = gained.cumsum(1), sizes.sum(1, keepdim=True) - sizes.cumsum(1)
    need = offset.abs()[:, None]
    place = (total + free * rooms < need).sum(1, keepdim=True)  # the first pixel that need not reach the box
    last = place.clamp_max(room.shape[1] - 1)
    before, left = (part.gather(1, last) for part in (total - gained, free + sizes))
    move = torch.where(place > last, float("inf"), (need - before) / left.clamp_min(1e-12))
    return (start + direction * torch.minimum(move, room)).view_as(x)


def cases(device: str) -> list[Case]:
    """Every case on `device`, tensors included."""
    found: list[Case] = []
    for size in IMAGES:
        x_adv, grad, x0 = _images(size, device)
        one = _bytes(x0)
        step = {"step_size": STEP, "eps": EPS}
        half = grad.bfloat16()
        found += [
            Case(
                "pgd_step_linf",
                size,
                plain_step_linf,
                (x_adv, grad, x0),
                lambda b, a=(x_adv, grad, x0), k=step: lambda: ops.pgd_step_linf(*a, **k, backend=b),
                4 * one,
            ),
            Case(
                "pgd_step_linf, bf16 gradient",
                size,
                plain_step_linf,
                (x_adv, half, x0),
                lambda b, a=(x_adv, half, x0), k=step: lambda: ops.pgd_step_linf(*a, **k, backend=b),
                3 * one + one // 2,
                tolerance=1e-3,  # bf16 rounds the product of step and sign in the plain form
            ),
            Case(
                "pgd_step_l2",
                size,
                plain_step_l2,
                (x_adv, grad, x0),
                lambda b, a=(x_adv, grad, x0), k=step: lambda: ops.pgd_step_l2(*a, **k, backend=b),
                4 * one,
            ),
        ]
        state = torch.tensor([1, 2], device=device)
        found.append(
            Case(
                "random_start",
                size,
                plain_start,
                (x0,),
                lambda b, a=(x0, state): lambda: ops.random_start(*a, kind="uniform", scale=EPS, backend=b),
                2 * one,
                tolerance=float("inf"),  # other random numbers
            )
        )
        if size != "imagenet":
            store = (x0 * 255).round().to(torch.uint8)
            count = store.shape[0]
            generator = torch.Generator().manual_seed(1)
            plan = (
                torch.randperm(count, generator=generator).to(device),
                torch.randint(9, (2, count), generator=generator).to(device),
                torch.randint(2, (count,), generator=generator).bool().to(device),
            )
            found.append(
                Case(
                    "augment",
                    size,
                    plain_augment,
                    (store, *plan),
                    lambda b, a=(store, *plan): lambda: ops.augment(*a, backend=b),
                    one + one // 4,
                )
            )
        value = torch.full((x0.shape[0],), 1.0, device=device)
        found.append(
            Case(
                "project_on_hyperplane, linf",
                size,
                plain_projection,
                (x_adv, grad, value, x0),
                lambda b, a=(x_adv, grad, value, x0): (
                    lambda: ops.project_on_hyperplane(*a, norm="linf", backend=b)
                ),
                4 * one,
                tolerance=1e-5,
            )
        )
    for size, shape in LOGITS.items():
        generator = torch.Generator().manual_seed(2)
        logits, guide = (3 * torch.randn(shape, generator=generator).to(device) for _ in range(2))
        labels = torch.randint(shape[1], shape[:1], generator=generator).to(device)
        leaf = logits.clone().requires_grad_()

        def dynamic_label(
            backend: str, leaf: Tensor = leaf, guide: Tensor = guide, labels: Tensor = labels
        ) -> Thunk:
            def run() -> tuple[Tensor, ...]:
                out = ops.dynamic_label_cross_entropy(leaf, guide, labels=labels, backend=backend)
                (grad,) = torch.autograd.grad(out.loss, leaf)
                return out.loss.detach(), grad, out.target_correct, out.guide_correct

            return run

        def soft_margin(backend: str, leaf: Tensor = leaf, labels: Tensor = labels) -> Thunk:
            def run() -> tuple[Tensor, Tensor]:
                margin = ops.soft_margin(leaf, labels, backend=backend)
                (grad,) = torch.autograd.grad(margin.sum(), leaf)
                return margin.detach(), grad

            return run

        one = _bytes(logits)
        found += [
            Case(
                "dynamic_label_cross_entropy, forward and backward",
                size,
                plain_dynamic_label,
                (leaf, guide, labels),
                dynamic_label,
                3 * one,
            ),
            Case(
                "attack_logit_grad, ce",
                size,
                plain_logit_grad,
                (logits, labels),
                lambda b, a=(logits, labels): lambda: ops.attack_logit_grad(*a, loss="ce", backend=b).grad,
                2 * one,
            ),
            Case(
                "soft_margin, forward and backward",
                size,
                plain_soft_margin,
                (leaf, labels),
                soft_margin,
                2 * one,
                tolerance=1e-5,
            ),
        ]
    return found
