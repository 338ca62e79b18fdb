"""Roofline of a training step: counts by hand, floors by definition, their table and file."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastdynat.commands.bench.flops import StepFlops, count_step, total
from fastdynat.commands.bench.predictions import LEVERS, UNMEASURED, print_predictions
from fastdynat.commands.bench.roofline import EXPECTED, REFERENCE, Peak, floors, roofline_values, sum_of
from fastdynat.commands.bench.settings import SWITCHES
from fastdynat.commands.main import main
from fastdynat.config import AttackConfig, DataConfig, EngineConfig, TrainConfig
from fastdynat.methods import MadryOptions, method_class
from fastdynat.models import build_model

SHAPE = (3, 32, 32)


def resnet18_layers(strides: tuple[int, ...] = (1, 2, 2, 2)) -> list[int]:
    """Multiply-adds of each convolution and the linear layer for a 32x32 image, the stem first."""
    found, side, width = [3 * 64 * 9 * 32 * 32], 32, 64
    for out, stride in zip((64, 128, 256, 512), strides, strict=True):
        side //= stride
        found += [9 * width * out * side**2, 9 * out * out * side**2]
        found += [width * out * side**2] if stride != 1 or width != out else []
        found += [9 * out * out * side**2] * 2
        width = out
    return [*found, 512 * 10]


def wrn_layers(depth: int, factor: int) -> list[int]:
    found, side, width = [3 * 16 * 9 * 32 * 32], 32, 16
    for out, stride in ((16 * factor, 1), (32 * factor, 2), (64 * factor, 2)):
        side //= stride
        found += [9 * width * out * side**2, 9 * out * out * side**2] + [width * out * side**2] * (
            width != out
        )
        found += [9 * out * out * side**2] * 2 * ((depth - 4) // 6 - 1)
        width = out
    return [*found, width * 10]


LAYERS = {
    "resnet18": resnet18_layers(),
    "resnet18_s1122": resnet18_layers((1, 1, 2, 2)),
    "wrn-10-1": wrn_layers(10, 1),
    "wrn-28-10": wrn_layers(28, 10),
}


def passes(name: str) -> tuple[int, int]:
    """FLOPs of a forward pass and of an update's backward pass, which needs no gradient at the image."""
    layers = LAYERS[name]
    forward = 2 * sum(layers)
    return forward, 2 * forward - 2 * layers[0]


def counted(
    method: str,
    model: str,
    guide: str | None = None,
    *,
    batch_size: int = 4,
    awp: bool = False,
    **options: Any,
) -> StepFlops:
    kind = method_class(method)
    networks = [
        None if name is None else build_model(name, num_classes=10, image_shape=SHAPE)
        for name in (model, guide)
    ]
    assert networks[0] is not None
    return count_step(
        kind(kind.options_type(**options)),
        networks[0],
        networks[1],
        SHAPE,
        10,
        batch_size=batch_size,
        awp=awp,
    )


@pytest.mark.parametrize("model", LAYERS)
def test_madry_is_twenty_forwards_and_an_update(model: str) -> None:
    forward, backward = passes(model)
    flops = counted("madry", model)
    assert (flops.forward, flops.attack_step) == (forward, 2 * forward)
    assert (flops.attack, flops.update, flops.guide) == (20 * forward, forward + backward, 0)
    assert flops.step == 21 * forward + backward


def test_other_methods_on_resnet18() -> None:
    forward, backward = passes("resnet18")
    natural, trades = counted("natural", "resnet18"), counted("trades", "resnet18")
    assert (natural.attack, natural.update) == (0, forward + backward)
    # Clean prediction of the attack, both predictions with their gradients, and the pass that moves
    # statistics.
    assert trades.update == forward + 2 * (forward + backward) + forward
    rice = counted("madry", "resnet18", bn_attack_forward=True, bn_clean_after=True)
    assert rice.update == 3 * forward + backward
    assert counted("madry", "resnet18", awp=True).update == 2 * (forward + backward)


@pytest.mark.parametrize("guide", ["resnet18", "resnet18_s1122"])
def test_the_guides_part_is_its_own(guide: str) -> None:
    (forward, backward), theirs = passes("resnet18"), passes(guide)
    flops = counted("dynat", "resnet18", guide)
    assert flops.guide == sum(theirs)
    assert flops.update == 2 * forward + backward  # with the clean pass that moves statistics
    assert flops.attack == 20 * forward
    released = counted("dynat", "resnet18", guide, guide_mode="eval")
    assert released.guide == sum(theirs) + theirs[0]  # labels by a pass in eval mode


