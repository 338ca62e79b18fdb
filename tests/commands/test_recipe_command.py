"""`fastdynat recipes NAME`: source, published results, flags and cost of one protocol."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdynat.commands.main import main
from fastdynat.commands.recipes.cost import Hours, recipe_cost
from fastdynat.commands.recipes.show import images_of, resolved_recipe
from fastdynat.models import build_model
from fastdynat.recipes import read_recipe, recipe_names


def forward_flops(model: str, shape: tuple[int, int, int], classes: int) -> int:
    """FLOPs of a forward pass per image, by torch's own counter."""
    network = build_model(model, num_classes=classes, image_shape=shape).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *shape))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "model", "forwards"),
    [
        # 10 attack steps of two forwards, the update's three, and two passes for running statistics
        ("rice2020", "preact_resnet18", 20 + 3 + 2),
        ("fast2020", "preact_resnet18-raw", 2 + 3),
        ("free2019", "preact_resnet18-raw", 8 * 3),
        # 2 steps of APGD and its look at the last point
        ("singh2023-convnext-t", "convnext-t-cvst", 2 * 2 + 1 + 3),
    ],
)
def test_compute_by_hand(name: str, model: str, forwards: int) -> None:
    recipe = read_recipe(name)
    info = images_of(recipe)
    cost = recipe_cost(recipe, resolved_recipe(recipe, info), info)
    one = forward_flops(model, info.image_shape, info.num_classes)
    # The first convolution has no gradient at the weights in an attack, or at the image in an update.
    assert cost.per_image / one == pytest.approx(forwards, rel=0.02)
    held_out = 1000
    assert cost.images == (50_000 if recipe.trained_on is None else recipe.trained_on.images) - held_out
    assert cost.total == pytest.approx(cost.per_image * cost.images * cost.epochs)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_cost(name: str) -> None:
    recipe = read_recipe(name)
    info = images_of(recipe)
    cost = recipe_cost(recipe, resolved_recipe(recipe, info), info)
    assert 1e14 < cost.total < 1e22
    assert {*recipe.published} <= {"clean", "pgd20", "pgd50", "autoattack", "source"}
    assert ("source" in recipe.published) == bool(recipe.published)


def test_one_recipe_in_print(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "hat"]) == 0
    out = capsys.readouterr().out
    assert "Source: the code released with Rade and Moosavi-Dezfooli 2022" in out
    assert (
        "published: clean 84.9 %, AutoAttack 49.08 % (README of the release); not reproduced here yet" in out
    )
    assert re.search(r"│ lr +│ 0.21 +│ recipe", out)
    assert re.search(r"│ eval_eps +│ 0.0313725 \(8.00/255\) +│ resolved here", out)
    assert re.search(
        r"compute: [\d.e+]+ FLOP = [\d.]+ GFLOP per image x 49,000 images per epoch x 50 epochs", out
    )
    assert re.search(
        r"this machine \(.*TFLOP/s in matrix products\): .* to .* (minutes|hours|days), est", out
    )
    assert "predicted, not measured yet" in out
    assert out.rstrip().endswith("fastdynat train --recipe hat --guide-from RUN")


def test_durations_in_words() -> None:
    assert Hours(0.24, 0.28, "").text() == "14 to 17 minutes"
    assert Hours(1.22, 30, "").text() == "1.2 to 30 hours"
    assert Hours(240, 2400, "").text() == "10 to 100 days"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipes", "hatt"], "unknown recipe 'hatt': did you mean 'hat'"),
        (
            ["recipes", "hat", "lbgat"],
            "unexpected 'lbgat': fastdynat recipes takes only one: the name of a recipe",
        ),
        (["recipes", ""], "the name of a recipe must not be empty"),
    ],
)
def test_refusals(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", [[], ["--init-from", "nowhere"]])
def test_a_recipe_that_starts_from_weights_says_when_it_does_not(
    flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--recipe", "singh2023-vit-s", "--data-dir", str(tmp_path), *flag]
    assert main(argv) == 2  # the folder is empty
    assert ("starts from trained weights (--init-from RUN|FILE)" in capsys.readouterr().err) == (not flag)
