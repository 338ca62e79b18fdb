"""Accuracy of one network under one attack."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdynat.attacks import AttackGoal, NamedAttack, pgd
from fastdynat.data import ImageSet, eval_batches


class Stopped(Exception):
    """The caller asked to stop; nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One cell of an evaluation table.

    Attributes:
        accuracy: share of all images classified correctly after the attack, in [0, 1].
        zero_grad_share: share of the attack's image gradients that were zero in every pixel; None for clean accuracy.
    """

    attack: str
    accuracy: float
    correct: int
    images: int
    seconds: float
    images_per_s: float
    zero_grad_share: float | None


def measure(
    model: nn.Module,
    images: ImageSet,
    attack: NamedAttack,
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda images: None,
) -> Measurement:
    """Attack `model` (images in [0, 1] -> logits) on every image of `images` and count what it still gets right.

    Every image counts, also those misclassified without an attack. The prediction that is counted is made in eval mode on the
    attack's last iterate; the random start comes from a generator of its own, so equal seeds give equal numbers and the global
    generator is left alone.

    Args:
        batch_size: images per batch; changes memory and, through the random start, the sample of the attack.
        amp_dtype: autocast for attack and prediction; None is the images' float32.
        should_stop: asked between batches.
        advance: told the number of images after each batch.

    Raises:
        Stopped: `should_stop` said so.
    """
    generator = torch.Generator(device).manual_seed(seed)
    was_training = [(m, m.training) for m in model.modules()]
    correct = torch.zeros((), dtype=torch.int64, device=device)
    zero, gradients = torch.zeros_like(correct), 0
    model.eval()
    start = time.perf_counter()
    try:
        for batch in eval_batches(images, batch_size=batch_size, device=device, channels_last=channels_last):
            if should_stop():
                raise Stopped
            x = batch.x
            if attack.spec is not None:
                goal = AttackGoal(attack.loss, batch.labels)
                result = pgd(model, x, goal, attack.spec, generator=generator, amp_dtype=amp_dtype)
                x, zero, gradients = result.x_adv, zero + result.zero_grads, gradients + result.gradients
            correct += (_predict(model, x, amp_dtype) == batch.labels).sum()
            advance(len(batch.labels))
        right = int(correct)  # waits for the device, so the clock stops after the work
    finally:
        for module, training in was_training:
            module.training = training
    seconds, total = time.perf_counter() - start, len(images.labels)
    return Measurement(
        attack=attack.name,
        accuracy=right / total,
        correct=right,
        images=total,
        seconds=seconds,
        images_per_s=total / seconds,
        zero_grad_share=int(zero) / gradients if gradients else None,
    )


def _predict(model: nn.Module, x: Tensor, amp_dtype: torch.dtype | None) -> Tensor:
    with torch.no_grad(), torch.autocast(x.device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
        return model(x).argmax(1)
