"""Check that a copy of a network computes the same, and only with its own parts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdynat.attack_engine.network_comparison import disagreement, reference_logits_and_grad
from fastdynat.attack_engine.network_modes import NotCopyable, attack_mode
from fastdynat.attack_engine.network_state import storage_key
from fastdynat.distributed import apart


class _Watch(TorchFunctionMode):
    """Detects calls of torch functions with one of `tensors`."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._watched = {id(t) for t in tensors}
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        given += [item for value in given if isinstance(value, (list, tuple)) for item in value]
        self.seen = self.seen or any(id(value) in self._watched for value in given)
        return func(*args, **(kwargs or {}))


def check_twin(model: nn.Module, twin: nn.Module, example: Tensor) -> None:
    """Raise NotCopyable unless `twin`, a copy over the memory of `model`, can be attacked in its place.

    A copy keeps functions as they are, so a function that closes over the original, or a part of it, goes on
    computing with the original: in train mode it updates running statistics, and gradients reach the weights.
    Both networks run on `example` in eval mode, with the original's modules in train mode while the twin
    runs. The twin must not touch the original's tensors or change a buffer, and must give the same logits and
    input gradients. Modes, buffers and random streams are restored.
    """
    for what in ("parameters", "buffers"):
        original = [storage_key(t) for t in getattr(model, what)()]
        copied = [storage_key(t) for t in getattr(twin, what)()]
        if original != copied:
            raise _refusal(model, f"its copy does not share its {what}")
    # What the copy holds on to may be in train mode, and other ranks do not look at a copy now.
    with apart(), attack_mode(model, "eval"):
        expected = _logits_and_grad(model, example)
        watch = _Watch([*model.parameters(), *model.buffers()])
        buffers = _Buffers(model)
        with attack_mode(twin, "eval"), _all_training(model), buffers, watch:
            actual = _logits_and_grad(twin, example)
    if watch.seen:
        raise _refusal(
            model, "a function in it holds on to the original, with whose weights its copy computes"
        )
    if buffers.moved:
        raise _refusal(model, "its copy moves buffers in eval mode")
    why = disagreement(expected, actual)
    if why:
        raise _refusal(model, f"its copy's {why}")


class _Buffers(AbstractContextManager[None]):
    """Restores a model's buffers; `moved` says whether any had changed."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self.moved = False

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for buffer, value in self._kept:  # by value: batch norm updates do not bump the version
            if not torch.equal(buffer.nan_to_num(), value.nan_to_num()):
                self.moved = True
                buffer.copy_(value)


def _logits_and_grad(network: nn.Module, example: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(example.device.type, enabled=False):
        return reference_logits_and_grad(network, example)


@contextmanager
def _all_training(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = True
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _refusal(model: nn.Module, why: str) -> NotCopyable:
    return NotCopyable(f"no replica of {type(model).__name__} can be made: {why}")
