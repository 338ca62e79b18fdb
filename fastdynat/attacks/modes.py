"""Train/eval state of the attacked network: set for the attack, put back module by module."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.errors import UserError, unknown_name

BNMode = Literal["eval", "train", "frozen"]


def set_attack_mode(model: nn.Module, bn: str) -> None:
    """Put `model` in the state in which it is attacked.

    Everything is in eval mode (no dropout noise in the attack); batch norm follows `bn`:
    "eval" uses the running statistics (TRADES, MART, LBGAT, DYNAT), "train" the batch's and updates the running ones
    (Rice et al., Wong et al.), "frozen" the batch's without updating (Gowal et al.).
    """
    if bn not in get_args(BNMode):
        raise unknown_name("attack BN mode", bn, get_args(BNMode))
    model.eval()
    if bn == "eval":
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = True
            module.track_running_stats = module.track_running_stats and bn == "train"


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the mode of `set_attack_mode` makes a difference to `model`, beside dropout."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class NotCopyable(UserError):
    """A network that ``copy.deepcopy`` refuses."""


@contextmanager
def attack_mode(model: nn.Module, bn: str) -> Iterator[None]:
    """`set_attack_mode` for the duration; restores each module's own flags, so a layer frozen by the user stays frozen."""
    saved = [(m, m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    try:
        set_attack_mode(model, bn)
        yield
    finally:
        for module, training, tracking in saved:
            module.training = training
            if tracking is not None:
                module.track_running_stats = tracking


def frozen_twin(model: nn.Module, bn: str) -> nn.Module:
    """A second module over the same memory whose parameters need no gradient, fixed in the attack's mode.

    In-place weight updates of `model` show in the twin at once. The training network itself is then never switched between
    modes, no attack can reach its ``.grad``, and a compiled twin computes input gradients only (compiling the trainable
    network and asking for the input gradient builds all weight gradients too).

    Raises:
        NotCopyable: a UserError.
    """
    twin = _over_same_memory(model, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()})
    set_attack_mode(twin, bn)
    return twin


def unmoved_twin(model: nn.Module) -> nn.Module:
    """A second module with the same parameters, in train mode, whose forward passes leave running statistics as they are.

    Raises:
        NotCopyable: a UserError.
    """
    twin = _over_same_memory(model, {id(p): p for p in model.parameters()}).train()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
    return twin


def _over_same_memory(model: nn.Module, parameters: dict[int, nn.Parameter]) -> nn.Module:
    memo: dict[int, object] = {**parameters, **{id(b): b for b in model.buffers()}}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # copying a module runs foreign code: anything may come out of it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotCopyable(f"no replica of {type(model).__name__} can be made ({reason}); make it copy.deepcopy-able") from None
