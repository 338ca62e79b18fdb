"""One recipe in print: source, published results, resolved flags and cost."""

from dataclasses import replace
from typing import Any

from rich.console import Console

from fastdynat.commands.parsing.effects import idle_keys
from fastdynat.commands.recipes.cost import RecipeCost, hours_here, hours_on_reference, recipe_cost
from fastdynat.config import TrainConfig, override, to_flat
from fastdynat.data import DatasetInfo, dataset_info
from fastdynat.methods import method_class
from fastdynat.methods.configs import default_config
from fastdynat.recipes import Recipe
from fastdynat.terminal.consoles import AS_IS, PlainTable
from fastdynat.training.resolve import resolve
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.units import describe_size

MEASUREMENTS = {
    "clean": "clean",
    "pgd20": "PGD-20",
    "pgd50": "PGD-50",
    "autoattack": "AutoAttack",
}
RUN = "RUN"  # stands for the run that --guide-from needs
SIZES = ("eps", "step_size", "eval_eps")
PLACEHOLDERS = {"guide_from": RUN, "init_from": "RUN|FILE", "extra_data": "FILE", "data_dir": "FOLDER"}


def show_recipe(recipe: Recipe, console: Console) -> None:
    """Print `recipe`; its cost is that of its network on this machine, whose rate is measured now."""
    info = images_of(recipe)
    config = resolved_recipe(recipe, info)
    console.print(f"{recipe.name}: {recipe.about}", **AS_IS)
    console.print(f"\n{recipe.source}", **AS_IS)
    console.print(f"\npublished: {_published(recipe)}", **AS_IS)
    table = PlainTable("flag", "value", "set by", title="\nflags that are not the method's defaults")
    usual = to_flat(default_config(recipe.values["method"]))
    idle = idle_keys(config)
    for key, value in to_flat(config).items():
        if key in recipe.values:
            table.add_row(key, _shown(key, value, config), "recipe")
        elif value != usual[key] and key not in idle:
            table.add_row(key, _shown(key, value, config), "resolved here")
    console.print(table)
    _print_cost(recipe_cost(recipe, config, info), config, console)
    console.print(f"\nfastdynat train --recipe {recipe.name}{_needed(recipe)}", **AS_IS)


def _shown(key: str, value: Any, config: ResolvedConfig[Any]) -> str:
    """`value` as a user would write it."""
    if key == "guide_from" and value is not None:
        return RUN
    if key in SIZES:
        return describe_size(value, config.attack.norm)
    return f"{value:g}" if isinstance(value, float) else str(value)


def images_of(recipe: Recipe) -> DatasetInfo:
    """The facts about the recipe's data set; of an image folder, by the recipe itself."""
    known = dataset_info(recipe.values["data"])
    if known is not None:
        return known
    data = recipe.trained_on
    assert data is not None
    size = data.image_size
    names = tuple(map(str, range(data.classes)))
    return DatasetInfo(
        recipe.values["data"], data.classes, (3, size, size), names, (0.5,) * 3, (0.25,) * 3, "crop-flip"
    )


def resolved_recipe(recipe: Recipe, info: DatasetInfo) -> ResolvedConfig[Any]:
    """The recipe's configuration as a run on this machine would have it, but for what is timed."""
    config: TrainConfig[Any] = override(
        default_config(recipe.values["method"]), recipe.values, f"recipe {recipe.name}"
    )
    method = method_class(config.method)
    if method.uses_guide and "guide" not in method.trains:
        guide = config.model.model if config.model.guide == "auto" else config.model.guide
        config = replace(config, model=replace(config.model, guide=guide, guide_from=RUN))
    return resolve(config, info, announce=False, carried_on=True)


def _published(recipe: Recipe) -> str:
    found = [
        f"{text} {recipe.published[key]} %" for key, text in MEASUREMENTS.items() if key in recipe.published
    ]
    if not found:
        return "no result that this protocol could be held against"
    return f"{', '.join(found)} ({recipe.published['source']}); not reproduced here yet"


def _print_cost(cost: RecipeCost, config: ResolvedConfig[Any], console: Console) -> None:
    console.print(
        f"\ncompute: {cost.total:.2g} FLOP = {cost.per_image / 1e9:.3g} GFLOP per image "
        f"x {cost.images:,} images per epoch x {cost.epochs} epochs (convolutions and matrix products)",
        **AS_IS,
    )
    here, reference = hours_here(cost, config), hours_on_reference(cost)
    console.print(f"this machine ({here.where}): {here.text()}, estimated", **AS_IS)
    console.print(f"one {reference.where}: {reference.text()}, predicted, not measured yet", **AS_IS)


def _needed(recipe: Recipe) -> str:
    """The flags that the user has to give, with placeholders."""
    return "".join(f" --{key.replace('_', '-')} {PLACEHOLDERS[key]}" for key in recipe.needs)
