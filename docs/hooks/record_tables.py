"""Recipes with published results, with the compute of each and the time predicted for one H200."""

from tables import table

from fastdynat.commands.recipes.cost import hours_on_reference, recipe_cost
from fastdynat.commands.recipes.show import MEASUREMENTS, images_of, resolved_recipe
from fastdynat.recipes import Recipe, read_recipe, recipe_names

TITLES = {
    ("cifar10", 10): "CIFAR-10",
    ("cifar100", 100): "CIFAR-100",
    ("imagefolder", 1000): "ImageNet",
}
HEADER = ["Recipe", "What it is", "Clean", "AutoAttack", "Published in", "Compute", "One H200"]


def records() -> str:
    """One table for each data set, the most robust network first."""
    published = [recipe for recipe in map(read_recipe, recipe_names()) if recipe.published]
    rows: dict[str, list[list[str]]] = {title: [] for title in TITLES.values()}
    for recipe in sorted(published, key=robust):
        rows[TITLES[recipe.values["data"], images_of(recipe).num_classes]].append(row(recipe))
    return "\n\n".join(f"### {title}\n\n{table(HEADER, found)}" for title, found in rows.items())


def robust(recipe: Recipe) -> float:
    """The key that sorts by accuracy under AutoAttack, the highest first."""
    return -float(recipe.published.get("autoattack", 0))


def row(recipe: Recipe) -> list[str]:
    """The row of `recipe`."""
    published = recipe.published
    source = str(published["source"])
    if "autoattack" not in published:
        others = [f"{text} {published[key]}" for key, text in MEASUREMENTS.items() if key in published]
        source = f"{source}: {', '.join(others)}"
    info = images_of(recipe)
    cost = recipe_cost(recipe, resolved_recipe(recipe, info), info)
    accuracies = [str(published.get(key, "")) for key in ("clean", "autoattack")]
    time = hours_on_reference(cost).text()
    return [f"`{recipe.name}`", recipe.about, *accuracies, source, f"{cost.total:.2g} FLOP", time]
