"""The loop that people start from: Madry's training with `torchattacks.PGD`, float32, eager PyTorch.

The baseline of the race. It is written as an example of the attack library would be, with one favour: the
images are in memory, and crop and flip are done for a batch at once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.commands.speedrun.race_rules import PlainSettings
from fastdynat.models import build_model

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10


@dataclass(frozen=True)
class PlainRun:
    """The trained network, the seconds of each epoch, and those of the first update."""

    model: nn.Module
    epoch_seconds: list[float]
    first_update_seconds: float


def train_plainly(
    images: Tensor,
    labels: Tensor,
    classes: int,
    settings: PlainSettings,
    seed: int,
    device: str,
    report: Callable[[str], None],
) -> PlainRun:
    """Train on `images`, float (N, C, H, W) in [0, 1], with `labels`, int64 (N,).

    report: is told of each finished epoch.
    """
    import torchattacks  # extra `peer`

    torch.manual_seed(seed)
    images, labels = images.to(device), labels.to(device)
    channels, height, width = images.shape[1:]
    model = build_model(settings.model, num_classes=classes, image_shape=(channels, height, width)).to(device)
    attack = torchattacks.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=STEPS, random_start=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(settings.milestones), settings.gamma)
    epoch_seconds, first_update = [], None
    for epoch in range(settings.epochs):
        model.train()
        begin = time.perf_counter()
        for rows in torch.randperm(len(images), device=device).split(settings.batch_size):
            x, y = crop_and_flip(images[rows]), labels[rows]
            x_adv = attack(x, y)  # in eval mode; puts the model back into train mode
            loss = F.cross_entropy(model(x_adv), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if first_update is None:
                loss.item()  # waits for a GPU
                first_update = time.perf_counter() - begin
        scheduler.step()
        last = loss.item()
        epoch_seconds.append(time.perf_counter() - begin)
        speed = len(images) / epoch_seconds[-1]
        report(
            f"epoch {epoch + 1:3}/{settings.epochs}  loss of its last batch {last:.3f}  {speed:,.0f} img/s"
        )
    assert first_update is not None
    return PlainRun(model.eval(), epoch_seconds, first_update)


def crop_and_flip(x: Tensor, padding: int = 4) -> Tensor:
    """Random crops of `x` (N, C, H, W) padded by zeros, half of them mirrored."""
    count, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count, 1), device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.arange(width, device=x.device)
    mirrored = torch.rand(count, 1, device=x.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    picked = torch.arange(count, device=x.device)[:, None, None]
    return padded[picked, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
