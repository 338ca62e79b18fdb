"""Recipes: each resolves to a run that can start, says where it comes from, and gives way to flags."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from fastdynat.commands.main import main
from fastdynat.config import override, to_flat
from fastdynat.data import DatasetInfo, dataset_info
from fastdynat.errors import UserError
from fastdynat.methods import METHODS, method_class
from fastdynat.methods.configs import default_config, stored_config
from fastdynat.recipes import read_recipe, recipe_names
from fastdynat.training.resolve import resolve
from fastdynat.training.schedules import schedule_factor

TINY_IMAGENET = DatasetInfo(
    "imagefolder", 200, (3, 64, 64), (0.5,) * 3, (0.25,) * 3, "crop-flip", tuple(map(str, range(200)))
)
TINY = [
    "--data",
    "digits",
    "--train-size",
    "64",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--epochs",
    "1",
    "--quiet",
]


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_is_a_flag_and_the_whole_can_start(name: str) -> None:
    recipe = read_recipe(name)
    values, about = recipe.values, recipe.about
    untimed = {"amp": "off", "channels_last": "on"} | values  # "auto" times convolutions of the full size
    config = override(default_config(values["method"]), untimed, name)
    method = method_class(config.method)
    if method.uses_guide and "guide" not in method.trains:
        with pytest.raises(UserError, match="--guide-from RUN"):
            resolve(config, dataset_info("cifar10") or TINY_IMAGENET)
        return
    info = dataset_info(config.data.data) or TINY_IMAGENET
    resolved = to_flat(resolve(config, info))
    assert all(resolved[key] is not None for key in values)
    assert 20 <= len(about) <= 110


@pytest.mark.parametrize("name", recipe_names())
def test_every_file_begins_with_its_source(name: str) -> None:
    text = files("fastdynat.recipes").joinpath(f"{name}.yaml").read_text()
    assert text.startswith(("# Source: ", "# Ours, not a published protocol"))
    assert max(map(len, text.splitlines())) <= 160


def test_milestones_fall_between_the_published_epochs() -> None:
    """A share rounded the wrong way would drop the rate an epoch late. By update, ten to an epoch."""

    published = {
        "trades": (740,),
        "pang2021": (999, 1049),
        "mart": (740, 890, 990),
        "rslad": (2150, 2600, 2850),
        "rice2020": (999, 1499),
    }
    for name, drops in published.items():
        values = read_recipe(name).values
        config = override(default_config(values["method"]), values, name).optim
        factor = schedule_factor(config, 10)
        assert config.epochs is not None
        found = tuple(e for e in range(1, 10 * config.epochs) if factor(e) < factor(e - 1))
        assert found == drops, name


@pytest.mark.parametrize("images", [256, 512])
def test_larger_batches_follow_the_linear_rule(images: int) -> None:
    """k times the images, k times the rate; nothing else differs, but how the rate rises and falls."""
    base, ours = (read_recipe(name).values for name in ("dynat", f"dynat-{images}"))
    assert ours["batch_size"] == images
    assert ours["lr"] == pytest.approx(base["lr"] * images / base["batch_size"])
    differing = {key for key in {*base, *ours} if base.get(key) != ours.get(key)}
    assert differing == {"batch_size", "lr"} | ({"schedule", "warmup"} if images == 512 else set())

    def rates(values: dict[str, object], steps: int) -> list[float]:
        config = override(default_config("dynat"), values, "recipe").optim
        assert config.lr is not None
        assert config.epochs is not None
        factor = schedule_factor(config, steps)
        return [config.lr * factor(n) for n in range(steps * config.epochs)]

    steps = 49_000 // images
    found = rates(ours, steps)
    assert found[0] <= base["lr"]  # what fresh weights take at batch 128
    assert max(found) == pytest.approx(ours["lr"], rel=1e-6)
    if images == 256:
        per_epoch = [rate / 2 for rate in found[::steps]]
        assert per_epoch == pytest.approx(rates(base, 10)[::10])
    else:
        peak = found.index(max(found))
        assert peak == pytest.approx(5 * steps, abs=2)
        assert found[:peak] == sorted(found[:peak])
        assert found[peak:] == sorted(found[peak:], reverse=True)


def test_flags_and_config_win_over_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("lr: 0.02\nmodel: small\n")
    run = tmp_path / "run"
    argv = [
        "train",
        "--recipe",
        "rice2020",
        "--config",
        str(file),
        *TINY,
        "--steps",
        "2",
        "--run-dir",
        str(run),
    ]
    assert main(argv) == 0
    config = stored_config(run)
    assert (config.method, config.attack.attack_bn, config.optim.weight_decay) == ("madry", "train", 5e-4)
    assert (config.optim.lr, config.model.model, config.attack.steps, config.data.data) == (
        0.02,
        "small",
        2,
        "digits",
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "trade"], "did you mean 'trades'"),
        (["--recipe", "trades", "--method", "mart"], "recipe trades is for method trades, not mart"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *argv]) == 2
    assert message in capsys.readouterr().err


def test_recipes_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in recipe_names())


def test_recipe_methods_exist() -> None:
    assert {read_recipe(name).values["method"] for name in recipe_names()} <= METHODS.keys()


@pytest.mark.parametrize(("word", "value"), [("on", "on"), ("off", "off")])
def test_yaml_reads_on_and_off_as_words(word: str, value: str) -> None:
    values = yaml.safe_load(f"fold: {word}")
    assert override(default_config("madry"), values, "a file").engine.fold == value
