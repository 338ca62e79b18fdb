"""Choices for the network's own convolutions: their shapes, the timed ones, and the number of images."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from torch import nn

from fastdynat.config import EngineConfig
from fastdynat.data import dataset_info
from fastdynat.methods.configs import default_config
from fastdynat.models import build_model, convolutions
from fastdynat.training.resolve import resolve
from fastdynat.tuning import ANY, Layer, Workload, choices, choose
from fastdynat.tuning.workload import ConvolutionSetting, passes, update_call

CPU = torch.device("cpu")


def by_hooks(network: nn.Module, size: int) -> Counter[Layer]:
    """The shapes of the inputs of a network's convolutions."""
    found: Counter[Layer] = Counter()

    def note(module: Any, args: tuple[Any, ...]) -> None:
        height, width = args[0].shape[2:]
        c, k = module.in_channels, module.out_channels
        found[
            Layer(
                c, k, height, width, module.kernel_size[0], module.stride[0], module.padding[0], module.groups
            )
        ] += 1

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        network.eval()(torch.zeros(2, 3, size, size))
    return found


@pytest.mark.parametrize(
    "name", ["small", "resnet18", "wrn-10-2", "preact_resnet18-gn", "torchvision:mobilenet_v3_small"]
)
def test_the_convolutions_of_a_network_are_found_without_its_weights(name: str) -> None:
    state = torch.get_rng_state()
    found = convolutions(name, num_classes=10, image_shape=(3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert Counter(found) == by_hooks(build_model(name, num_classes=10, image_shape=(3, 32, 32)), 32)


def test_a_name_that_is_none_is_left_to_who_builds_it() -> None:
    assert convolutions("resnet81", num_classes=10, image_shape=(3, 32, 32)) == ()
    assert Workload.of((), 8, 3).layers == ANY.layers


def test_the_layers_with_most_arithmetic_are_timed() -> None:
    layers = convolutions("resnet18", num_classes=10, image_shape=(3, 32, 32))
    found = Workload.of(layers, 8, 3)
    assert [(layer.channels_out, layer.count) for layer in found.layers[:4]] == [
        (64, 4),
        (128, 3),
        (256, 3),
        (512, 3),
    ]
    assert {layer.stride for layer in found.layers[4:]} == {2}
    whole, timed = (sum(layer.products for layer in some) for some in (layers, found.layers))
    assert whole == pytest.approx(5.55e8, rel=0.01), "as papers count it, but for 1x1 and linear layers"
    assert timed / whole > 0.9


def test_products_are_those_of_the_convolution() -> None:
    """64 x 64 channels, 3x3 taps, 16x16 outputs; with groups an eighth of it."""
    assert Layer(64, 64, 32, 32, stride=2).products == 64 * 64 * 9 * 256
    assert Layer(64, 64, 32, 32, stride=2, groups=8, count=3).products == 3 * 8 * 64 * 9 * 256


@pytest.mark.parametrize(
    ("layer", "batch", "timed"),
    [
        (Layer(64, 64, 32, 32), 1, 1),
        (Layer(64, 64, 32, 32), 3, 3),
        (Layer(64, 64, 32, 32), 128, 4),
        (Layer(512, 512, 4, 4), 128, 4),
        (Layer(640, 640, 8, 8), 128, 4),
        (Layer(128, 128, 4, 4), 128, 64),
        (Layer(128, 128, 4, 4, count=5), 128, 64),
        (Layer(128, 128, 4, 4), 8, 8),
        (Layer(512, 512, 14, 14), 64, 4),
    ],
)
def test_few_images_stand_for_many(layer: Layer, batch: int, timed: int) -> None:
    assert layer.timed_images(batch) == timed


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Layer, int]]:
    """Timings: channels-last, 512 channels take 30 % longer, others 10 % less, a single image less."""
    timed: list[tuple[str, Layer, int]] = []
    now = [0.0]

    def fake(setting: ConvolutionSetting, layer: Layer, images: int) -> Callable[[], None]:
        def call() -> None:
            timed.append((setting.name, layer, images))
            last = 0.9 if layer.channels_out < 512 or images == 1 else 1.3
            now[0] += 0.01 * (last if setting.channels_last else 1.0) * (0.7 if setting.winograd else 1.0)

        return call

    monkeypatch.setattr(choices, "passes", fake)
    monkeypatch.setattr(choices, "update_call", lambda *_: lambda: None)
    monkeypatch.setattr(choices, "half_types", lambda device: {"bf16": "none", "fp16": "none"})
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr("fastdynat.machine.racing.quiet_clock", lambda: lambda: now[0])
    monkeypatch.setattr(choices, "free_cores", lambda: 64)
    monkeypatch.setattr(choices.OtherLoad, "share", lambda self: 0.0)
    monkeypatch.setattr("fastdynat.tuning.workload.vector_bits", lambda: 512)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return timed


WIDE, EARLY = Layer(512, 512, 4, 4, count=3), Layer(64, 64, 32, 32, count=1)


def test_the_layers_in_hand_decide_the_memory_format(clocked: list[tuple[str, Layer, int]]) -> None:
    def last(*layers: Layer, batch: int = 8) -> bool:
        return choose(CPU, winograd=False, work=Workload(layers, batch, 1)).channels_last

    assert last(EARLY)
    assert not last(WIDE)
    assert not last(EARLY, WIDE)
    assert last(replace(EARLY, count=20), WIDE), "each as often as the network has it"
    assert last(WIDE, batch=1)


