"""Recipes: named sets of training flags that reproduce a published protocol, one documented YAML file each.

A recipe is the flags that its paper or code states and no more; what it leaves out is fastdynat's default,
and its comments list what it cannot reproduce. Training images are held out to choose a checkpoint (1,000 of
CIFAR's unless the release has a number of its own), where most releases train on all of them and choose by
the test set. Flags on the command line and keys of --config win over it.
"""

from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fastdynat.documents import parse_yaml
from fastdynat.errors import unknown_name


@dataclass(frozen=True)
class TrainedOn:
    """The training data of a recipe for an image folder, whose size only the recipe knows."""

    images: int
    classes: int
    image_size: int


@dataclass(frozen=True)
class Recipe:
    """A published protocol.

    Attributes:
        name: what ``--recipe`` takes.
        about: what it is, in one line.
        source: the comment that its file begins with: paper and code, and what differs from them.
        values: its flags.
        published: the results that it has to be held against, in percent by name of the measurement, with
            "source" for where they stand; empty where none are known.
        trained_on: None where the data set's name says it.
        needs: flags whose values only the user knows, such as "guide_from".
    """

    name: str
    about: str
    source: str
    values: dict[str, Any]
    published: dict[str, float | str] = field(default_factory=dict)
    trained_on: TrainedOn | None = None
    needs: tuple[str, ...] = ()


def recipe_names() -> list[str]:
    """The names that ``--recipe`` takes, in alphabetical order."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files(__name__).iterdir()
        if entry.name.endswith(".yaml")
    )


def read_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UserError: there is none of that name; the nearest are suggested.
    """
    if name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    text = files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = parse_yaml(text, origin=f"recipe {name}")
    about, published, data, needs = (
        values.pop(key, None) for key in ("about", "published", "trained_on", "needs")
    )
    trained_on = None if data is None else TrainedOn(**data)
    return Recipe(name, about, _first_comment(text), values, published or {}, trained_on, tuple(needs or ()))


def _first_comment(text: str) -> str:
    """The comment lines that `text` begins with, as one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(lines)
