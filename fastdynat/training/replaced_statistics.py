"""Passes that replace the running statistics of a network, for --bn-reset-epoch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def replaced_statistics(module: nn.Module) -> Iterator[None]:
    """Context in which each pass in train mode replaces the running statistics of `module` (momentum 1)."""
    layers = [
        layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.momentum is not None
    ]
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, usual, strict=True):
            layer.momentum = momentum
