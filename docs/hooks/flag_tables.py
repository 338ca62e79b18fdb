"""Tables of all flags of the command line, generated from the dataclasses that the commands parse."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tables import table

from fastdynat.commands.bench.command import BenchCommand
from fastdynat.commands.boundary.command import BoundaryCommand
from fastdynat.commands.compare.command import CompareCommand
from fastdynat.commands.doctor.command import DoctorCommand
from fastdynat.commands.evaluate.attack_names import known_names
from fastdynat.commands.evaluate.command import EvalCommand
from fastdynat.commands.export.command import ExportCommand
from fastdynat.commands.pack import PackCommand
from fastdynat.commands.parsing.aliases import GPU, SPELLINGS, VALUES
from fastdynat.commands.parsing.flags import Flag, flags_of
from fastdynat.commands.recipes.command import RecipesCommand
from fastdynat.commands.report.command import ReportCommand
from fastdynat.commands.speedrun.command import SpeedrunCommand
from fastdynat.commands.train import TrainCommand
from fastdynat.methods import METHODS, options_type
from fastdynat.recipes import read_recipe, recipe_names

COMMANDS: dict[str, Any] = {
    "train": TrainCommand,
    "pack": PackCommand,
    "eval": EvalCommand,
    "compare": CompareCommand,
    "export": ExportCommand,
    "report": ReportCommand,
    "boundary": BoundaryCommand,
    "recipes": RecipesCommand,
    "speedrun": SpeedrunCommand,
    "bench": BenchCommand,
    "doctor": DoctorCommand,
}


@dataclass(frozen=True)
class Group:
    """Fields of one dataclass that are flags, in order: (flag, type, default, help)."""

    owner: type
    title: str
    rows: list[tuple[str, str, str, str]]


def helps(cls: type) -> dict[str, str]:
    """The string under each field of `cls` and of what it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def groups(cls: Any) -> Iterator[Group]:
    """The flags of dataclass `cls`, its own first, then those of the dataclasses in it."""
    cls = typing.get_origin(cls) or cls
    hints, texts, flags = typing.get_type_hints(cls, include_extras=True), helps(cls), own_flags(cls)
    rows, nested = [], []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = typing.get_origin(hint) or hint
        if dataclasses.is_dataclass(inner):
            nested.append(inner)
        elif field.name in flags:
            flag = flags[field.name]
            rows.append((f"`{flag.name}`", kind(flag), default(field), texts.get(field.name, "")))
    yield Group(cls, first_line(cls), rows)
    for inner in nested:
        yield from groups(inner)


def own_flags(cls: Any) -> dict[str, Flag]:
    """The flags of the fields of `cls` itself by the field's name."""
    plain = [field for field in dataclasses.fields(cls) if not isinstance(field.type, typing.TypeVar)]
    found = {}
    for field in plain:
        hint = typing.get_type_hints(cls, include_extras=True)[field.name]
        if isinstance(hint, typing.TypeVar) or dataclasses.is_dataclass(typing.get_origin(hint) or hint):
            continue
        single = dataclasses.make_dataclass("Single", [(field.name, hint)])
        found[field.name] = next(iter(flags_of(single).values()))
    return found


def kind(flag: Flag) -> str:
    """The values of a flag, for a cell."""
    if flag.values == "none":
        return "switch"
    if flag.choices:
        return ", ".join(f"`{choice}`" for choice in flag.choices)
    names = {int: "integer", float: "number", str: "text", bool: "switch"}
    kinds = [names.get(value, "path") for value in flag.kinds if value is not type(None)]
    text = " or ".join(dict.fromkeys(kinds))
    return {"many": f"{text}, several", "each": f"{text}, repeatable"}.get(flag.values, text)


def default(field: "dataclasses.Field[Any]") -> str:
    """A field's default, in a cell."""
    if field.default_factory is not dataclasses.MISSING:
        return "" if dataclasses.is_dataclass(field.default_factory) else f"`{field.default_factory()}`"
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, tuple):
        return f"`{' '.join(map(str, field.default))}`" if field.default else ""
    return "" if field.default is None else f"`{field.default}`"


def first_line(cls: type) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def cell(text: str) -> str:
    """`text` with what would end a cell of a Markdown table escaped."""
    return text.replace("|", "\\|")


def command(name: str) -> str:
    """Every flag of the command called `name` but options of methods, and but what it shares with train."""
    shared = set() if name == "train" else {group.owner for group in groups(TrainCommand)}
    first, *others = (group for group in groups(COMMANDS[name]) if group.owner not in shared)
    parts = [first.title, *flag_table(first)]
    for group in others:
        if group.rows:
            parts += [f"**{group.title.rstrip('.')}**", *flag_table(group)]
    return "\n\n".join(parts)


def flag_table(group: Group) -> list[str]:
    """The flags of a group as a table; nothing where it has none."""
    rows = [[cell(value) for value in row] for row in group.rows]
    return [table(["Flag", "Value", "Default", "Meaning"], rows)] if rows else []


def methods() -> str:
    """The options of every method."""
    parts = []
    for name in METHODS:
        options = options_type(name)
        (group,) = groups(options)
        parts += [f"### {name}", *(flag_table(group) or ["No options."])]
    return "\n\n".join(parts)


def spellings() -> str:
    """Flags of other scripts and what they stand for here."""
    rows = [[f"`{flag}`", ", ".join(f"`{other}`" for other in others)] for flag, others in SPELLINGS.items()]
    values: dict[str, list[str]] = {}
    for other, meaning in VALUES.items():
        values.setdefault(meaning, []).append(other)
    rows += [
        [f"`{meaning}`", ", ".join(f"`{other}`" for other in others)] for meaning, others in values.items()
    ]
    rows.append(["`--device cuda:N`", ", ".join(f"`{flag} N`" for flag in GPU)])
    return table(["Here", "Elsewhere"], rows)


def attacks() -> str:
    """Every name that --attacks takes."""
    return table(["Name", "What it is"], [[f"`{name}`", cell(text)] for name, text in known_names().items()])


def recipes() -> str:
    """Every recipe."""
    rows = []
    for name in recipe_names():
        recipe = read_recipe(name)
        rows.append([f"`{name}`", f"`{recipe.values['method']}`", cell(recipe.about)])
    return table(["Recipe", "Method", "What it is"], rows)
