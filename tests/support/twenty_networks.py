"""Networks of torchvision and timm, the smallest of each family, with images that they take quickly."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fastdynat.models import build_model


@dataclass(frozen=True)
class Row:
    """A network as `--model` names it.

    Attributes:
        size: pixels of the images' sides.
        folded, norms: batch norms that the attack folds, and all of them.
        least: share of equal pixels of an attack and the plain one, where ReLUs at 0 turn by rounding.
    """

    size: int
    folded: int
    norms: int
    least: float = 0.97


TABLE = {
    "timm:resnet18": Row(32, 20, 20),
    "timm:resnext26ts": Row(32, 31, 31),
    "torchvision:efficientnet_b0": Row(32, 49, 49),
    "timm:convnext_atto": Row(32, 0, 0),
    "timm:vit_tiny_patch16_224": Row(32, 0, 0),
    "timm:deit_tiny_patch16_224": Row(32, 0, 0),
    "torchvision:swin_t": Row(32, 0, 0),
    "timm:mixer_s32_224": Row(32, 0, 0),
    "timm:regnetx_002": Row(32, 44, 44),
    "timm:mobilenetv3_small_050": Row(32, 34, 34),
    "torchvision:mobilenet_v2": Row(32, 52, 52),
    "timm:densenet121": Row(32, 59, 121),
    "torchvision:shufflenet_v2_x0_5": Row(32, 56, 56),
    "timm:coatnet_nano_rw_224": Row(32, 15, 22),
    "torchvision:googlenet": Row(32, 57, 57),
    "torchvision:squeezenet1_1": Row(32, 0, 0),
    "torchvision:mnasnet0_5": Row(32, 52, 52),
    "timm:eva02_tiny_patch14_224": Row(28, 0, 0),
    "timm:resmlp_12_224": Row(32, 0, 0),
    "timm:poolformer_s12": Row(32, 0, 0),
    "timm:vgg11_bn": Row(32, 8, 8),
    "timm:tf_efficientnet_b0": Row(32, 44, 49),
}
# Minutes of the default tests: large, or slow to initialise.
LARGE = ("torchvision:swin_t", "timm:mixer_s32_224", "timm:coatnet_nano_rw_224", "timm:vgg11_bn")


def table_network(name: str) -> nn.Module:
    """The network `name` of the table, as a run builds it; skips where its library is missing."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    size = TABLE[name].size
    return build_model(name, num_classes=10, image_shape=(3, size, size))
