"""`--boundary-speed N`: at each validation, movement of the decision boundary of N images."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastdynat.attacks.boundary_search import BoundarySpec
from fastdynat.data import Batch
from fastdynat.evaluation import BoundarySpeed, boundary_speed
from fastdynat.evaluation.boundary_speed import FOLDER
from fastdynat.models import undivided
from fastdynat.ops.image_draws import ImageDraws
from fastdynat.training.step import TrainStep


def log_boundary(
    step: TrainStep, batches: Iterable[Batch], folder: Path, epoch: int, *, near: float, seed: int
) -> dict[str, float | None]:
    """Write ``boundary/epoch-NNNN.npz`` in the run's `folder`; returns the epoch's columns of the metrics.

    Args:
        epoch: completed epochs.
        near: images with a smaller margin count as near the boundary.
        seed: of the search's random starts, the same at every validation.
    """
    model, move = undivided(step.networks.raw["model"]), last_move(step)
    spec = BoundarySpec(eps_start=near)
    parts = [
        boundary_speed(model, b.x, b.labels, move, spec, generator=ImageDraws.of(seed, b.indices, b.x.device))
        for b in batches
    ]
    whole = BoundarySpeed(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("margin", "speed", "correct"))
    )
    whole.save(folder / FOLDER / f"epoch-{epoch:04d}.npz", near)
    return whole.columns(near)


def last_move(step: TrainStep) -> dict[str, Tensor]:
    """The step of the momentum by parameter name: -rate * buffer at the last update's rate of its group.

    Without Nesterov it is the last update itself, which the next one repeats up to the new gradient.
    """
    rate = step.learning_rate(max(step.global_step - 1, 0))
    moves = {
        parameter: -rate * group.get("lr_scale", 1.0) * optimizer.state[parameter]["momentum_buffer"]
        for optimizer in step.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state
    }
    return {name: moves[p] for name, p in step.networks.raw["model"].named_parameters() if p in moves}
