"""The training methods by name. A file in this folder adds one by `register`; nothing lists them by hand.

Until a method's class is used, its file is imported without torch (`fastdynat.lazy.import_late`): the command
line needs the options alone.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping
from importlib.util import find_spec
from typing import Any, TypeVar

from fastdynat.errors import UserError, unknown_name
from fastdynat.lazy import finish_imports, import_late
from fastdynat.methods.base import Method, check_method
from fastdynat.methods.user_methods import pinned_method, user_method
from fastdynat.user_code import is_user_code, unpinned

PACKAGE = __name__.rpartition(".")[0]
MethodT = TypeVar("MethodT", bound=type[Method[Any]])


class Methods(MutableMapping[str, type[Method[Any]]]):
    """The methods by name, in alphabetical order: one per file of this folder, and those added since.

    Users add a method as to a dictionary, or by `register`.
    """

    def __init__(self) -> None:
        self._classes: dict[str, type[Method[Any]]] = {}
        self._complete = False

    def __getitem__(self, name: str) -> type[Method[Any]]:
        found = self.registered(name)
        if (module := sys.modules.get(found.__module__)) is not None:
            finish_imports(module)
        return found

    def __setitem__(self, name: str, method: type[Method[Any]]) -> None:
        self._find_all()
        check_method(method)
        self._classes[name] = method

    def __delitem__(self, name: str) -> None:
        self._find_all()
        del self._classes[name]

    def __contains__(self, name: object) -> bool:
        if not self._complete and isinstance(name, str) and name.isidentifier():
            self._find(name)
        if name not in self._classes:
            self._find_all()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        self._find_all()
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        self._find_all()
        return len(self._classes)

    def registered(self, name: str) -> type[Method[Any]]:
        """The class called `name`; its functions may still lack their imports. KeyError if there is none."""
        if name not in self:
            raise KeyError(name)
        return self._classes[name]

    def add(self, name: str, method: type[Method[Any]]) -> None:
        """Add `method`. Raises UserError if it is not a method, or another one has the name."""
        check_method(method)
        other = self._classes.get(name)
        if other is not None and other.__module__ != method.__module__:
            raise UserError(f"method {name} is {other.__module__}.{other.__name__}: choose another name")
        self._classes[name] = method

    def _find(self, name: str) -> None:
        """Import the file of this folder that has the name of the method, if there is one."""
        if find_spec(f"{PACKAGE}.{name}") is not None:
            import_late(f"{PACKAGE}.{name}")

    def _find_all(self) -> None:
        """Import the files of this folder, at the first look."""
        if not self._complete:
            for module in pkgutil.iter_modules(sys.modules[PACKAGE].__path__):
                import_late(f"{PACKAGE}.{module.name}")
            self._complete = True


METHODS = Methods()


def register_method(name: str) -> Callable[[MethodT], MethodT]:
    """Add the decorated class to `METHODS` as `name`, which becomes its `name`."""

    def add(method: MethodT) -> MethodT:
        METHODS.add(name, method)
        method.name = name
        return method

    return add


def method_name(name: str) -> str:
    """The method that `name` means, as a configuration holds it.

    A name of `METHODS` may have any case. ``path/to/file.py:CLASS`` is loaded; its absolute path and a digest
    of the file are the name that a run stores.

    Raises:
        UserError: there is no such method (suggests the nearest), or its file or class cannot be used.
    """
    if is_user_code(name):
        pinned = pinned_method(name)
        check_label(user_method(pinned), unpinned(name))
        return pinned
    if name.lower() not in METHODS:
        raise unknown_name("method", name, METHODS)
    return name.lower()


def method_class(name: str) -> type[Method[Any]]:
    """The class of the method that `name` means. Raises UserError as `method_name` does."""
    name = method_name(name)
    return user_method(name) if is_user_code(name) else METHODS[name]


def method_label(name: str) -> str:
    """The method that `name` means in one word, for tables and folders: its class's `name`.

    Raises UserError as `method_name` does.
    """
    name = method_name(name)
    return user_method(name).name if is_user_code(name) else name


def options_type(name: str) -> type:
    """The options of the method that `name` means, a frozen dataclass; built-in ones need no torch.

    Raises UserError as `method_name` does.
    """
    name = method_name(name)
    return (user_method(name) if is_user_code(name) else METHODS.registered(name)).options_type


def check_label(method: type[Method[Any]], origin: str) -> None:
    """Raise UserError if the `name` of a user's method is taken, or cannot be part of a folder's name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", method.name):
        raise UserError(f"{origin}: name {method.name!r} must be one word of letters, digits, _ and -")
    if method.name in METHODS and METHODS.registered(method.name) is not method:
        raise UserError(
            f"{origin}: name {method.name!r} is taken by {METHODS.registered(method.name).__module__}; "
            "choose another"
        )
