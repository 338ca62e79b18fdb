"""The flags of a command, read from its dataclasses as tyro reads them."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

import tyro

from fastdynat.commands.parsing.aliases import BARE
from fastdynat.errors import UserError, nearest, shown

# Other ways of writing a choice: of the norm, as torchattacks, robustness and the release of AWP do.
SPELLINGS = {"inf": "linf", "0": "l0", "1": "l1", "2": "l2"}
MOST_DIGITS = 25


@dataclass(frozen=True)
class Flag:
    """One flag, or the positional arguments.

    Attributes:
        name: with its dashes; the field's name for positional arguments.
        hint: type of one value.
        values: "none" (a switch), "one", "many" (up to the next flag), or "each" (one for each time it is
            given).
        positional: whether these are the command's positional arguments.
        required: whether it has no default.
    """

    name: str
    hint: Any
    values: str
    positional: bool = False
    required: bool = False

    @property
    def bare(self) -> str | None:
        """The value of the flag without one; None if it needs a value."""
        return BARE[self.name][0] if self.name in BARE else None

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a Literal; empty for other types."""
        return typing.get_args(self.hint) if typing.get_origin(self.hint) is Literal else ()

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of a value."""
        return (
            typing.get_args(self.hint)
            if typing.get_origin(self.hint) in (Union, types.UnionType)
            else (self.hint,)
        )

    def read(self, text: str) -> str:
        """`text` as tyro takes it. Raises UserError for another type; ranges are checked later."""
        kinds = self.kinds
        if self.choices:
            return self._choice(text)
        if type(None) in kinds and text == "None":
            return text
        if not text.strip():
            raise UserError(f"{self.name} must not be empty; leave it out for its default")
        if str in kinds:
            return text
        if int in kinds and not (
            text.lstrip("+-").isdecimal() and text.isascii() and len(text) <= MOST_DIGITS
        ):
            raise UserError(f"{self.name} must be a whole number, got {shown(text)}")
        if float in kinds and not _is_number(text):
            raise UserError(f"{self.name} must be a number, got {shown(text)}")
        return text

    def _choice(self, text: str) -> str:
        if text in self.choices:
            return text
        plain = _plain(text)
        for choice in self.choices:
            if plain == _plain(choice) or SPELLINGS.get(plain) == choice:
                return choice
        hint = nearest(text, self.choices, n=1)
        more = f"; did you mean {hint}?" if hint else ""
        raise UserError(f"{self.name} must be {_listed(self.choices)}, got {shown(text)}{more}")


def _plain(text: str) -> str:
    return text.lower().replace("_", "").replace("-", "")


def _listed(choices: typing.Sequence[str]) -> str:
    *first, last = sorted(choices, key=lambda choice: choice == "auto")  # what was probably meant comes first
    return f"{', '.join(first)} or {last}" if first else last


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text and text.isascii()


def flags_of(command: Any, default: Any = None) -> dict[str, Flag]:
    """The flags of a command's dataclass by name, nested ones included; ``positional`` for the others.

    Args:
        command: the class, subscripted where it is generic.
        default: an instance, whose values give the types of generic fields.
    """
    found: dict[str, Flag] = {}
    cls = typing.get_origin(command) or command
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        value = None if default is None else getattr(default, field.name)
        hint = type(value) if isinstance(hints[field.name], TypeVar) else hints[field.name]
        inner = typing.get_origin(hint) or hint
        if dataclasses.is_dataclass(inner):
            inner_flags = flags_of(inner, value)
            if twice := found.keys() & inner_flags.keys():
                raise UserError(
                    f"{min(twice)} would be two flags of this command: rename the method's option"
                )
            found |= inner_flags
            continue
        flag = _flag(field.name, hint)
        if default is None and field.default is field.default_factory is dataclasses.MISSING:
            flag = dataclasses.replace(flag, required=True)
        found["positional" if flag.positional else flag.name] = flag
    return found


def _flag(name: str, hint: Any) -> Flag:
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        marks = tuple(rest)
    positional = any(mark is tyro.conf.Positional for mark in marks)
    renamed = next(
        (mark.name for mark in marks if getattr(mark, "name", None) and hasattr(mark, "metavar")), name
    )
    values = "none" if hint is bool else "one"
    if typing.get_origin(hint) is tuple:
        values = "each" if any(mark is tyro.conf.UseAppendAction for mark in marks) else "many"
        hint = typing.get_args(hint)[0]
    return Flag(renamed if positional else f"--{renamed.replace('_', '-')}", hint, values, positional)
