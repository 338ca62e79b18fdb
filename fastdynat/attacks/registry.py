"""The registry of attacks: one entry per attack, made by `register` in the attack's own file.

Built-in entries are read from the sources of this folder, so that the command line lists and checks names
without importing torch. An attack's module is imported when the attack is first built.
"""

import ast
import dataclasses
import functools
import importlib
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastdynat.errors import UserError, unknown_name
from fastdynat.user_code import is_user_code

if TYPE_CHECKING:
    from fastdynat.attacks.interface import Attack

NORMS = ("linf", "l2", "l1", "l0")
CLEAN = "clean"  # the name of clean accuracy among the attacks
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Radii:
    """The numbers of an attack that its name leaves open. Sizes in [0, 1] pixel units.

    Attributes:
        eps: radius of the ball.
        step_size: of attacks with a fixed one.
        norm: linf, l2, l1 or l0.
    """

    eps: float
    step_size: float
    norm: str = "linf"

    def eps_under(self, norm: str) -> float:
        """The radius in which an attack of `norm` is judged: infinite where the ball is of another norm."""
        return self.eps if self.norm == norm else float("inf")


@dataclass(frozen=True)
class AttackEntry:
    """One attack of the registry.

    Attributes:
        pattern: regular expression of the attack's names; its named groups are the options in a name.
        help: one line for each name that is listed.
        norms: norms of the threat model under which the attack can be asked for.
        half_precision: the attack was shown to be as strong in half precision.
        module: the module that registers it.
        constructor: name of the registered function or class in this module.
    """

    pattern: str
    help: Mapping[str, str]
    norms: tuple[str, ...] = NORMS
    half_precision: bool = False
    module: str = ""
    constructor: str = ""

    def match(self, name: str) -> re.Match[str] | None:
        """The match of `name`; None where the name is another attack's."""
        return re.fullmatch(self.pattern, name)

    def check_norm(self, match: re.Match[str], norm: str) -> None:
        """Raise UserError where the attack has no form for `norm`."""
        if norm not in self.norms:
            steps = match.groupdict().get("steps") or 20
            *most, last = self.norms
            known = f"{', '.join(most)} and {last}" if most else last
            raise UserError(
                f"attack {match.string!r}: no {norm} form of it is known, only {known}; "
                f"use pgd{steps} under {norm}"
            )

    def build(self, match: re.Match[str], radii: Radii) -> "Attack":
        """The attack that `match` names.

        Raises:
            UserError: the attack has no form for the norm, or numbers that it refuses.
        """
        self.check_norm(match, radii.norm)
        if self.pattern not in _constructors:
            importlib.import_module(self.module)
        constructor = _constructors[self.pattern]
        if isinstance(constructor, type):
            return from_fields(constructor, radii, match.groupdict())
        return typing.cast("Attack", constructor(match, radii))


_registered: dict[str, AttackEntry] = {}  # by pattern
_constructors: dict[str, Callable[..., Any]] = {}


def register(
    pattern: str,
    help: str | Mapping[str, str],
    *,
    norms: tuple[str, ...] = NORMS,
    half_precision: bool = False,
) -> Callable[[F], F]:
    r"""Decorator that makes an attack known by name, to `parse_attack` and ``fastdynat eval --attacks``.

    It goes on a function of the name's match and the `Radii` that returns the attack, or on the attack's
    dataclass: its fields `eps`, `step_size` and `norm` then take the radii, and each named group of the
    pattern fills the field of the same name.

    Args:
        pattern: regular expression that whole names match, in lower case: ``r"noise(?P<draws>\d+)?"``.
        help: one line for each name to be listed, ``{"noise": "..."}``; a string alone is the line of the
            name that `pattern` is.
        norms: norms of the threat model under which the attack can be asked for.
        half_precision: the attack was shown to be as strong in half precision.

    In a file of this folder all arguments must be literals, because they are also read without an import.

    Raises:
        UserError: a listed name does not match the pattern, or is another attack's.
    """
    lines = {pattern: help} if isinstance(help, str) else dict(help)

    def add(constructor: F) -> F:
        entry = AttackEntry(
            pattern, lines, tuple(norms), half_precision, constructor.__module__, constructor.__qualname__
        )
        _check(entry)
        _registered[pattern] = entry
        _constructors[pattern] = constructor
        return constructor

    return add


