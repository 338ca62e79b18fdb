"""A command's arguments as its dataclass: checked here, converted by tyro, which also prints the help."""

import contextlib
import inspect
import io
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Generic, TypeVar

import tyro

from fastdynat.commands.parsing.aliases import normalize
from fastdynat.commands.parsing.flags import flags_of
from fastdynat.commands.parsing.words import read_words
from fastdynat.errors import UserError
from fastdynat.launch import launched_rank
from fastdynat.methods import METHODS, options_type

CommandT = TypeVar("CommandT")
FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
HELP = ("-h", "--help")
# The flags that decide which defaults and which method's options a command has.
EARLY = ("--method", "--recipe", "--config", "--resume")


@dataclass(frozen=True)
class Parsed(Generic[CommandT]):
    """A command with its flags, and the names of those that were given, with their dashes."""

    command: CommandT
    given: frozenset[str]


def parse(
    command: type[CommandT],
    argv: Sequence[str],
    name: str,
    *,
    default: CommandT | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> Parsed[CommandT]:
    """The `command` called `name` with the flags in `argv`; what they leave out is as in `default`.

    Args:
        elsewhere: flags that the command has only next to other flags, each with the explanation.

    Raises:
        UserError: an argument that the command does not take, in one line.
        SystemExit: after printing the help.
    """
    given: Any = {} if default is None else {"default": default}
    asks = any(word in HELP or word.startswith("--tyro-") for word in argv)
    flags = flags_of(command, default)
    words = (
        None
        if asks
        else read_words(normalize(argv, flags), flags, name, {} if elsewhere is None else elsewhere)
    )
    for note in () if words is None or launched_rank() > 0 else words.notes:
        print(f"fastdynat: note: {note}", file=sys.stderr)
    arguments = list(argv) if words is None else words.for_tyro(flags)
    if any(word in HELP for word in argv):
        arguments = ["--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _unbroken_help() if asks else contextlib.nullcontext():
            parsed = tyro.cli(
                command,
                args=arguments,
                prog=f"fastdynat {name}",
                description=_about(command) if asks and "--method" in flags else None,
                config=FLAT,
                **given,
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(_plain(said.getvalue()) or f"see fastdynat {name} --help") from None
    return Parsed(parsed, frozenset(words.given if words is not None else ()))


@contextlib.contextmanager
def _unbroken_help() -> Iterator[None]:
    """Within it, help texts have no line breaks; tyro keeps those of a docstring whose lines are indented."""
    import docstring_parser

    parse_from_object: Callable[..., Any] = docstring_parser.parse_from_object

    def unbroken(*args: Any, **kwargs: Any) -> Any:
        found = parse_from_object(*args, **kwargs)
        for param in found.params:
            param.description = " ".join((param.description or "").split()) or None
        return found

    docstring_parser.parse_from_object = unbroken
    try:
        yield
    finally:
        docstring_parser.parse_from_object = parse_from_object


def _about(command: Any) -> str:
    """The description of `command`, with the names that its --method takes."""
    about = inspect.getdoc(typing.get_origin(command) or command)
    return f"{about}\n\nMethods: {', '.join(sorted(METHODS))}."


def _plain(box: str) -> str:
    """tyro's boxed error message in one line, for errors that the checks above do not find."""
    lines = (line.strip("│╭╮╰╯─ \t") for line in box.splitlines())
    return " ".join(line for line in lines if line)


def early_flags(argv: Sequence[str]) -> dict[str, str]:
    """The flags of `EARLY` in `argv`, with their values. Raises UserError for one without a value."""
    found = {}
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag not in EARLY:
            continue
        following = argv[i + 1 : i + 2]
        if not equals and (not following or following[0].startswith("-")):
            raise UserError(f"{flag} needs a value")
        found[flag] = value if equals else following[0]
        if not found[flag].strip():
            raise UserError(f"{flag} must not be empty; leave it out for its default")
    return found


class OtherMethodsFlags(Mapping[str, str]):
    """The flags of the other methods' options, each with the --method that has it.

    Methods are imported at the first lookup, which only an unknown flag causes.
    """

    def __init__(self, options: type) -> None:
        self._own = {field.name for field in fields(options)}

    @cached_property
    def _flags(self) -> dict[str, str]:
        found = dict[str, list[str]]()
        for method in METHODS:
            for field in fields(options_type(method)):
                if field.name not in self._own:
                    found.setdefault(f"--{field.name.replace('_', '-')}", []).append(method)
        return {
            flag: f"it is an option of --method {' or '.join(methods)}" for flag, methods in found.items()
        }

    def __getitem__(self, flag: str) -> str:
        return self._flags[flag]

    def __iter__(self) -> Iterator[str]:
        return iter(self._flags)

    def __len__(self) -> int:
        return len(self._flags)


def of_options(command: Any, options: type) -> Any:
    """The generic `command` with `options` as the type of its options."""
    return command.__class_getitem__(options)
