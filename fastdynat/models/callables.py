"""A network from the user's own code: `module:callable` or `path/to/file.py:callable`."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from torch import nn

from fastdynat.errors import UserError, first_line


def network_of(name: str, offered: dict[str, object]) -> tuple[nn.Module, bytes]:
    """The network that `name` makes, and the bytes of the source file that it is in.

    The current directory (and the file's own) can be imported from while this runs. What is offered is passed
    where the callable has a parameter of that name. A network in place of a callable is taken as it is.

    Raises: UserError where there is no such module or callable, where it raises, or makes no nn.Module.
    """
    origin, _, attribute = name.rpartition(":")
    folder = os.path.dirname(os.path.realpath(origin)) if origin.endswith(".py") else str(Path.cwd())
    with _importing_from(folder, str(Path.cwd())):
        module = _module(origin, name)
        try:
            made = attrgetter(attribute)(module)
        except AttributeError:
            raise UserError(f"{name}: {origin} has no {attribute!r}") from None
        if not isinstance(made, nn.Module):
            made = _call(made, name, offered)
    if not isinstance(made, nn.Module):
        raise UserError(f"{name} makes a {type(made).__name__}, not a torch.nn.Module")
    file = getattr(module, "__file__", None)
    return made, Path(file).read_bytes() if file else b""


def where(error: BaseException) -> str:
    """Type, first line and place of an error in someone else's code."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
    if isinstance(error, SyntaxError):  # raised by the compiler, which has no frame in the file
        place = f"{error.filename}:{error.lineno}"
    return f"{type(error).__name__}: {first_line(error)} ({place})"


@contextmanager
def _importing_from(*folders: str) -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _module(origin: str, name: str) -> ModuleType:
    try:
        return _run_file(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except (Exception, SystemExit) as error:  # a script may end itself where it is imported
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and f"{origin}.".startswith(f"{error.name}.")
        ):
            hint = "a name with a colon is robustbench:, torchvision:, timm:, module:callable or path/to/file.py:callable"
            raise UserError(f"{name}: no module {error.name!r}, here or installed; {hint}") from None
        raise UserError(f"{name}: importing {origin} failed: {where(error)}") from error


def _run_file(path: Path) -> ModuleType:
    name = f"user_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.compile look there
    spec.loader.exec_module(module)
    return module


def _call(function: object, name: str, offered: dict[str, object]) -> object:
    if not callable(function):
        raise UserError(
            f"{name} is a {type(function).__name__}, which can be neither called nor used as a network"
        )
    given: dict[str, object] = {}
    try:
        parameters = inspect.signature(function).parameters
        given = {key: value for key, value in offered.items() if key in parameters}
        return function(**given)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{name} was called with {', '.join(given) or 'no arguments'} and failed: {where(error)}"
        ) from error