def entries() -> list[AttackEntry]:
    """Every attack: the built-in ones, then those that were registered since."""
    return list({**_built_in(), **_registered}.values())


def listed() -> dict[str, str]:
    """Every listed name with its line of help."""
    names = {name: line for entry in entries() for name, line in entry.help.items()}
    return {CLEAN: "no attack", **names}


def find(name: str, known: Iterable[str] = ()) -> tuple[AttackEntry, re.Match[str]]:
    """The attack called `name`, and the match of its pattern.

    Args:
        known: names to suggest beside the registered ones.

    Raises:
        UserError: no attack has this name; suggests the nearest.
    """
    for entry in entries():
        if match := entry.match(name):
            return entry, match
    raise unknown_name("attack", name, {*listed(), *known})


def split_names(names: str) -> list[str]:
    """The names of a comma-separated list, in lower case but for those of users' files.

    Raises:
        UserError: no name, or one twice.
    """
    parts = [name.strip() for name in names.split(",") if name.strip()]
    parts = [name if is_user_code(name) else name.lower() for name in parts]
    if not parts:
        raise UserError(f"no attack named in {names!r}; for example clean,fgsm,pgd20,cw")
    if len(set(parts)) != len(parts):
        raise UserError(f"attacks named twice in {names!r}")
    return parts


def from_fields(cls: type, radii: Radii, options: Mapping[str, str | None]) -> Any:
    """An attack of the dataclass `cls`: radii by the names of its fields, and `options` that are not None."""
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    numbers = {name: value for name, value in dataclasses.asdict(radii).items() if name in names}
    given = {name: text for name, text in options.items() if text is not None}
    if unknown := given.keys() - names:
        raise UserError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}, which its pattern names")
    convert = {int: int, float: float}
    return cls(**numbers, **{name: convert.get(hints[name], str)(text) for name, text in given.items()})


def _check(entry: AttackEntry) -> None:
    """Raise UserError unless the names of `entry` are its own."""
    if not entry.help:
        raise UserError(f"attack {entry.pattern!r} lists no name: give help={{name: one line}}")
    for name in entry.help:
        if not entry.match(name) or name != name.lower():
            raise UserError(f"attack name {name!r} must be in lower case and match {entry.pattern!r}")
    for other in entries():
        if _same(entry, other):
            continue
        taken = [name for name in entry.help if other.match(name)]
        taken += [name for name in other.help if entry.match(name)]
        if taken:
            raise UserError(f"the attack name {taken[0]!r} is taken by {other.module}.{other.constructor}")


def _same(one: AttackEntry, other: AttackEntry) -> bool:
    """Both are one definition, which a reloaded module or a notebook's cell makes again."""
    return (one.module, one.constructor) == (other.module, other.constructor)


@functools.cache
def _built_in() -> dict[str, AttackEntry]:
    found = [e for file in sorted(Path(__file__).parent.glob("*.py")) for e in read_entries(file)]
    return {entry.pattern: entry for entry in found}


def read_entries(file: Path) -> list[AttackEntry]:
    """The entries that `file` of this folder registers, read from its source."""
    source = file.read_text(encoding="utf-8")
    if "@register(" not in source:
        return []
    found = []
    for node in ast.parse(source).body:
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register":
                args = [ast.literal_eval(value) for value in call.args]
                options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
                name: str = node.name  # type: ignore[attr-defined]
                found.append(_read_entry(*args, **options, module=file.stem, constructor=name))
    return found


def _read_entry(
    pattern: str, help: str | dict[str, str], *, module: str, constructor: str, **options: Any
) -> AttackEntry:
    lines = {pattern: help} if isinstance(help, str) else help
    return AttackEntry(pattern, lines, module=f"{__package__}.{module}", constructor=constructor, **options)
