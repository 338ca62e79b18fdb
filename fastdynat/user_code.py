"""Python code of the user, named `path/to/file.py:NAME` or `module:NAME`, and how a run stores such a name.

A run stores the absolute path with a digest of the file, ``/path/net.py:make_net#sha256=0123456789abcdef``: a
pinned name. Opening it later runs code that a file on disk names, so it is refused unless the file has the
same content and this account has trained with it before (a record in the cache folder), or the user names it
again."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from fastdynat.errors import UserError, first_line

PUBLISHED = ("robustbench", "torchvision", "timm")  # in front of a colon: not the user's
HUB = "hf:"  # in front of a data set of the Hugging Face hub, or a folder in its formats
OBJECT = "object:"  # in front of the class of a Python object that was given to `fastdynat.train`
_PINNED = re.compile(r"(?P<name>.+)#sha256=(?P<digest>[0-9a-f]{16})", re.DOTALL)
_remembered: set[str] = set()  # by this process, for accounts without a cache folder
_neighbours: dict[str, dict[str, ModuleType]] = {}  # modules that files of a folder have imported from it


def is_user_code(name: str) -> bool:
    """True if `name` names code of the user: it has a colon, and no library or object before it."""
    kind, colon, rest = name.partition(":")
    return (
        bool(colon and kind and rest)
        and kind.lower() not in PUBLISHED
        and not (is_object(name) or is_hub_data(name))
    )


def is_hub_data(name: str) -> bool:
    """True if `name` names data that the library `datasets` loads: ``hf:NAME_OR_FOLDER``."""
    return name.startswith(HUB) and len(name) > len(HUB)


def is_user_supplied(name: str) -> bool:
    """True if `name` means a network or data of the user: code, or an object given in Python."""
    return is_user_code(name) or is_object(name)


def is_object(name: str) -> bool:
    """True if `name` stands for a Python object that was given to `fastdynat.train`."""
    return name.startswith(OBJECT)


def unpinned(name: str) -> str:
    """`name` without the digest that a run stores behind it."""
    match = _PINNED.fullmatch(name)
    return match["name"] if match else name


def check_stored(name: str, origin: str) -> str:
    """`name`, read from a file of a run at `origin`, unless it names code of the user without a digest.

    Raises:
        UserError: it does, which no run writes.
    """
    if is_user_code(name) and not _PINNED.fullmatch(name):
        raise UserError(
            f"{origin}: {name} names code without its digest, as no run does: it was damaged or edited"
        )
    return name


def short_name(name: str) -> str:
    """`name` for tables and messages: without the digest, and of a file without its folder.

    >>> short_name("/home/me/net.py:make_net#sha256=0123456789abcdef"), short_name("timm:vit_tiny")
    ('net.py:make_net', 'timm:vit_tiny')
    """
    return os.path.basename(unpinned(name)) if is_user_code(name) else name


def without_place(name: str) -> str:
    """A pinned name without its folder and file: equal for one object of files with the same content.

    >>> without_place("/home/me/net.py:make_net#sha256=0123456789abcdef"), without_place("trades")
    ('make_net#sha256=0123456789abcdef', 'trades')
    """
    match = _PINNED.fullmatch(name)
    return f"{match['name'].rpartition(':')[2]}#sha256={match['digest']}" if match else name


def pin(name: str) -> str:
    """`name`, which the user has given now, as a run stores it; later `import_object` opens it on this
    account.

    Raises:
        UserError: it names no file.
    """
    if not is_user_code(name) or _PINNED.fullmatch(name):
        return name
    origin, _, attribute = name.rpartition(":")
    if not origin.endswith(".py"):
        raise UserError(f"{name}: to train with code of your own, name its file: path/to/file.py:{attribute}")
    plain = f"{os.path.abspath(origin)}:{attribute}"
    content = _content(Path(origin), name)
    _remember(plain, content)
    return f"{plain}#sha256={_digest(content)[:16]}"


def import_object(name: str) -> tuple[object, bytes]:
    """The object called `name`, and the bytes of the source file that it is in.

    The current directory, and the file's own, can be imported from while this runs.

    Raises:
        UserError: there is no such module or object, importing it fails, or a pinned name's file has changed,
            is gone, or was never used by this account.
    """
    match = _PINNED.fullmatch(name)
    if match:
        name = match["name"]
        _check_pinned(name, match["digest"])
    module = import_user_module(name)
    origin, _, attribute = name.rpartition(":")
    with importing_beside(name):
        try:
            found: object = attrgetter(attribute)(module)
        except AttributeError:
            raise UserError(f"{name}: {origin} has no {attribute!r}") from None
    return found, source_of(module)


def import_user_module(name: str) -> ModuleType:
    """The module of `name`: a file is run anew, another module imported.

    Raises:
        UserError: there is no such module, or importing it fails.
    """
    with importing_beside(name):
        return _module(name.rpartition(":")[0], name)


def source_of(module: ModuleType) -> bytes:
    """The bytes of the source file of `module`; empty where it has none."""
    file = getattr(module, "__file__", None)
    return Path(file).read_bytes() if file else b""


def call_object(function: object, name: str, offered: Mapping[str, object], what: str) -> object:
    """The result of `function`, called with those of `offered` that it has parameters for; `what` it should
    make.

    Raises:
        UserError: it cannot be called, or fails.
    """
    name = unpinned(name)
    if not callable(function):
        raise UserError(
            f"{name} is a {type(function).__name__}, which can be neither called nor used as {what}"
        )
    given: dict[str, object] = {}
    try:
        with importing_beside(name):
            parameters = inspect.signature(function).parameters
            given = {key: value for key, value in offered.items() if key in parameters}
            return function(**given)
    except (Exception, SystemExit) as error:
        called = ", ".join(given) or "no arguments"
        raise UserError(f"{name} was called with {called} and failed: {error_with_place(error)}") from error


def error_with_place(error: BaseException) -> str:
    """Type, first line and place of an error in someone else's code: the last line outside this package."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
    ]
    own = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
    frames = [frame for frame in frames if not frame.filename.startswith(own)] or frames
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
    if isinstance(error, SyntaxError):  # raised by the compiler, which has no frame in the file
        place = f"{error.filename}:{error.lineno}"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)} ({place})"


