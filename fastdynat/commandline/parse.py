"""From a command's words to its configuration: tyro reads the types and writes the help."""

import argparse
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import tyro

from fastdynat.commandline.aliases import normalize
from fastdynat.errors import UserError

CommandT = TypeVar("CommandT")
FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def parse(
    command: type[CommandT], argv: Sequence[str], name: str, *, default: CommandT | None = None, own: Collection[str] = ()
) -> CommandT:
    """The `command` called `name` with the flags in `argv`; what they leave out is as in `default`.

    Args:
        own: flags that are the command's, not another script's spelling.
    """
    given: Any = {} if default is None else {"default": default}
    return tyro.cli(command, args=normalize(argv, own), prog=f"fastdynat {name}", config=FLAT, **given)


def own_flags(options: type) -> set[str]:
    """The flags of a method's options."""
    return {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(options)}


def early_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags that decide which defaults and which method's options the full parser has."""
    parser = argparse.ArgumentParser(prog="fastdynat train", add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--method", "--recipe", "--config", "--resume"):
        parser.add_argument(flag)
    try:
        return parser.parse_known_args(argv)[0]
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def of_options(command: Any, options: type) -> Any:
    """The generic `command` with `options` as its type of options, which is known only now."""
    return command.__class_getitem__(options)
