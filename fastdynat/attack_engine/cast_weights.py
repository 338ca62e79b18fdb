"""Weights that a replica may hold in half precision: those that only autocast's own casts would change."""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdynat.attack_engine.network_comparison import reference_logits
from fastdynat.attack_engine.network_modes import attack_mode

# What layers call with their weights, and autocast runs in half precision.
CASTING = (F.linear, F.conv1d, F.conv2d, F.conv3d)


class _Readers(TorchFunctionMode):
    """Collects in `kept` the ids of `weights` that go elsewhere than into a cast of autocast to `dtype`."""

    def __init__(self, weights: Collection[int], device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self._weights, self._device_type, self._dtype = weights, device_type, dtype
        self.kept: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._casts(func) and _has_tensor(out):  # else it read a shape or the like
            given = [*args, *(kwargs or {}).values()]
            given += [item for value in given if isinstance(value, (list, tuple)) for item in value]
            self.kept |= {id(value) for value in given} & set(self._weights)
        return out

    def _casts(self, func: Callable[..., Any]) -> bool:
        if func not in CASTING or not torch.is_autocast_enabled(self._device_type):
            return False
        return torch.get_autocast_dtype(self._device_type) == self._dtype


def _has_tensor(out: Any) -> bool:
    return any(isinstance(value, Tensor) for value in (out if isinstance(out, (list, tuple)) else (out,)))


def castable_weights(
    network: nn.Module, example: Tensor, dtype: torch.dtype, layers: tuple[type[nn.Module], ...]
) -> set[int]:
    """Ids of the parameters of `layers` in `network` that autocast to `dtype` casts at every use.

    Found in a pass of `example` in eval mode. A weight that is read where autocast is off, or by an operation
    that it keeps in float32, is not among them: the network would read it rounded, or fail. A network that
    does not run under autocast has none, and says why at its first attack.
    """
    found = [p for module in network.modules() if type(module) in layers for p in module._parameters.values()]
    weights = {id(p) for p in found if p is not None and p.dtype != dtype}
    if not weights:
        return weights
    device_type = example.device.type
    readers = _Readers(weights, device_type, dtype)
    try:
        with attack_mode(network, "eval"), torch.autocast(device_type, dtype), readers:
            reference_logits(network, example)
    except RuntimeError:
        return set()
    return weights - readers.kept
