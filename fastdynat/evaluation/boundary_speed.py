"""Speed of the decision boundary relative to images during training (arXiv 2302.03015, section 4).

By the envelope theorem, a change of the weights changes the margin R of an image by the change of the soft
margin at the nearest boundary point, divided by the L1 norm of its gradient there::

    s = <grad_theta Phi(x^), d theta> / ||grad_x Phi(x^)||_1

For all images at once that is one forward-mode derivative of the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attacks.boundary_search import BoundarySpec, boundary
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import exact_float32
from fastdynat.ops import soft_margin_grad
from fastdynat.ops.image_draws import Randomness
from fastdynat.runs.atomic_files import make_folder, write_bytes

FOLDER = "boundary"  # of a run; one file per validation


@dataclass(frozen=True)
class BoundarySpeed:
    """Margins of images and their change per update.

    Attributes:
        margin: (N,) L-inf distance to the boundary of the soft margin, in [0, 1] pixel units; NaN where no
            point was found.
        speed: (N,) change of the margin by the change of the weights; above 0 where the boundary moves away;
            NaN likewise.
        correct: (N,) bool: the image itself is classified as labelled.
    """

    margin: Tensor
    speed: Tensor
    correct: Tensor

    def columns(self, near: float) -> dict[str, float | None]:
        """Columns of the log, separately for images with margins below `near`; None without such images."""
        found = self.margin.isfinite()
        close = found & (self.margin < near)
        columns = {"margin_found": float(found.double().mean()), "margin": _mean(self.margin, found)}
        for name, chosen in (("near", close), ("far", found & ~close)):
            columns[f"approaching_{name}"] = _mean((self.speed < 0).double(), chosen)
            columns[f"speed_{name}"] = _mean(self.speed, chosen)
        return columns

    def save(self, path: Path | str, near: float) -> None:
        """Write margin, speed, correct and `near` as arrays of a .npz file, atomically."""
        path = Path(path)
        data = BytesIO()
        arrays = {name: getattr(self, name).cpu().numpy() for name in ("margin", "speed", "correct")}
        np.savez_compressed(data, near=np.float64(near), **arrays)
        make_folder(path.parent)
        write_bytes(path, data.getvalue())


def _mean(values: Tensor, chosen: Tensor) -> float | None:
    return float(values[chosen].double().mean()) if bool(chosen.any()) else None


@exact_float32()
def boundary_speed(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    move: Mapping[str, Tensor],
    spec: BoundarySpec,
    *,
    x_start: Tensor | None = None,
    generator: Randomness = None,
) -> BoundarySpeed:
    """Margins at `x` and their change under a small change of the weights, in eval mode and full float32.

    The model's modes, buffers and gradients, and with a `generator` the global random stream, are left alone.

    Args:
        model: images in [0, 1] -> logits (N, K).
        x: (N, C, H, W), float32 or float64, in [0, 1].
        labels: (N,) int64.
        move: change of each parameter by its name; other parameters stay fixed. Its length sets the unit of
            the speed: a whole update gives the change per update.
        x_start, generator: as in `boundary`.

    Raises:
        UserError: `x` or `labels` do not fit, or an operator of the model has no forward-mode derivative.
    """
    points = boundary(model, x, labels, spec, x_start=x_start, generator=generator)
    named = {name: parameter.detach() for name, parameter in model.named_parameters() if name in move}

    def logits_at(weights: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(model, weights, (_plain(points.x_adv),))
        return logits

    with torch.inference_mode(False), torch.no_grad(), attack_mode(model, "eval"):
        # Group norm's forward-mode derivative takes no channels-last maps, which such weights would make.
        weights, tangents = ({name: _plain(of[name]) for name in named} for of in (named, move))
        try:
            pushed: Any = jvp(logits_at, (weights,), (tangents,))
        except RuntimeError as error:
            if not any(word in str(error) for word in ("forward AD", "forward mode", "functorch", "jvp")):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"no boundary speed of {type(model).__name__}: {reason}") from None
        correct = model(x).argmax(1) == labels
    logits, change = pushed
    upstream = soft_margin_grad(logits, labels, temperature=spec.temperature).grad
    speed = (upstream * change).sum(1) / points.grad_norm
    nothing = torch.full_like(points.distance, float("nan"))
    known = points.found & (points.grad_norm > 0)
    return BoundarySpeed(
        torch.where(known, points.distance, nothing), torch.where(known, speed, nothing), correct
    )


def _plain(tensor: Tensor) -> Tensor:
    """A copy with standard strides; one channel has these and channels-last ones alike for `contiguous`."""
    return tensor.clone(memory_format=torch.contiguous_format)
