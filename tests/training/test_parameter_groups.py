"""Rate and weight decay of each parameter: timm's groups for timm's networks, our rule for ours."""

import copy
from typing import Any

import pytest
import torch
from support.graph_sim import SimulatedRecorder
from support.stepping import LR, make_batch, moved_network, train_step
from torch import Tensor, nn
from torch.optim import SGD

from fastdynat.config import OptimConfig
from fastdynat.errors import UserError
from fastdynat.methods import Natural, NaturalOptions
from fastdynat.models import build_model, known_models
from fastdynat.models.external import torchvision_names
from fastdynat.training.layer_depths import head_parameters, layer_depths
from fastdynat.training.parameter_groups import parameter_groups
from fastdynat.training.step import TrainStep


def network(name: str, side: int = 32) -> nn.Module:
    return build_model(name, num_classes=10, image_shape=(3, side, side))


def table(module: nn.Module, groups: list[dict[str, Any]], decay: float) -> dict[str, tuple[float, float]]:
    """(scale of the rate, weight decay) by name, without build_model's prefix."""
    names = {id(p): name.removeprefix("net.") for name, p in module.named_parameters()}
    found = {
        names[id(p)]: (group.get("lr_scale", 1.0), group.get("weight_decay", decay))
        for group in groups
        for p in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


@pytest.mark.parametrize(
    "name", sorted({*known_models()} - {*torchvision_names()} | {"swin_t", "convnext_tiny"})
)
def test_no_decay_of_norms_exempts_every_layer_called_a_norm(name: str) -> None:
    """And their parameters alone, where these are all that is exempt."""
    if name.endswith("-cvst"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        module = network(name)
    assert_norms_are_exempt(module)


@pytest.mark.parametrize("layer", ["RmsNorm", "RmsNorm2d", "SimpleNorm", "SimpleNorm2dFp32", "LayerNorm2d"])
def test_no_decay_of_norms_exempts_those_of_timm(layer: str) -> None:
    layers = pytest.importorskip("timm.layers")
    if not hasattr(layers, layer):
        pytest.skip("this timm does not have it")
    assert_norms_are_exempt(nn.Sequential(nn.Conv2d(3, 4, 3), getattr(layers, layer)(4), nn.Linear(4, 2)))


def assert_norms_are_exempt(module: nn.Module) -> None:
    config: Any = OptimConfig(decay_norms=False, decay_exempt=(), weight_decay=0.05)
    found = table(module, parameter_groups(module, config), 0.05)
    norms = {
        f"{name}.{key}".removeprefix("net.")
        for name, layer in module.named_modules()
        for key, _ in layer.named_parameters(recurse=False)
        if "Norm" in type(layer).__name__
    }
    assert norms
    assert {name for name, (_, decay) in found.items() if decay == 0} == norms


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("timm:convnext_atto", 32),
        ("timm:vit_tiny_patch16_224", 32),
        ("timm:swin_tiny_patch4_window7_224", 224),
        ("timm:resnet18", 32),
    ],
)
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_groups_of_timms_networks_are_timms(name: str, side: int, layer_decay: float | None) -> None:
    groups_of = pytest.importorskip("timm.optim._param_groups")
    module: Any = network(name, side)
    timms = module.net
    listed = timms.no_weight_decay() if hasattr(timms, "no_weight_decay") else ()
    if layer_decay is None:
        want = groups_of.param_groups_weight_decay(timms, 0.05, no_weight_decay_list=listed)
    else:
        want = groups_of.param_groups_layer_decay(
            timms, 0.05, no_weight_decay_list=listed, layer_decay=layer_decay
        )
    config: Any = OptimConfig(decay_exempt=("1d", "listed"), layer_decay=layer_decay, weight_decay=0.05)
    got, expected = table(module, parameter_groups(module, config), 0.05), table(timms, want, 0.05)
    assert got.keys() == expected.keys() == {key for key, _ in timms.named_parameters()}
    for key, (scale, decay) in expected.items():
        assert got[key] == (pytest.approx(scale, rel=1e-15), decay), key
    assert {decay for _, decay in got.values()} == {0.0, 0.05}
    assert layer_decay is None or len({scale for scale, _ in got.values()}) > 5


@pytest.mark.parametrize(
    ("name", "blocks", "first", "last"),
    [
        ("resnet18", 8, "conv1.weight", {"linear.weight", "linear.bias"}),
        (
            "preact_resnet18-silu-gn",
            8,
            "conv1.weight",
            {"bn.weight", "bn.bias", "linear.weight", "linear.bias"},
        ),
        ("wrn-16-2", 6, "conv1.weight", {"bn1.weight", "bn1.bias", "fc.weight", "fc.bias"}),
        ("small", 3, "features.0.weight", {"linear.weight", "linear.bias"}),
    ],
)
def test_our_networks_are_as_deep_as_their_blocks(name: str, blocks: int, first: str, last: set[str]) -> None:
    module = network(name)
    depths = {key.removeprefix("net."): depth for key, depth in layer_depths(module).items()}
    assert len(depths) == len([*module.parameters()])
    assert set(depths.values()) == set(range(blocks + 2))
    assert depths[first] == 0
    assert {key for key, depth in depths.items() if depth == blocks + 1} == last
    assert head_parameters(module) == {f"net.{key}" for key in last if key.startswith(("linear", "fc"))}
    order = [*depths.values()]
    assert order == sorted(order)
    if name == "resnet18":
        assert depths["layer1.0.bn2.weight"] == 1
        assert depths["layer2.0.shortcut.1.weight"] == 3
    if name == "small":
        assert depths["features.1.bias"] == 0  # the norm behind the first convolution


