"""Networks of Peng et al. 2023 ("Robust Principles", arXiv 2308.16258): RaWRN and RaResNet.

SiLU, squeeze and excitation, and depths and widths that the paper found to be robust. Their batch norms have
momentum 0.01.
"""

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import SqueezeExcitation

from fastdynat.errors import UserError
from fastdynat.models.layer_styles import PLAIN, Style
from fastdynat.models.resnet import conv3x3
from fastdynat.models.wide_resnet import WideBlock

STEM = 96
SQUEEZE = 0.25
MOMENTUM = 0.01
RA_STYLE = Style(partial(nn.BatchNorm2d, momentum=MOMENTUM), nn.SiLU, same_padding=True)


def check_plain(name: str, style: Style) -> None:
    """Raise UserError for another style than `name`'s own."""
    if style != PLAIN:
        raise UserError(f"{name} has SiLU and batch norm of its own: leave -silu and -gn out")


class SqueezedWideBlock(nn.Module):
    """A wide block with "SAME" padding whose residual is scaled by channel (squeeze and excitation)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.inner = WideBlock(in_channels, out_channels, stride, RA_STYLE)
        self.se = SqueezeExcitation(out_channels, round(SQUEEZE * out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        residual, shortcut = self.inner.parts(x)
        return self.se(residual) + shortcut


class RaWideResNet(nn.Module):
    """RaWRN for small images: the default is RaWRN-70-16, 30, 31 and 10 blocks of width 216, 432 and 864."""

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        blocks: tuple[int, int, int] = (30, 31, 10),
        widths: tuple[int, int, int] = (216, 432, 864),
        style: Style = PLAIN,
    ) -> None:
        super().__init__()
        check_plain("rawrn", style)
        self.activation = RA_STYLE.activation()
        self.conv1 = conv3x3(in_channels, STEM)
        channels = STEM
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            stage = []
            for index in range(count):
                stage.append(SqueezedWideBlock(channels, width, 2 if index == 0 and number > 1 else 1))
                channels = width
            self.add_module(f"block{number}", nn.Sequential(*stage))
        self.bn1 = RA_STYLE.norm(channels)
        self.fc = nn.Linear(channels, num_classes)
        draw_by_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to logits (N, num_classes)."""
        out = self.conv1(x)
        for number in (1, 2, 3):
            out = self.get_submodule(f"block{number}")(out)
        out = self.activation(self.bn1(out))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


class RaBottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions; no norm after the first, squeeze and excitation before the last.

    The squeeze has a quarter of the block's input channels.
    """

    def __init__(self, in_channels: int, out_channels: int, group_width: int, stride: int) -> None:
        super().__init__()
        inner = out_channels // 4
        self.activation = nn.SiLU()
        self.conv1 = nn.Conv2d(in_channels, inner, kernel_size=1, bias=False)
        self.conv2 = nn.Conv2d(
            inner, inner, 3, stride=stride, padding=1, groups=inner // group_width, bias=False
        )
        self.bn2 = nn.BatchNorm2d(inner)
        self.se = SqueezeExcitation(inner, round(SQUEEZE * in_channels))
        self.conv3 = nn.Conv2d(inner, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.activation(self.conv1(x))
        out = self.se(self.activation(self.bn2(self.conv2(out))))
        return self.activation(self.bn3(self.conv3(out)) + self.shortcut(x))


class RaResNet(nn.Module):
    """RaWRN-101-2 and RaResNet-50 for ImageNet: a 7x7 stem of stride 2 and four stages that each halve."""

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        blocks: tuple[int, int, int, int] = (5, 8, 13, 1),
        widths: tuple[int, int, int, int] = (288, 576, 1120, 2160),
        group_widths: tuple[int, int, int, int] = (36, 72, 140, 270),
        style: Style = PLAIN,
    ) -> None:
        super().__init__()
        check_plain("raresnet", style)
        self.conv1 = nn.Conv2d(in_channels, STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        channels = STEM
        stages = enumerate(zip(blocks, widths, group_widths, strict=True), 1)
        for number, (count, width, group_width) in stages:
            stage = []
            for index in range(count):
                stage.append(RaBottleneck(channels, width, group_width, 1 if index else 2))
                channels = width
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(channels, num_classes)
        draw_by_fan_out(self)
        nn.init.normal_(self.fc.weight, 0.0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to logits (N, num_classes)."""
        out = self.relu(self.bn1(self.conv1(x)))
        for number in (1, 2, 3, 4):
            out = self.get_submodule(f"layer{number}")(out)
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


def draw_by_fan_out(network: nn.Module) -> None:
    """Draw convolutions from normals with standard deviation sqrt(2 / (k * k * out_channels))."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
