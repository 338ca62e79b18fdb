"""The convolutions of a network and their shapes, found without allocating its weights."""

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdynat.models.build import build_model
from fastdynat.tuning import Layer
from fastdynat.user_code import is_user_supplied


def convolutions(name: str, *, num_classes: int, image_shape: tuple[int, int, int]) -> tuple[Layer, ...]:
    """The square convolutions of the network that `build_model` makes; none where it cannot be built.

    A network of the user is built with its weights: its code may not work on the meta device.
    """
    if is_user_supplied(name):
        return _watched(name, num_classes, image_shape, "cpu")
    return _found(name, num_classes, image_shape)


@functools.lru_cache
def _found(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> tuple[Layer, ...]:
    return _watched(name, num_classes, image_shape, "meta")


def _watched(
    name: str, num_classes: int, image_shape: tuple[int, int, int], device: str
) -> tuple[Layer, ...]:
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device), _Watch() as watch:
            build_model(name, num_classes=num_classes, image_shape=image_shape)  # runs it once
    except Exception:
        # Of any kind: this is for a choice of speed alone, and building the network refuses a wrong name.
        return ()
    return tuple(watch.found)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Layer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self._note(*args[:2], *args[3:])
        return func(*args, **(kwargs or {}))

    def _note(
        self,
        x: Any,
        weight: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: Any,
        _: Any,
        groups: int,
    ) -> None:
        each = (weight.shape[2:], stride, padding)
        if x.dim() != 4 or transposed or any(len(set(sizes)) > 1 for sizes in each) or set(dilation) != {1}:
            return
        (_, c, height, width), (k, _, kernel, _) = x.shape, weight.shape
        self.found.append(Layer(c, k, height, width, kernel, stride[0], padding[0], groups))
