"""`fastdynat recipes`: the flags and the list, which need no torch."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from fastdynat.commands.parsing.parse import parse
from fastdynat.recipes import read_recipe, recipe_names


@dataclass(frozen=True, kw_only=True)
class RecipesCommand:
    """List the published protocols that `fastdynat train --recipe NAME` follows, or show one of them: its
    source, flags, published results, compute, and estimated time on this machine.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Recipe to show; without it, all of them are listed."""


def recipes_command(argv: list[str]) -> int:
    """Run `fastdynat recipes`."""
    command = parse(RecipesCommand, argv, "recipes").command
    from fastdynat.terminal.consoles import PlainTable, output_console

    if command.name is not None:
        recipe = read_recipe(command.name)
        from fastdynat.commands.recipes.show import show_recipe

        show_recipe(recipe, output_console())
        return 0
    table = PlainTable("recipe", "method", "AutoAttack %", "description")
    for name in recipe_names():
        recipe = read_recipe(name)
        published = recipe.published.get("autoattack", "")
        table.add_row(name, recipe.values["method"], str(published), recipe.about)
    output_console().print(table)
    return 0
