"""Recipes: named sets of training flags that reproduce a published protocol, one documented YAML file each.

A recipe is the flags that its paper or code states and no more; what it leaves out is fastdynat's default,
and its comments list what it cannot reproduce. Training images are held out to choose a checkpoint (1,000 of
CIFAR's unless the release has a number of its own), where most releases train on all of them and choose by
the test set. Flags on the command line and keys of --config win over it.
"""

from importlib.resources import files
from typing import Any

from fastdynat.documents import parse_yaml
from fastdynat.errors import unknown_name

ABOUT = "about"


def recipe_names() -> list[str]:
    """The names that ``--recipe`` takes, in alphabetical order."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files(__name__).iterdir()
        if entry.name.endswith(".yaml")
    )


def read_recipe(name: str) -> tuple[dict[str, Any], str]:
    """The flags of the recipe called `name`, and what it is in one line.

    Raises:
        UserError: there is none of that name; the nearest are suggested.
    """
    if name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    text = files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = parse_yaml(text, origin=f"recipe {name}")
    return values, values.pop(ABOUT)
