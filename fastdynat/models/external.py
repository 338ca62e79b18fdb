"""Classifiers of torchvision and, where it is installed, timm: freshly initialised, no pretrained weights."""

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torchvision
from torch import nn

from fastdynat.errors import UserError, first_line, unknown_name


@cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's image classifiers."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def build_torchvision(name: str, *, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a torchvision classifier; the ones with a fixed input size are built for this one.

    Raises: UserError for an unknown name, images that are not RGB, or a size that the network refuses.
    """
    require_torchvision(name)
    channels, height, width = image_shape
    if channels != 3:
        raise UserError(
            f"torchvision:{name} takes RGB images only, the data has {channels} channel(s); "
            "use one of our networks (small, resnet18, wrn-28-10, ...) or timm:NAME"
        )
    kwargs: dict[str, Any] = {}
    if name.startswith("vit_"):
        kwargs["image_size"] = height
    elif name.startswith("maxvit"):
        kwargs["input_size"] = (height, width)
    elif name in ("googlenet", "inception_v3"):
        # Without auxiliary heads these return logits in train mode too; init_weights avoids a warning.
        kwargs.update(aux_logits=False, init_weights=True)
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"torchvision:{name} cannot be built for {height}x{width} images: {first_line(error)}"
        ) from error
    return model


def build_timm(name: str, *, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a timm model with a stem for these channels and, where its architecture asks, this image size.

    Raises: UserError where timm is not installed, for an unknown name, or a size that the network refuses.
    """
    timm = require_timm(name)
    channels, height, width = image_shape
    kwargs: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": channels}
    try:
        try:
            return timm.create_model(name, img_size=(height, width), **kwargs)
        except TypeError as error:
            # Convolutional networks have no fixed size and reject the argument.
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, **kwargs)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"timm:{name} cannot be built for {channels}x{height}x{width} images: {first_line(error)}"
        ) from error


def require_torchvision(name: str) -> None:
    """Raise UserError unless torchvision has the classifier `name`."""
    if name not in torchvision_names():
        raise unknown_of_many(
            "torchvision model", name, torchvision_names(), "torchvision.models.list_models()"
        )


def require_timm(name: str) -> Any:
    """The module timm, which has the model `name` (with or without the tag of its weights).

    Raises: UserError where it is not installed or has no such model.
    """
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"timm:{name} needs timm, which is not installed: pip install 'fastdynat[timm]'")
    timm = importlib.import_module("timm")
    if not timm.is_model(name.partition(".")[0]):
        raise unknown_of_many("timm model", name, timm.list_models(), "timm.list_models()")
    return timm


def unknown_of_many(kind: str, name: str, names: Sequence[str], lister: str) -> UserError:
    """`unknown_name` for libraries with hundreds of names: prints the nearest ones; `lister` gives all."""
    message = str(unknown_name(kind, name, names)).partition("known:")[0].rstrip()
    return UserError(f"{message} {lister} gives all {len(names)}")
