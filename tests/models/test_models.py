"""Networks: sizes, arithmetic, keys, normalisation, names, and the errors for images that do not fit."""

import importlib.util
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdynat.errors import UserError
from fastdynat.models import build_model, known_models
from fastdynat.models.build import OURS, check_fit
from fastdynat.models.layer_styles import group_norm, split_style
from fastdynat.models.wide_resnet import WideBlock

CIFAR = (3, 32, 32)
DIGITS = (1, 32, 32)
# One network of each of our classes that is small enough to run forward and backward here.
CHEAP = ["small", "resnet18", "resnet18_s1122", "preact_resnet18", "wrn-10-2"]
STYLES = ["", "-silu", "-gn", "-silu-gn"]


def build(name: str, **kwargs) -> nn.Module:
    return build_model(name, **{"num_classes": 10, "image_shape": CIFAR, **kwargs})


@pytest.mark.parametrize(
    ("name", "millions", "gmac"),
    [
        ("small", 0.2425, 0.004941),
        ("small_wide", 0.9642, 0.01932),
        ("resnet18", 11.17, 0.5554),
        ("resnet18_s1122", 11.17, 1.763),
        ("preact_resnet18", 11.17, 0.5554),
        ("wrn-28-10", 36.48, 5.24),
        ("wrn-34-10", 46.16, 6.66),
    ],
)
def test_parameters_and_arithmetic_are_the_published_ones(name, millions, gmac):
    with torch.device("meta"):
        model = build(name)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *CIFAR))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("name", [*OURS, "torchvision:resnet18"])
def test_keys_are_normalize_and_net(name):
    with torch.device("meta"):
        keys = list(build(name).state_dict())
    assert keys[:2] == ["normalize.mean", "normalize.std"]
    assert all(key.startswith("net.") for key in keys[2:])
    assert not any("module." in key or "model." in key for key in keys)


def test_published_checkpoint_keys():
    with torch.device("meta"):
        resnet, wide = build("resnet18").state_dict(), build("wrn-34-10").state_dict()
    assert {
        "net.conv1.weight",
        "net.layer2.0.shortcut.0.weight",
        "net.layer4.1.bn2.bias",
        "net.linear.bias",
    } <= {*resnet}
    assert {"net.block1.layer.0.convShortcut.weight", "net.block3.layer.4.conv2.weight", "net.bn1.bias"} <= {
        *wide
    }
    assert not any("sub_block1" in key for key in wide)


def test_normalisation_equals_manual():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    torch.manual_seed(0)
    normalised = build("small", mean=mean, std=std).eval()
    torch.manual_seed(0)
    plain = build("small").eval()
    x = torch.rand(4, *CIFAR)
    manual = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert torch.equal(normalised(x), plain(manual))
    assert torch.equal(plain.normalize(x), x)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CHEAP)
def test_styles_replace_every_norm_and_activation_and_keep_weights_and_names(name, style):
    torch.manual_seed(1)
    plain = build(name, image_shape=(3, 16, 16))
    after = torch.rand(1)
    torch.manual_seed(1)
    model = build(name + style, image_shape=(3, 16, 16))
    assert torch.equal(torch.rand(1), after)
    mine, theirs = (dict(net.named_parameters()) for net in (model, plain))
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    if not style:
        return
    counts = Counter(type(module) for module in plain.modules())
    wanted = {
        nn.GroupNorm if "gn" in style else nn.BatchNorm2d: counts[nn.BatchNorm2d],
        nn.SiLU if "silu" in style else nn.ReLU: counts[nn.ReLU],
    }
    kinds = (nn.GroupNorm, nn.BatchNorm2d, nn.SiLU, nn.ReLU)
    assert {
        kind: n for kind, n in Counter(type(m) for m in model.modules()).items() if kind in kinds
    } == wanted


def test_silu_stands_where_gowals_network_has_it():
    """deepmind-research's adversarial_robustness zoo, block by block, at stride 1, where paddings agree."""
    block = WideBlock(4, 6, 1, split_style("x-silu")[1]).double()
    x, norm, act = torch.randn(2, 4, 5, 5, dtype=torch.float64), F.batch_norm, F.silu

    def batch_norm(values, layer):
        return norm(values, None, None, layer.weight, layer.bias, training=True)

    pre = act(batch_norm(x, block.bn1))
    inside = act(batch_norm(F.conv2d(pre, block.conv1.weight, padding=1), block.bn2))
    expected = F.conv2d(inside, block.conv2.weight, padding=1) + F.conv2d(pre, block.convShortcut.weight)
    torch.testing.assert_close(block(x), expected)


@given(channels=st.integers(1, 4096))
def test_group_norm_takes_every_width(channels):
    layer = group_norm(channels)
    assert channels % layer.num_groups == 0
    assert layer.num_groups == max(n for n in (1, 2, 4, 8, 16, 32) if channels % n == 0)


