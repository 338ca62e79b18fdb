"""Imports that wait until they are needed, so that the command line starts without torch.

`lazy_names` gives a package public names that are imported at their first use (PEP 562). `import_late` runs a
module without the imports that only its functions need, and adds these at the module's first use: what
``lazy import`` of Python 3.15 does (PEP 810), for source files that stay ordinary Python.
"""

import ast
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for `package`.

    Args:
        package: its ``__name__``.
        names: the public names by the module that has them, under `package` or, written out, elsewhere in
            fastdynat. None may be called like a submodule, which Python would put in its place.
    """
    origin = {name: module for module, own in names.items() for name in own}

    def getattr_(name: str) -> Any:
        if name not in origin:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = origin[name]
        module = module if module.startswith("fastdynat.") else f"{package}.{module}"
        value = getattr(importlib.import_module(module), name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origin})

    return getattr_, dir_


def import_late(name: str) -> ModuleType:
    """The module called `name`, without the imports that only its functions need.

    They run at the first look at one of the module's public names, or by `finish_imports`; until then no
    function of the module may be called. An import waits if none of its names is needed while the module
    runs: by a class body, a base class, a decorator, a default value, or a function or class that these name.
    Annotations of functions count as well, unless the module has ``from __future__ import annotations``.
    A module of the same package that is needed at once is imported late, too.
    """
    with _LOCK:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no source file for module {name!r}", name=name)
        with open(spec.origin, "rb") as file:
            at_once, late = _split(ast.parse(file.read(), spec.origin))
        package, _, own = name.rpartition(".")
        siblings = [import_late(other) for other in _imported_modules(at_once, package)]
        module = importlib.util.module_from_spec(spec)
        module.__dict__["__late_imports__"] = (compile(late, spec.origin, "exec"), siblings)
        module.__class__ = _LateModule
        sys.modules[name] = module
        try:
            with _loading():
                exec(compile(at_once, spec.origin, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        setattr(sys.modules[package], own, module)
        return module


def finish_imports(module: ModuleType) -> None:
    """Run the imports that `import_late` left out, of `module` and of those that it needed at once."""
    with _LOCK:
        waiting: tuple[CodeType, list[ModuleType]] | None = module.__dict__.pop("__late_imports__", None)
        if waiting is None:  # an ordinary module, or one whose imports are running
            return
        code, siblings = waiting
        try:
            for sibling in siblings:
                finish_imports(sibling)
            exec(code, module.__dict__)
        except BaseException:
            module.__dict__["__late_imports__"] = waiting
            raise
        module.__class__ = ModuleType


class _LateModule(ModuleType):
    """A module with imports that wait: a look at one of its public names runs them."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and not _THREAD.loading:
            finish_imports(self)
        return ModuleType.__getattribute__(self, name)


class _Thread(threading.local):
    loading = 0  # modules that this thread is importing late


_LOCK, _THREAD = threading.RLock(), _Thread()


@contextmanager
def _loading() -> Iterator[None]:
    _THREAD.loading += 1
    try:
        yield
    finally:
        _THREAD.loading -= 1


def _split(tree: ast.Module) -> tuple[ast.Module, ast.Module]:
    """The statements of a module that run at once, and its imports that can wait."""
    needed = _needed_names(tree)
    late: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom) and not _bound_names(statement) & needed:
            late.append(statement)
    at_once = [statement for statement in tree.body if statement not in late]
    return ast.Module(at_once, tree.type_ignores), ast.Module(late, [])


def _bound_names(statement: ast.Import | ast.ImportFrom) -> set[str]:
    """The names that an import binds; ``from __future__`` is needed by the compiler."""
    return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}


def _needed_names(tree: ast.Module) -> set[str]:
    """The names that are looked up while the module runs."""
    future = {
        alias.name
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        for alias in statement.names
    }
    bodies = {
        statement.name: _names_in([statement], everything=True)
        for statement in tree.body
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    needed = _names_in(tree.body, annotations="annotations" not in future)
    reached: set[str] = set()
    while more := (needed & bodies.keys()) - reached:
        reached |= more
        needed = needed.union(*(bodies[name] for name in more))
    return needed | future


def _names_in(
    statements: Sequence[ast.AST], *, everything: bool = False, annotations: bool = False
) -> set[str]:
    """The names in `statements`; those in the bodies of functions only if `everything`."""
    found: set[str] = set()
    todo = list(statements)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everything:
            todo += [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
            if annotations:
                arguments = ast.walk(node.args)
                todo += [a.annotation for a in arguments if isinstance(a, ast.arg) and a.annotation]
                todo += [node.returns] if node.returns else []
        else:
            todo += ast.iter_child_nodes(node)
    return found


def _imported_modules(tree: ast.Module, package: str) -> list[str]:
    """The modules of `package` from which `tree` imports names."""
    return [
        statement.module
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom)
        and statement.module is not None
        and statement.module.rpartition(".")[0] == package
    ]
