"""Twenty networks of torchvision and timm: plain attacks equalled, what is folded, precision, resume."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.fallbacks import NoFallbacks
from support.plain_attack import (
    ALPHA,
    EPS,
    STEPS,
    assert_untouched,
    batch,
    plain_pgd,
    same,
    snapshot,
    with_statistics,
)
from support.same_run import assert_same_run
from support.twenty_networks import LARGE, TABLE, table_network
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main

SPEC = PGDSpec(EPS, ALPHA, STEPS, start="none")
DATA = """
import torch


def make_data():
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (40, 3, {size}, {size}), generator=generator, dtype=torch.uint8)
    labels = torch.arange(40) % 10
    return {{"train": (images, labels), "test": (images, labels)}}
"""


def rows(*quick: str) -> list[object]:
    """The table's names, of which those beside `quick` are slow; the library that each needs."""
    return [
        pytest.param(
            name,
            marks=[needs(name.partition(":")[0])] + [pytest.mark.slow] * (name not in quick),
        )
        for name in TABLE
    ]


SMALL = tuple(name for name in TABLE if name not in LARGE)


@pytest.mark.parametrize("name", rows(*SMALL))
def test_an_attack_is_the_plain_one_and_says_what_is_folded(name: str) -> None:
    """No fallback is reported: neither a network without batch norm nor one folded in part."""
    row, model = TABLE[name], with_statistics(table_network(name)).train()
    (x, y), before = batch(2, row.size), snapshot(model)
    engine = AttackEngine(model, x, switches=AttackSwitches(), fallbacks=NoFallbacks())
    found = engine.run(x, AttackGoal("ce", y), SPEC).x_adv
    assert_untouched(model, before)
    want = plain_pgd(model, x, y)
    assert same(want, x) < 0.6
    assert same(found, want) > row.least
    assert sum(isinstance(layer, _BatchNorm) for layer in model.modules()) == row.norms
    if row.norms == 0:
        assert "no batch norm" in engine.path
    elif row.folded == row.norms:
        assert f"{row.norms} batch norms folded" in engine.path
    else:
        assert f"{row.folded} of {row.norms} batch norms folded" in engine.path


def gain(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor) -> float:
    """How much an attack raises the model's loss, in float32."""
    with attack_mode(model, "eval"), torch.no_grad():
        before, after = (float(F.cross_entropy(model(images), y)) for images in (x, x_adv))
    return after - before


@pytest.mark.parametrize("name", rows("timm:convnext_atto", "timm:vit_tiny_patch16_224", "timm:regnetx_002"))
def test_a_half_precision_attack_is_as_strong(name: str) -> None:
    model = with_statistics(table_network(name))
    x, y = batch(2, TABLE[name].size)
    switches = AttackSwitches(dtype=torch.bfloat16)
    engine = AttackEngine(model, x, switches=switches, fallbacks=NoFallbacks())
    found = engine.run(x, AttackGoal("ce", y), SPEC).x_adv
    assert gain(model, x, y, found) > 0.8 * gain(model, x, y, plain_pgd(model, x, y))
    assert engine.path.startswith("bfloat16 replica")


@pytest.mark.slow
@pytest.mark.parametrize("name", rows(*TABLE))
def test_a_compiled_attack_is_the_plain_one(name: str) -> None:
    row, model = TABLE[name], with_statistics(table_network(name))
    x, y = batch(2, row.size)
    engine = AttackEngine(model, x, switches=AttackSwitches(compile="default"), fallbacks=NoFallbacks())
    found = engine.run(x, AttackGoal("ce", y), SPEC).x_adv
    assert same(found, plain_pgd(model, x, y)) > row.least


@pytest.mark.parametrize("name", rows("torchvision:efficientnet_b0", "timm:vit_tiny_patch16_224"))
def test_two_and_two_steps_are_four(name: str, tmp_path: Path) -> None:
    """Bit for bit, with the random depth and dropout that a network may have."""
    (tmp_path / "data.py").write_text(DATA.format(size=TABLE[name].size))
    flags = ["--data", f"{tmp_path}/data.py:make_data", "--model", name, "--val-size", "0", "--quiet"]
    flags += ["--batch-size", "20", "--epochs", "2", "--steps", "1", "--method", "madry"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *flags, "--run-dir", str(whole)]) == 0
    assert main(["train", *flags, "--run-dir", str(parts), "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    assert_same_run(whole, parts)
