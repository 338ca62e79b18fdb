"""`fastdynat recipes`: the published protocols as a table."""

from dataclasses import dataclass

from fastdynat.commands.parsing.parse import parse
from fastdynat.recipes import read_recipe, recipe_names


@dataclass(frozen=True, kw_only=True)
class RecipesCommand:
    """List the published protocols that `fastdynat train --recipe NAME` follows."""


def recipes_command(argv: list[str]) -> int:
    """Run `fastdynat recipes`."""
    parse(RecipesCommand, argv, "recipes")
    from fastdynat.terminal.consoles import PlainTable, output_console

    table = PlainTable("recipe", "method", "description")
    for name in recipe_names():
        values, description = read_recipe(name)
        table.add_row(name, values["method"], description)
    output_console().print(table)
    return 0