@contextmanager
def importing_beside(name: str) -> Iterator[None]:
    """Let the file in `name` import its neighbours and modules in the current directory.

    Files of two folders may each have a neighbour of the same name: each imports its own.
    """
    origin = name.rpartition(":")[0]
    own_folder = origin.endswith(".py")
    folder = os.path.dirname(os.path.realpath(origin)) if own_folder else str(Path.cwd())
    before = list(sys.path)
    sys.path[:0] = [folder, str(Path.cwd())]
    importlib.invalidate_caches()
    aside = _set_aside(folder) if own_folder else {}
    try:
        yield
    finally:
        sys.path[:] = before
        if own_folder:
            own = [key for key in _modules_named_as_in(folder) if _is_in(folder, key)]
            _neighbours[folder] = {key: sys.modules[key] for key in own}
        sys.modules.update(aside)


def _set_aside(folder: str) -> dict[str, ModuleType]:
    """Take modules of other folders that `folder` has neighbours of the same name for out of sys.modules."""
    others = [key for key in _modules_named_as_in(folder) if not _is_in(folder, key)]
    found = [key for key in others if not _is_installed(key)]
    aside = {key: sys.modules.pop(key) for key in found}
    sys.modules.update(_neighbours.get(folder, {}))
    return aside


def _modules_named_as_in(folder: str) -> list[str]:
    """The imported modules whose top-level name is that of an entry of `folder`, wherever they come from."""
    with suppress(OSError):
        names = {os.path.splitext(entry)[0] for entry in os.listdir(folder)}
        return [key for key in sys.modules if key.partition(".")[0] in names]
    return []


def _is_in(folder: str, module: str) -> bool:
    file = str(getattr(sys.modules.get(module), "__file__", None) or "")
    inside = os.path.realpath(file).startswith(os.path.join(folder, ""))
    return inside and not module.startswith("user_file_") and not _is_installed(module)


def _is_installed(module: str) -> bool:
    """True for modules of Python itself, of installed packages and of this one."""
    top = module.partition(".")[0]
    file = str(getattr(sys.modules.get(top), "__file__", None) or "")
    return not file or top in (*sys.stdlib_module_names, "fastdynat", "__main__") or "site-packages" in file


def _module(origin: str, name: str) -> ModuleType:
    try:
        return _run_file(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except (Exception, SystemExit) as error:  # a script may end itself where it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{origin}.".startswith(f"{missing}."):
            hint = (
                "a name with a colon is robustbench:, torchvision:, timm:, module:callable or "
                "path/to/file.py:callable"
            )
            raise UserError(f"{name}: no module {missing!r}, here or installed; {hint}") from None
        raise UserError(f"{name}: importing {origin} failed: {error_with_place(error)}") from error


def _run_file(path: Path) -> ModuleType:
    place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:8]  # files of one name are two modules
    name = f"user_file_{path.stem}_{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.compile look there
    spec.loader.exec_module(module)
    return module


def _check_pinned(plain: str, digest: str) -> None:
    """Raise UserError unless the pinned name may be opened."""
    content = _content(Path(plain.rpartition(":")[0]), plain)
    if _digest(content)[:16] != digest:
        raise UserError(
            f"{plain}: the file has changed since the run began with it; bring its old content back, or "
            f"start a new run"
        )
    if _key(plain, content) not in _remembered and not _is_recorded(plain, content):
        raise UserError(
            f"{plain} was never trained with on this account, and opening the run would execute it: read the "
            "file, then name it yourself (train --resume RUN --method FILE.py:NAME --model FILE.py:NAME "
            "--data FILE.py:NAME; or eval FILE.py:NAME --weights RUN/best/model.safetensors)"
        )


def _content(file: Path, name: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot read {file} ({error.strerror}); bring the file back") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _key(plain: str, content: bytes) -> str:
    return _digest(plain.encode("utf-8", "surrogateescape") + b"\0" + content)


def _record(key: str) -> Path | None:
    from fastdynat.machine.cache_folder import user_cache  # whose package imports torch

    base = user_cache("user_code")
    return None if base is None else base / key


def _is_recorded(plain: str, content: bytes) -> bool:
    path = _record(_key(plain, content))
    return path is not None and path.is_file()


def _remember(plain: str, content: bytes) -> None:
    from fastdynat.machine.cache_folder import replace_text

    key = _key(plain, content)
    _remembered.add(key)
    path = _record(key)
    if path is not None:
        with suppress(OSError):
            replace_text(path, plain.encode("utf-8", "replace").decode() + "\n")
