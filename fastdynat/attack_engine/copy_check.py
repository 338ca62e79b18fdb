"""Whether a copy of a network computes what the network computes, and with nothing but its own parts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdynat.attack_engine.network_comparison import answer_and_gradient, disagreement
from fastdynat.attack_engine.network_modes import NotCopyable, attack_mode
from fastdynat.attack_engine.reach import place


class _Watch(TorchFunctionMode):
    """Notices functions of torch that are given one of `tensors`."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._watched, self.seen = {id(t) for t in tensors}, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        given += [item for value in given if isinstance(value, (list, tuple)) for item in value]
        self.seen = self.seen or any(id(value) in self._watched for value in given)
        return func(*args, **(kwargs or {}))


def check_twin(model: nn.Module, twin: nn.Module, example: Tensor) -> None:
    """Raise NotCopyable unless `twin`, a copy over the memory of `model`, is one that can be attacked in its
    place.

    Copying carries functions over as they are, so one that closes over the original, or over a part of it,
    goes on computing with the original: in train mode, moving its running statistics, with gradients reaching
    its weights. Both answer to `example` in eval mode, the original's parts being in train mode while the
    twin does; the twin must not touch the original's tensors or move a buffer, and must give the same logits
    and input gradients. Modes, buffers and random streams are left as they were found.
    """
    for what in ("parameters", "buffers"):
        own, its = list(getattr(model, what)()), list(getattr(twin, what)())
        if [place(t) for t in own] != [place(t) for t in its]:
            raise _refusal(model, f"its copy does not share its {what}")
    with attack_mode(model, "eval"):
        want = _answers(model, example)
        watch, buffers = _Watch([*model.parameters(), *model.buffers()]), _Buffers(model)
        with attack_mode(twin, "eval"), _all_training(model), buffers, watch:
            got = _answers(twin, example)
    if watch.seen:
        raise _refusal(
            model, "a function in it holds on to the original, with whose weights its copy computes"
        )
    if buffers.moved:
        raise _refusal(model, "its copy moves buffers in eval mode")
    why = disagreement(want, got)
    if why:
        raise _refusal(model, f"its copy's {why}")


class _Buffers(AbstractContextManager[None]):
    """Puts a model's buffers back; `moved` says whether there was anything to put back."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self.moved = False

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for buffer, value in self._kept:  # by value: batch norm moves its statistics without another version
            if not torch.equal(buffer.nan_to_num(), value.nan_to_num()):
                self.moved = True
                buffer.copy_(value)


def _answers(network: nn.Module, example: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(example.device.type, enabled=False):
        return answer_and_gradient(network, example)


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
