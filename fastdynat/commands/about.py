"""The commands that say what there is: recipes and doctor."""

from dataclasses import dataclass

from fastdynat.commands.parsing.parse import parse
from fastdynat.recipes import read_recipe, recipe_names


@dataclass(frozen=True, kw_only=True)
class RecipesCommand:
    """The published protocols that `fastdynat train --recipe NAME` follows; each one's source is in its
    file.
    """


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """What this machine can use: torch, CUDA, Triton, the extension, DALI, torch.compile; and why not."""

    json: bool = False
    """Print JSON instead of a table."""
    try_compile: bool = False
    """Also compile a tiny function with torch.compile (takes a while the first time)."""
    check: bool = False
    """Compare every implementation of the operators with eager PyTorch instead, and time it; exit code 1 if
    one is wrong."""


def recipes(argv: list[str]) -> int:
    """List the recipes."""
    parse(RecipesCommand, argv, "recipes")
    from fastdynat.terminal.consoles import PlainTable, output_console

    table = PlainTable("recipe", "method", "what it is")
    for name in recipe_names():
        values, about = read_recipe(name)
        table.add_row(name, values["method"], about)
    output_console().print(table)
    return 0


def doctor(argv: list[str]) -> int:
    """Say what this machine can use."""
    command = parse(DoctorCommand, argv, "doctor").command
    if command.check:
        from fastdynat.commands.doctor import operator_report as verification

        return verification.run(json=command.json)
    from fastdynat.commands.doctor import machine_report as machine

    return machine.run(json=command.json, try_compile=command.try_compile)
