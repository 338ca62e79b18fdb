"""Identity of a network whose evaluation may be resumed: weights, structure, constants and predictions."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.data.read_ahead import DIGEST_BATCH
from fastdynat.evaluation.unit_images import UnitImages
from fastdynat.models.state_digest import state_digest

PROBED = 256  # images that are classified again, with noise
NOISE = 8 / 255
PLAIN = (bool, int, float, complex, str, bytes, type(None))  # attributes that count as constants


def digest(values: Iterable[Any]) -> str:
    """The sha256 of the values, types and shapes of tensors and images, and of the text of anything else."""
    found = hashlib.sha256()
    for value in values:
        if not isinstance(value, Tensor | UnitImages):
            found.update(repr(value).encode() + b"\0")
            continue
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        for part in [value] if isinstance(value, Tensor) else value.parts(DIGEST_BATCH):
            found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def network_digests(
    model: object, clean: Tensor, images: Tensor, classes: Callable[[Tensor], Tensor]
) -> dict[str, str]:
    """Digests that differ between networks that predict differently, also off the images.

    "model" covers the state dict and the modules with their plain attributes (a mean in Python floats), but
    no attribute that a prediction changes, such as a counter. "predictions" covers `clean` and the
    predictions on `images` with noise; it is "random" if these differ from call to call and the network has
    weights.

    Args:
        clean: (N,) predicted classes of all evaluated images.
        images: (n, C, H, W) in [0, 1], of which the first `PROBED` are used.
        classes: the prediction of a batch by `model`.
    """
    noise = torch.rand(images[:PROBED].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = (images[:PROBED] + NOISE * noise.to(images)).clamp(0, 1)
    before = _constants(model)
    first, second = classes(noisy), classes(noisy)
    after = _constants(model)
    fixed = {name: value for name, value in before.items() if after.get(name) == value}
    steady = torch.equal(first, second)
    weights = state_digest(model.state_dict()) if isinstance(model, nn.Module) and model.state_dict() else ""
    return {
        "model": digest([weights, sorted(fixed.items())]),
        "predictions": digest([clean, first]) if steady or not weights else "random",
    }


def _constants(model: object) -> dict[str, str]:
    """Type and plain attributes of every module by its name."""
    found = {}
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        found[name] = f"{type(module).__module__}.{type(module).__qualname__}"
        for key, value in vars(module).items():
            if _is_plain(value) and not key.startswith("_") and key != "training":
                found[f"{name}.{key}"] = repr(value)
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)
