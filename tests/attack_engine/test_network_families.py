"""Every family of torchvision and timm: the drop-in attack equals the plain one and changes nothing."""

import warnings
from typing import Any

import pytest
import torch
from conftest import needs
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
from torch import nn

from fastdynat import PGD

# Families by a small member, with the image size; the others are attacked with `-m slow`.
USUAL = {
    "torchvision": {
        "resnet18": 32,
        "mobilenet_v2": 32,
        "googlenet": 32,
        "efficientnet_b0": 32,
        "densenet121": 32,
    },
    "timm": {
        "resnet18": 32,
        "vit_tiny_patch16_224": 32,
        "convnext_atto": 32,
        "mobilenetv4_conv_small": 32,
        "repvgg_a0": 32,
    },
}
OTHERS = {
    "torchvision": {
        "resnet50": 64,
        "resnext50_32x4d": 64,
        "wide_resnet50_2": 64,
        "vgg11": 32,
        "vgg11_bn": 32,
        "inception_v3": 96,
        "mobilenet_v3_small": 64,
        "shufflenet_v2_x0_5": 64,
        "squeezenet1_1": 64,
        "mnasnet0_5": 64,
        "efficientnet_v2_s": 64,
        "regnet_y_400mf": 64,
        "convnext_tiny": 64,
        "swin_t": 64,
        "swin_v2_t": 64,
        "vit_b_32": 224,
        "maxvit_t": 224,
        "alexnet": 64,
    },
    "timm": {
        "resnetv2_50": 64,
        "resnet26d": 64,
        "seresnet18": 64,
        "deit_tiny_patch16_224": 224,
        "mixer_s32_224": 224,
        "swin_tiny_patch4_window7_224": 224,
        "nfnet_l0": 64,
        "nf_resnet26": 64,
        "regnetx_002": 64,
        "regnety_002": 64,
        "efficientnet_b0": 64,
        "tf_efficientnet_b0": 64,
        "efficientnet_lite0": 64,
        "mobilenetv3_small_050": 64,
        "xcit_nano_12_p16_224": 224,
        "densenet121": 64,
        "vgg11_bn": 32,
        "ghostnet_050": 64,
        "levit_128s": 224,
        "cait_xxs24_224": 224,
        "poolformer_s12": 64,
        "edgenext_xx_small": 64,
        "fastvit_t8": 64,
        "mobileone_s0": 64,
        "res2net50_26w_4s": 64,
        "dpn48b": 64,
        "lcnet_035": 64,
        "mobilevit_xxs": 64,
        "coatnet_nano_rw_224": 224,
        "efficientformer_l1": 224,
        "inception_next_tiny": 64,
    },
}
# ReLUs at 0 that rounding switches, in networks with many pixels that hardly matter.
LEAST = 0.97


def build(library: str, name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    if library == "torchvision":
        import torchvision

        more: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return getattr(torchvision.models, name)(num_classes=10, **more)
    timm = pytest.importorskip("timm")
    more = {"img_size": size} if name.startswith("vit_") else {}
    return timm.create_model(name, num_classes=10, **more)


def vgg() -> nn.Module:
    """VGG-11 with batch norm, without its 120 million linear weights, which take long to initialise."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    return nn.Sequential(make_layers(cfgs["A"], batch_norm=True), nn.Flatten(), nn.Linear(512, 10))


def check(model: nn.Module, size: int) -> None:
    model, (x, y) = with_statistics(model).train(), batch(2, size)
    before, attack = snapshot(model), PGD(model, EPS, ALPHA, STEPS, random_start=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not folded
        got = attack(x, y)
        assert_untouched(model, before)
        want = plain_pgd(model, x, y)
    assert "replica" in attack.path
    assert same(want, x) < 0.6
    assert same(got, want) > LEAST, attack.path


@pytest.mark.parametrize("name", USUAL["torchvision"])
def test_torchvision(name: str) -> None:
    check(build("torchvision", name, USUAL["torchvision"][name]), USUAL["torchvision"][name])


def test_vgg() -> None:
    check(vgg(), 32)


@needs("timm")
@pytest.mark.parametrize("name", USUAL["timm"])
def test_timm(name: str) -> None:
    check(build("timm", name, USUAL["timm"][name]), USUAL["timm"][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS["torchvision"])
def test_other_families_of_torchvision(name: str) -> None:
    check(build("torchvision", name, OTHERS["torchvision"][name]), OTHERS["torchvision"][name])


@needs("timm")
@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS["timm"])
def test_other_families_of_timm(name: str) -> None:
    check(build("timm", name, OTHERS["timm"][name]), OTHERS["timm"][name])
