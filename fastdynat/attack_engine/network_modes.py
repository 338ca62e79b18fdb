"""Train/eval modes of the attacked network, and copies of it that share its memory."""

import copy
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastdynat.attack_engine.network_state import network_state
from fastdynat.distributed.synchronized_batch_norm import plain_batch_norm
from fastdynat.errors import UserError, unknown_name

BNMode = Literal["eval", "train", "frozen"]
MODES = frozenset({"train", "eval"})


def set_attack_mode(model: nn.Module, bn: str) -> None:
    """Set the train/eval modes in which `model` is attacked.

    Everything is in eval mode (no dropout noise in the attack), except batch norm, which follows `bn`: "eval"
    uses the running statistics (TRADES, MART, LBGAT, DYNAT), "train" the batch's and updates the running ones
    (Rice et al., Wong et al.), "frozen" the batch's without updating (Gowal et al.).
    """
    if bn not in get_args(BNMode):
        raise unknown_name("attack BN mode", bn, get_args(BNMode))
    model.eval()
    if bn == "eval":
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not stays_in_eval_mode(module):
            module.training = True
            module.track_running_stats = module.track_running_stats and bn == "train"


def keep_in_eval_mode(module: nn.Module) -> None:
    """Keep the batch norm `module`, and its copies, in eval mode for good; other modules are not changed.

    Its ``train`` method is replaced; its class, which folding and synchronisation look at, stays.
    """
    if isinstance(module, _BatchNorm):
        module.train = MethodType(_stay, module)  # type: ignore[method-assign]
        module.training = False


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    return module


def stays_in_eval_mode(module: nn.Module) -> bool:
    """True after `keep_in_eval_mode`."""
    return getattr(vars(module).get("train"), "__func__", None) is _stay


