"""Everything that a network's output may depend on beside tensor values: all objects that it reaches."""

import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis)}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
)
# Not state: the attack sets modes itself, and compiled code derives from the rest.
NOT_STATE = frozenset(
    {"training", "_compiled_call_impl", "_non_persistent_buffers_set", "_is_full_backward_hook"}
)
# Objects of these packages count by identity: a forward pass reads no numbers inside them.
OPAQUE = frozenset(
    {"torch", "logging", "threading", "_thread", "weakref", "io", "random", "concurrent", "multiprocessing"}
)
MOST = 200_000  # marks; beyond them, only the comparison of logits detects changes


@dataclass(frozen=True)
class NetworkState:
    """Objects reached from a network.

    Attributes:
        marks: equal between calls as long as nothing but tensor values (which a replica shares), training
            flags and gradients has changed.
        tensors: all tensors in modules and plain objects, including parameters and buffers.
        arrays: the same for NumPy arrays.
        hidden: modules that are held but not registered as submodules.
    """

    marks: list[Any]
    tensors: list[Tensor]
    arrays: list[Any]
    hidden: list[nn.Module]


def network_state(model: nn.Module) -> NetworkState:
    """Traverse `model`: attributes, containers, hooks, functions, closures and the globals they name.

    Code and objects of installed packages count by identity, but attributes of their modules are followed.
    Nothing is called, so changes of a property's value or of a file are not seen.
    """
    traversal = _Traversal(model)
    traversal.visit(model)
    for name in ("forward", "forward_pre", "backward", "backward_pre"):
        traversal.visit_all(getattr(torch_module, f"_global_{name}_hooks").values())
    return NetworkState(traversal.marks, traversal.tensors, traversal.arrays, traversal.hidden)


class _Traversal:
    def __init__(self, model: nn.Module) -> None:
        self.marks: list[Any] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[Any] = []
        self.hidden: list[nn.Module] = []
        self._registered = {id(module) for module in model.modules()}
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # keeps visited objects alive, so that ids stay unique

    def visit(self, value: Any) -> None:
        kind = type(value)
        if kind in PLAIN:
            self.marks.append(value)
            return
        if len(self.marks) > MOST:
            return
        if self._visited(value):
            return
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, Mapping):
            self.marks.append(len(value))
            for key, item in list(value.items()):
                self.visit(key)
                self.visit(item)
        elif isinstance(value, (list, tuple, deque)):
            self.marks.append(len(value))
            self.visit_all(value)
        elif isinstance(value, (set, frozenset)):
            self.marks.append(frozenset(item if type(item) in PLAIN else id(item) for item in value))
        else:
            self._callable_or_object(value, kind)

    def _visited(self, value: Any) -> bool:
        """True if `value` was visited before; the marks then hold its number instead."""
        known = self._seen.get(id(value))
        if known is None:
            self._seen[id(value)] = len(self._seen)
            return False
        self.marks.append(known)
        return True

    def visit_all(self, values: Iterable[Any]) -> None:
        self._kept.append(values := list(values))
        for value in values:
            self.visit(value)

    def _tensor(self, tensor: Tensor) -> None:
        self.marks.append(storage_key(tensor))
        self.tensors.append(tensor)

    def _module(self, module: nn.Module) -> None:
        registered = id(module) in self._registered
        # A weak reference: a new module never equals a dead one at the same address.
        self.marks.append(weakref.ref(module))
        if not registered:
            self.hidden.append(module)
            self.marks.append(module.training)
        self._class(type(module))
        for name, value in vars(module).items():
            kind = type(value)
            if kind in PLAIN:
                if name not in NOT_STATE:
                    self.marks.append(name)
                    self.marks.append(value)
            elif name in NOT_STATE or (isinstance(value, dict) and not value):
                continue
            elif isinstance(value, Tensor) and _recomputed(module, name):
                self.tensors.append(value)
            elif name.endswith(("_hooks", "_hooks_with_kwargs")) and isinstance(value, dict):
                self.marks.append(name)
                self.visit_all(value.values())  # their keys change at each registration
            else:
                self.marks.append(name)
                self.visit(value)

    def _callable_or_object(self, value: Any, kind: type) -> None:
        if kind is types.FunctionType:
            self._function(value)
        elif kind is types.MethodType:
            self.visit(value.__func__)
            self.visit(value.__self__)
        elif kind is functools.partial:
            self.visit_all((value.func, value.args, value.keywords))
        elif isinstance(value, type):
            self._class_marks(value)
        elif isinstance(value, (staticmethod, classmethod)):
            self.visit(value.__func__)
        elif kind is property:
            self.visit(value.fget)
        elif isinstance(value, Enum):
            self.marks.append(value.name)
        elif type(value).__module__ == "numpy":
            self._array(value)
        elif not isinstance(value, types.ModuleType):
            self._object(value, kind)

    def _function(self, function: types.FunctionType) -> None:
        self.marks.append(function.__code__)
        if is_installed(function.__module__):
            return
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:  # not filled yet
                self.marks.append(None)
        self.visit_all((function.__defaults__, function.__kwdefaults__))
        names = _names(function.__code__)
        for name in names:
            found = function.__globals__.get(name)
            if not isinstance(found, types.ModuleType):
                self.visit(found)
            elif not is_installed(found.__name__):
                inside = (vars(found).get(other) for other in names)
                self.visit_all(value for value in inside if not isinstance(value, types.ModuleType))

    def _class(self, kind: type) -> None:
        if not self._visited(kind):
            self._class_marks(kind)

    def _class_marks(self, kind: type) -> None:
        self.marks.append(weakref.ref(kind))
        for base in kind.__mro__:
            if base in (object, nn.Module):
                continue
            if is_installed(base.__module__):
                self.marks.append(id(vars(base).get("forward")))
                continue
            for name, value in list(vars(base).items()):
                if not name.startswith("__") or name == "__call__":
                    self.visit(value)

    def _array(self, array: Any) -> None:
        if hasattr(array, "tobytes"):
            self.marks.append(array.tobytes() if array.nbytes <= 4096 else hash(array.tobytes()))
            self.arrays.append(array)

    def _object(self, value: Any, kind: type) -> None:
        top = kind.__module__.partition(".")[0]
        if top in OPAQUE or kind.__module__ == "builtins":
            self.marks.append(id(value))
            return
        self._class(kind)
        if hasattr(value, "__dict__"):
            self.visit(vars(value))
        for base in kind.__mro__:
            slots = base.__dict__.get("__slots__", ())
            self.visit_all(
                getattr(value, name, None) for name in ((slots,) if isinstance(slots, str) else slots)
            )


def _recomputed(module: nn.Module, name: str) -> bool:
    """True if pruning, spectral or weight norm of torch sets this attribute at every forward pass."""
    return f"{name}_orig" in module._parameters or f"{name}_v" in module._parameters


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Memory, dtype and layout of a tensor: equal for tensors that always have the same values."""
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
    except (RuntimeError, ValueError):  # sparse, quantised or uninitialised tensors have no data pointer
        return id(tensor), tensor.dtype, tensor.device


@functools.lru_cache(maxsize=4096)
def is_installed(module: str | None) -> bool:
    """True if this module belongs to Python or a package, and so does not change while a script runs."""
    if module is None:
        return False
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("torch", "torchvision", "timm", "numpy", "fastdynat"):
        return True
    return "site-packages" in str(getattr(sys.modules.get(top), "__file__", ""))


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals and attributes in `code` and its nested functions."""
    nested = (name for inner in code.co_consts if isinstance(inner, types.CodeType) for name in _names(inner))
    return tuple(dict.fromkeys((*code.co_names, *nested)))