@pytest.mark.parametrize(
    ("exempt", "norms", "free"),
    [
        ((), True, set[str]()),
        ((), False, {"norm.weight", "norm.bias"}),
        (("biases",), True, {"norm.bias", "conv.bias", "head.bias"}),
        (("1d",), True, {"norm.weight", "norm.bias", "conv.bias", "head.bias", "gamma"}),
        (("listed",), True, {"place"}),
        (("biases", "listed"), False, {"norm.weight", "norm.bias", "conv.bias", "head.bias", "place"}),
    ],
)
def test_what_has_no_weight_decay(exempt: Any, norms: bool, free: set[str]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2)
            self.gamma, self.place = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1, 4))

        def no_weight_decay(self) -> set[str]:
            return {"place"}

    config: Any = OptimConfig(decay_exempt=exempt, decay_norms=norms, weight_decay=0.1)
    module = Net()
    found = table(module, parameter_groups(module, config), 0.1)
    assert {key for key, (_, decay) in found.items() if decay == 0} == free


def test_networks_without_an_order_and_without_a_linear_head_are_refused() -> None:
    module = network("torchvision:resnet18")
    decayed: Any = OptimConfig(layer_decay=0.75)
    with pytest.raises(UserError, match="a ResNet does not report the depth of its layers; use timm:NAME"):
        parameter_groups(module, decayed)
    scaled: Any = OptimConfig(head_lr_scale=10.0)
    assert {group.get("lr_scale") for group in parameter_groups(module, scaled)} == {None, 10.0}
    with pytest.raises(UserError, match="the last layer, 0, is a Conv2d, not a Linear"):
        parameter_groups(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), scaled)


class Blocks(nn.Sequential):
    """`moved_network`, which says how deep its layers are."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^0\.", "blocks": [(r"^1\.", (1,)), (r"^4\.", (2,))]}


def decayed_step(recorder: SimulatedRecorder | None = None, **optim: Any) -> TrainStep:
    config = {"layer_decay": 0.5, "head_lr_scale": 3.0, "weight_decay": 0.01, "momentum": 0.9, **optim}
    plain = moved_network(1)
    module = Blocks(*plain.children())
    step = train_step(Natural(NaturalOptions()), module, None, **config)
    parts = (step.method, step.networks, step.spec, step.optim, step.precision)
    return TrainStep(*parts, lambda update: 1 / (1 + update), recorder=recorder)


@pytest.mark.parametrize("optim", [{}, {"opt": "adamw"}, {"opt": "lion"}])
def test_a_captured_step_reads_each_groups_rate_anew(optim: dict[str, Any]) -> None:
    pytest.importorskip("timm")
    recorder = SimulatedRecorder()
    captured, plain = decayed_step(recorder, **optim), decayed_step(**optim)
    for _ in range(8):
        captured(make_batch())
        plain(make_batch())
    assert recorder.captured == 1
    assert recorder.replayed > 3
    for p, q in zip(weights(captured), weights(plain), strict=True):
        assert torch.equal(p, q)


def weights(step: TrainStep) -> list[Tensor]:
    return [p.detach().clone() for p in step.networks.raw["model"].parameters()]


def test_a_run_of_steps_equals_torchs_groups_and_goes_on_from_a_state() -> None:
    pytest.importorskip("timm")
    batch, step = make_batch(), decayed_step()
    reference = copy.deepcopy(step.networks.raw["model"])
    scales = {"0": 0.25, "1": 0.5, "4": 3.0}
    groups = [{"params": [*reference[int(at)].parameters()], "lr": 0.0} for at in scales]  # type: ignore[index]
    optimizer = SGD(groups, momentum=0.9, weight_decay=0.01)
    for update in range(12):
        if update == 5:
            resumed = decayed_step()
            resumed.networks.raw["model"].load_state_dict(step.networks.raw["model"].state_dict())
            resumed.optimizers[0].load_state_dict(copy.deepcopy(step.optimizers[0].state_dict()))
            resumed.global_step, step = step.global_step, resumed
        step(batch)
        for group, scale in zip(optimizer.param_groups, scales.values(), strict=True):
            group["lr"] = scale * LR / (1 + update)
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(batch.x), batch.labels).backward()
        optimizer.step()
    for p, q in zip(step.networks.raw["model"].parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