def test_the_count_to_beat() -> None:
    """ResNet-18 guided by one, batch 128: 3.84 TFLOP a step, 4.8 ms at 798 TFLOP/s, 12 to 14 ms expected."""
    flops = counted("dynat", "resnet18", "resnet18", batch_size=128)
    forward, backward = passes("resnet18")
    assert total(sum_of(flops)) == 128 * (20 * forward + (2 * forward + backward) + (forward + backward))
    assert total(sum_of(flops)) / 1e12 == pytest.approx(3.84, abs=0.005)
    config = TrainConfig(
        options=MadryOptions(),
        data=DataConfig(batch_size=128),
        attack=AttackConfig(steps=10),
        engine=EngineConfig(device="cuda", amp="bf16", compile="default"),
    )
    measured = {"attack": 9e-3, "step": 12e-3}
    values = roofline_values(flops, config, Peak(700e12, 4e12, "this one"), measured)
    there = values["reference"]
    assert there["peak"]["flops_per_s"] == 798e12
    assert there["floor_seconds"]["step"] == pytest.approx(4.81e-3, abs=1e-5)
    assert there["expected"]["step_seconds"] == pytest.approx([12.0e-3, 14.1e-3], abs=1e-4)
    assert values["here"]["floor_seconds"]["step"] == pytest.approx(4.81e-3 * 798 / 700, rel=1e-3)
    assert values["share_of_roofline"] == pytest.approx(3.838e12 / 700e12 / 12e-3, rel=1e-3)
    assert sum(values["flops"][part] for part in ("attack", "update", "guide")) == values["flops"]["step"]


def test_floors_by_definition() -> None:
    """Two kernels of 8 FLOPs on 2 numbers, one of 4 on 10, which waits for 20 bytes of half precision."""
    kernels = Counter({(8, 2): 2, (4, 10): 1})
    assert floors(kernels, Peak(2.0, 4.0, ""), 2) == (20 / 2, 8 / 2 + 8 / 2 + 20 / 4)


def test_traffic_of_a_convolution_is_what_it_reads_and_writes() -> None:
    flops = counted("natural", "wrn-10-1", batch_size=8)
    stem = [elements for (ops, elements) in flops.kernels["update"] if ops == 2 * 8 * LAYERS["wrn-10-1"][0]]
    image, result, weight = 8 * 3 * 32 * 32, 8 * 16 * 32 * 32, 16 * 3 * 9
    assert image + weight + result in stem  # forward
    alone, with_memory = floors(flops.kernels["update"], REFERENCE, 2)
    assert with_memory > alone


def test_every_expectation_is_a_range_with_its_reason() -> None:
    for low, high, why in EXPECTED.values():
        assert 0 < low <= high < 2
        assert why


def test_the_table_and_the_file_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    flags = [
        "--model",
        "small",
        "--guide",
        "small",
        "--batch-size",
        "8",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    assert main(["bench", *flags, "--json", str(out)]) == 0
    doc = json.loads(out.read_text())
    found, here = doc["roofline"], doc["roofline"]["here"]
    assert doc["flops"]["step"] * 8 == found["flops"]["step"]
    product = next(row for row in doc["rows"] if row["kind"] == "matmul")
    rate = product["flops_per_s"] * product["seconds"]["median"] / product["seconds"]["min"]
    assert here["peak"]["flops_per_s"] == pytest.approx(rate, rel=1e-3)
    assert here["peak"]["bytes_per_s"] > 1e8
    assert here["floor_seconds"]["step"] == pytest.approx(found["flops"]["step"] / rate, rel=1e-3)
    assert all(
        here["floor_with_memory_seconds"][part] >= floor for part, floor in here["floor_seconds"].items()
    )
    step = next(row for row in doc["rows"] if row["kind"] == "step")
    assert found["measured_seconds"]["step"] == pytest.approx(step["seconds"]["median"], rel=1e-3)
    assert found["measured_seconds"].keys() == {"attack", "update", "guide", "step"}
    assert found["share_of_roofline"] == pytest.approx(
        here["floor_seconds"]["step"] / step["seconds"]["median"], rel=1e-2
    )
    assert "expected" not in found["reference"]  # too short a step to say anything about
    printed = capsys.readouterr().out
    assert "one training step, batch 8" in printed
    assert "reference: 798 TFLOP/s, 4.3 TB/s (H200, bf16)" in printed


def test_every_switch_has_a_prediction_and_nothing_is_measured_that_was_not() -> None:
    names = {lever.name for lever in LEVERS}
    assert {switch.name for switch in SWITCHES} - names == {"winograd"}  # for the CPU
    gains = [{"switch": "graphs", "kind": "step", "turned": "graphs off", "gain": 1.5}]
    for gpu in (False, True):
        console = Console(width=400, record=True, file=io.StringIO())
        print_predictions(gains, gpu, console)
        text = console.export_text()
        assert text.count(UNMEASURED) == len(LEVERS) - gpu
        assert ("1.50 (graphs off)" in text) == gpu
        assert all(lever.name.replace("_", "-") in text for lever in LEVERS)