def test_an_update_counts_as_often_as_there_is_one(
    clocked: list[tuple[str, Layer, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the weights are slower channels-last, by more than two attack steps gain."""
    taken = 0.0

    def fake(setting: ConvolutionSetting, layer: Layer, images: int) -> Callable[[], None]:
        def call() -> None:
            nonlocal taken
            taken += 0.025 if setting.channels_last else 0.02

        return call

    monkeypatch.setattr(choices, "update_call", fake)
    monkeypatch.setattr(
        "fastdynat.machine.racing.quiet_clock", lambda: lambda: taken + 0.01 * sum(map(last_gain, clocked))
    )
    assert not choose(CPU, winograd=False, work=Workload((EARLY,), 8, 2)).channels_last
    assert choose(CPU, winograd=False, work=Workload((EARLY,), 8, 20)).channels_last
    assert choose(CPU, winograd=False, work=Workload((EARLY,), 8)).channels_last, "nothing is trained"


def last_gain(call: tuple[str, Layer, int]) -> float:
    return 0.9 if "channels-last" in call[0] else 1.0


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("last", [False, True])
def test_an_update_has_the_gradients_of_image_and_weight(amp: str, last: bool) -> None:
    found = update_call(ConvolutionSetting(amp, last), Layer(6, 8, 5, 5, stride=2, groups=2), 3)()
    assert isinstance(found, tuple)
    assert [(tuple(t.shape), t.dtype) for t in found] == [
        ((3, 6, 5, 5), torch.float32),
        ((8, 3, 3, 3), torch.float32),
    ]
    assert all(bool(t.abs().sum() > 0) for t in found)


def test_a_measurement_stands_for_all_batches_that_are_timed_alike(
    clocked: list[tuple[str, Layer, int]],
) -> None:
    choose(CPU, work=Workload((WIDE,), 4, 1))
    assert {images for _, _, images in clocked} == {4}
    clocked.clear()
    choose(CPU, work=Workload((WIDE,), 8, 1))
    assert clocked == []
    choose(CPU, work=Workload((WIDE,), 2, 1))
    assert {images for _, _, images in clocked} == {2}


@needs("ext")
def test_winograd_is_timed_where_a_layer_would_be_computed_so(clocked: list[tuple[str, Layer, int]]) -> None:
    """ResNet-18's widest layers at batch 8: 3 pairs of passes do not repay the transform, 100 do."""
    assert not choose(CPU, work=Workload((WIDE,), 8, 3)).winograd
    assert not [name for name, _, _ in clocked if "Winograd" in name]
    assert choose(CPU, work=Workload((WIDE,), 128, 10)).winograd
    assert [name for name, _, _ in clocked if "Winograd" in name]


def test_few_images_do_not_stand_for_many_where_weights_are_four_times_as_many(
    clocked: list[tuple[str, Layer, int]],
) -> None:
    """Measured on AVX-512, 512 channels at 4x4: direct over Winograd is 1.1 with 4 images and 1.8 with 32."""
    assert WIDE.scale(4, True) == 1.0
    assert 0.4 < WIDE.scale(32, True) < 0.7
    assert WIDE.scale(128, True) <= WIDE.scale(32, True)
    assert EARLY.scale(128, True) == pytest.approx(1.0, abs=0.1)


def test_a_run_is_decided_by_its_own_network_and_batch(clocked: list[tuple[str, Layer, int]]) -> None:
    config = default_config("madry")
    info = dataset_info("cifar10")
    assert info is not None

    def resolved(model: str, batch: int) -> EngineConfig:
        data, network = replace(config.data, batch_size=batch), replace(config.model, model=model)
        asked = replace(config, data=data, model=network, engine=EngineConfig(device="cpu", winograd="off"))
        return resolve(asked, info).engine

    assert resolved("small", 8).channels_last == "on"
    assert {layer.channels_out for _, layer, _ in clocked} == {32, 64, 128}
    clocked.clear()
    resolved("resnet18", 3)
    assert {images for _, _, images in clocked} == {3}


@pytest.mark.parametrize(
    "setting",
    [ConvolutionSetting(amp, last) for amp in ("off", "bf16") for last in (False, True)],
    ids=lambda s: s.name,
)
@pytest.mark.parametrize(
    "layer",
    [
        Layer(64, 64, 6, 6),
        Layer(64, 128, 7, 5, stride=2),
        Layer(32, 64, 6, 6, kernel=1, padding=0),
        Layer(64, 64, 5, 5, groups=4),
    ],
)
def test_what_is_timed_is_the_layer_in_every_setting(setting: ConvolutionSetting, layer: Layer) -> None:
    found, want = passes(setting, layer, 2)(), passes(ConvolutionSetting(), layer, 2)()
    assert isinstance(found, torch.Tensor)
    assert isinstance(want, torch.Tensor)
    assert found.shape == (2, layer.channels_in, layer.height, layer.width)
    assert (found.double() - want.double()).norm() / want.double().norm() < (
        0.2 if setting.amp == "bf16" else 1e-3
    )