@pytest.mark.parametrize("name", CHEAP)
def test_every_parameter_gets_a_gradient(name):
    image_shape = (3, 16, 16)
    model = build(name, image_shape=image_shape)
    model(torch.rand(2, *image_shape)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("image_shape", [DIGITS, (1, 28, 28), (3, 64, 48)])
def test_ours_take_any_channels_and_size(name, image_shape):
    with torch.device("meta"):
        assert build(name, image_shape=image_shape)(torch.empty(2, *image_shape)).shape == (2, 10)


@pytest.mark.parametrize("name", CHEAP)
def test_channels_last_gives_the_same_logits(name):
    image_shape = (3, 16, 16)
    model = build(name, image_shape=image_shape).eval()
    x = torch.rand(2, *image_shape)
    with torch.no_grad():
        expected = model(x)
        got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_wrn_initialisation_is_fan_out_normal():
    net = build("wrn-10-4").net
    weight = net.block3.layer[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert net.fc.bias.abs().sum() == 0


@pytest.mark.parametrize(
    "name",
    ["WRN-10-1", "wrn_10_1", "Small", "ResNet18-S1122", "preact-resnet18", "WRN_10-1_SiLU-gn", "small_gn"],
)
def test_names_ignore_case_and_separator(name):
    with torch.device("meta"):
        build(name)


def test_known_models_all_have_a_builder():
    names = known_models()
    assert set(OURS) < set(names)
    assert "mobilenet_v2" in names
    assert names == sorted(names)


def test_ours_come_before_torchvision():
    with torch.device("meta"):
        ours, theirs = build("resnet18"), build("torchvision:ResNet18")
    assert ours.net.conv1.kernel_size == (3, 3)
    assert theirs.net.conv1.kernel_size == (7, 7)


@pytest.mark.parametrize("name", ["vit_b_16", "googlenet", "mobilenet_v3_small"])
def test_torchvision_models_return_logits_in_train_mode(name):
    with torch.device("meta"):
        model = build(name, num_classes=7, image_shape=(3, 64, 64)).train()
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "image_shape", "message"),
    [
        (
            "resnet81",
            CIFAR,
            "unknown model 'resnet81': did you mean 'resnet18'.*known: small, .*resnet18, .*timm:NAME",
        ),
        ("torchvision:resnte18", CIFAR, "unknown torchvision model 'resnte18': did you mean 'resnet18'"),
        ("wrn-33-10", CIFAR, r"wrn-33-10: depth must be .*\(6n \+ 4\)"),
        ("wrn-34-0", CIFAR, "width at least 1"),
        ("small-gn-silu", CIFAR, "unknown model 'small-gn-silu'.*each also with -silu, -gn or -silu-gn"),
        ("vgg11_gn", CIFAR, "unknown model 'vgg11_gn'"),
        ("alexnet", CIFAR, "model 'alexnet' does not take 3x32x32 images .*--image-size"),
        ("vit_b_16", (3, 30, 30), "vit_b_16 cannot be built for 30x30 images"),
        ("vit_b_16", (3, 32, 64), "does not take 3x32x64 images"),
        ("mobilenet_v2", DIGITS, r"mobilenet_v2 takes RGB images only, the data has 1 channel\(s\)"),
    ],
)
def test_names_and_sizes_that_do_not_work(name, image_shape, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build(name, image_shape=image_shape)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"mean": (0.5,)}, "mean has 1 numbers but the images have 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, r"std must be positive, got \(0.5, 0.0, 0.5\)"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(UserError, match=message):
        build("small", **kwargs)


def test_check_leaves_mode_buffers_and_random_state():
    model = build("small")
    assert model.training
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_fit(model, "small", num_classes=10, image_shape=CIFAR)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_check_names_wrong_output():
    with pytest.raises(
        UserError, match=re.escape("maps two 3x32x32 images to (2, 10), not to logits (2, 5)")
    ):
        check_fit(build("small"), "small", num_classes=5, image_shape=CIFAR)


def test_timm_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=re.escape("timm:resnet18 needs timm, which is not installed: pip install 'fas")
    ):
        build("timm:resnet18")


def fake_timm(name: str, *, pretrained: bool, num_classes: int, in_chans: int, img_size=None) -> nn.Module:
    """Stand in for timm.create_model: one network of fixed size and one that rejects the argument."""
    assert not pretrained
    if name == "conv":
        if img_size is not None:
            raise TypeError("__init__() got an unexpected keyword argument 'img_size'")
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_chans, num_classes))
    if img_size[0] % 16:
        raise AssertionError("image size must be a multiple of the patch size")
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * img_size[0] * img_size[1], num_classes))


def test_timm_builds_for_channels_and_size(monkeypatch):
    names = ["conv", "patches"]
    timm = SimpleNamespace(create_model=fake_timm, is_model=names.__contains__, list_models=lambda: names)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: timm)
    assert build("timm:conv", image_shape=DIGITS)(torch.rand(2, *DIGITS)).shape == (2, 10)
    assert build("timm:patches", image_shape=DIGITS)(torch.rand(2, *DIGITS)).shape == (2, 10)
    with pytest.raises(
        UserError, match=r"timm:patches cannot be built for 1x28x28 images: image size must be"
    ):
        build("timm:patches", image_shape=(1, 28, 28))
    with pytest.raises(UserError, match=r"unknown timm model 'patchs': did you mean 'patches'.*all 2"):
        build("timm:patchs")


@needs("timm")
def test_real_timm():
    for name in ("resnet10t", "vit_tiny_patch16_224"):
        assert build(f"timm:{name}", image_shape=DIGITS)(torch.rand(2, *DIGITS)).shape == (2, 10)