def has_batch_norm(model: nn.Module) -> bool:
    """True if `model` has batch norm, whose mode `set_attack_mode` chooses."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class NotCopyable(UserError):
    """The network cannot be copied for an attack; the message says why."""


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_new_lock = threading.Lock()


def _lock_of(model: nn.Module) -> threading.RLock:
    """One lock for all networks with the same first layer: wrappers, some made per call, share its modes."""
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))] or [model]
    first = next((m for m in owners if not m._modules), owners[0])
    with _new_lock:
        return _locks.setdefault(first, threading.RLock())


@contextmanager
def attack_mode(model: nn.Module, bn: str) -> Iterator[None]:
    """`set_attack_mode` for the duration; then every module gets its own mode back.

    Attributes that a user's own ``train`` method sets are restored too. Threads that attack the same model
    take turns, since each would take the other's modes for the user's.
    """
    with _lock_of(model):
        saved = [(m, m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
        own = [(m, dict(vars(m))) for m in model.modules() if _has_own_train(m)]
        changed: list[tuple[nn.Module, dict[str, Any], set[str]]] = []
        try:
            set_attack_mode(model, bn)
            changed = [(m, before, _differing(before, vars(m))) for m, before in own]
            yield
        finally:
            for module, training, tracking in saved:
                module.training = training
                if getattr(module, "track_running_stats", None) is not tracking:
                    module.track_running_stats = tracking  # type: ignore[assignment]
            for owner, attributes, names in changed:
                for name in names:
                    vars(owner).pop(name, None)
                vars(owner).update((name, attributes[name]) for name in names if name in attributes)


def _differing(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    missing = object()
    return {name for name in {*before, *now} if before.get(name, missing) is not now.get(name, missing)}


def _has_own_train(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.train is not nn.Module.train
        or kind.eval is not nn.Module.eval
        or not vars(module).keys().isdisjoint(MODES)
    )


def frozen_twin(model: nn.Module, bn: str) -> nn.Module:
    """A copy of `model` over the same memory, in attack mode, whose parameters need no gradient.

    In-place changes of any tensor of `model` show in the twin. The training network never switches modes, no
    attack can reach its ``.grad``, and a compiled twin computes input gradients only; a compiled trainable
    network would compute all weight gradients too. No tensor object is shared, so `check_twin` can tell which
    of the two computes.

    Raises:
        NotCopyable: a UserError.
    """
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    twin = _over_same_memory(model, {**_held(model), **parameters})
    set_attack_mode(twin, bn)
    return plain_batch_norm(twin) if bn == "eval" else twin


def perturbable_twin(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[nn.Module, list[Tensor]]:
    """A `frozen_twin` in eval mode that owns some of its tensors, and these tensors, which may be changed.

    They are the tensors that say little in a fresh network, or that tracing may read as constants: those of
    batch norms, constant tensors, and tensors that are neither parameters nor buffers.

    dtype: of the twin's parameters and buffers; None keeps theirs.
    """
    norms = {
        id(t)
        for m in model.modules()
        if isinstance(m, _BatchNorm)
        for t in (*m.parameters(False), *m.buffers(False))
    }
    usual = {id(t) for t in (*model.parameters(), *model.buffers())}
    loose = [
        t for t in network_state(model).tensors if id(t) in norms or id(t) not in usual or _is_constant(t)
    ]
    frozen = {id(p): nn.Parameter(p.detach(), False) for p in model.parameters()}
    own: dict[int, Any] = {id(t): t.detach().clone() for t in loose}
    own = {key: nn.Parameter(value, False) if key in frozen else value for key, value in own.items()}
    twin = plain_batch_norm(_over_same_memory(model, {**_held(model), **frozen, **own}))
    set_attack_mode(twin, "eval")
    own_here = {id(t) for t in own.values()}
    names = [(m, name) for m in twin.modules() for name, b in m._buffers.items() if id(b) in own_here]
    plain = [value for key, value in own.items() if key not in usual]
    parameters = [p for p in twin.parameters() if id(p) in own_here]
    if dtype is not None:
        twin.to(dtype)  # replaces the buffers
    return twin, [*plain, *parameters, *(module._buffers[name] for module, name in names)]


def _is_constant(tensor: Tensor) -> bool:
    some = tensor.detach().flatten()[:64]
    return some.is_floating_point() and bool((some == some[:1]).all())


def trained_twin(model: nn.Module) -> nn.Module:
    """A module with the same parameters and buffers, in train mode: passes through it train `model`.

    Raises:
        NotCopyable: a UserError.
    """
    parameters: dict[int, Any] = {id(p): p for p in model.parameters()}
    return _over_same_memory(model, {**_held(model), **parameters}).train()


def unmoved_twin(model: nn.Module) -> nn.Module:
    """A `trained_twin` whose forward passes update no running statistics.

    Raises:
        NotCopyable: a UserError.
    """
    twin = trained_twin(model)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
        elif isinstance(module, _InstanceNorm) and module.training:  # it updates any statistics that it has
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return twin


def loading_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares the memory of its state_dict() and owns all else, with the values of now.

    What a network built anew computes once that state_dict() is loaded into it, whatever `model` has changed
    beside it since.

    Raises:
        NotCopyable: a UserError.
    """
    loose = {id(t) for t in loose_tensors(model)}
    memo: dict[int, Any] = {}
    for tensor in network_state(model).tensors:
        value = tensor.detach().clone() if id(tensor) in loose else tensor.detach()
        memo[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    return _over_same_memory(model, memo)


def loose_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors that `model` reaches and that its state_dict(), and so a checkpoint, does not hold."""
    stored = {_memory(t) for t in model.state_dict().values() if isinstance(t, Tensor)}
    return [t for t in network_state(model).tensors if _memory(t) not in stored]


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):  # sparse and quantised tensors have no such memory
        return id(tensor)


def separate_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` with tensors of its own, which need no gradient.

    Raises:
        NotCopyable: a UserError.
    """
    return copy.deepcopy(_over_same_memory(model, _held(model)))


def _held(model: nn.Module) -> dict[int, Any]:
    """A deepcopy memo: each tensor and array of `model`, by id, mapped to one over the same memory."""
    found = network_state(model)
    tensors = {
        id(t): nn.Parameter(t.detach(), False) if isinstance(t, nn.Parameter) else t.detach()
        for t in found.tensors
    }
    return {**tensors, **{id(array): array for array in found.arrays}}


def _over_same_memory(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise NotCopyable(
            f"no replica of {type(model).__name__} can be made: "
            "copies of TorchScript do not follow its weights"
        )
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # copying a module runs foreign code, which may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotCopyable(
            f"no replica of {type(model).__name__} can be made ({reason}); make it copy.deepcopy-able"
        ) from None
