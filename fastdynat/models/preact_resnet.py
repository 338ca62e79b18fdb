"""Pre-activation ResNets for small images: 18, 34 and 50, with batch norm and ReLU before the pooling.

Parameter names are those of published checkpoints (conv1, layer1.0.conv1, ..., bn, linear). With
`Style.same_padding` the blocks are those of DeepMind's code (Gowal et al. 2021): TensorFlow's "SAME" padding,
and 3x3 projections.

Published blocks differ in the input of a projection shortcut, with the same keys and shapes: batch norm and
ReLU of the block's input (He et al. 2016, arXiv 1603.05027; Rice et al. 2020), or with `Style.raw_shortcut`
that input itself (Wong et al. 2020, de Jorge et al. 2022, Li and Spratling 2023, and DeepMind's).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.errors import UserError
from fastdynat.models.layer_styles import PLAIN, Style
from fastdynat.models.resnet import WIDTHS, conv3x3

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
BOTTLENECK = 50  # from this depth on


def pad_same(x: Tensor) -> Tensor:
    """Images (N, C, H, W) padded for a 3x3 convolution of stride 2.

    One row behind an even height, one on each side of an odd one; columns alike.
    """
    height, width = x.shape[2:]
    return F.pad(x, (width % 2, 1, height % 2, 1))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each 3x3 convolution; a projection shortcut sees the pre-activated input.

    With `Style.raw_shortcut` it sees the input as it is.
    """

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int, style: Style = PLAIN) -> None:
        super().__init__()
        self.activation = style.activation()
        self.bn1 = style.norm(in_channels)
        self.raw, self.pads = style.raw_shortcut, style.same_padding and stride == 2
        padding = 0 if self.pads else 1
        self.conv1 = conv3x3(in_channels, out_channels, stride, padding=padding)
        self.bn2 = style.norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            if style.same_padding:
                projection = conv3x3(in_channels, out_channels, stride, padding=padding)
            self.shortcut = nn.Sequential(projection)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.activation(self.bn1(x))
        shortcut = x
        if self.shortcut is not None:
            source = x if self.raw else out
            shortcut = self.shortcut(pad_same(source) if self.pads else source)
        out = self.conv1(pad_same(out) if self.pads else out)
        return self.conv2(self.activation(self.bn2(out))) + shortcut


class PreActBottleneck(nn.Module):
    """BatchNorm and ReLU before each of 1x1, 3x3 and 1x1 convolutions; the last has 4 times the width."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, style: Style = PLAIN) -> None:
        super().__init__()
        if style.same_padding or style.raw_shortcut:
            name = "-same" if style.same_padding else "-raw"
            raise UserError(f"{name} is for preact_resnet18 and 34: no release has deeper ones; leave it out")
        out_channels = self.expansion * width
        self.activation = style.activation()
        self.bn1 = style.norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn2 = style.norm(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn3 = style.norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4 width, H / stride, W / stride)."""
        out = self.activation(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.activation(self.bn2(out)))
        return self.conv3(self.activation(self.bn3(out))) + shortcut


class PreActResNet(nn.Module):
    """Pre-activation ResNet with a 3x3 stem; at 32x32, depth 18 has 11.17 M parameters and 0.56 GMAC.

    Strides (1, 2, 2, 2) are the CIFAR network; (2, 2, 2, 2) the one that halves 64x64 images once more, so
    that its arithmetic on Tiny-ImageNet is that on CIFAR.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        depth: int = 18,
        strides: tuple[int, int, int, int] = (1, 2, 2, 2),
        style: Style = PLAIN,
    ) -> None:
        super().__init__()
        block: type[PreActBlock] | type[PreActBottleneck] = (
            PreActBottleneck if depth >= BOTTLENECK else PreActBlock
        )
        self.activation = style.activation()
        self.conv1 = conv3x3(in_channels, WIDTHS[0])
        channels = WIDTHS[0]
        for number, (width, blocks, stride) in enumerate(zip(WIDTHS, DEPTHS[depth], strides, strict=True), 1):
            stage = []
            for index in range(blocks):
                stage.append(block(channels, width, 1 if index else stride, style))
                channels = block.expansion * width
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.bn = style.norm(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to logits (N, num_classes)."""
        out = self.conv1(x)
        for number in range(1, len(WIDTHS) + 1):
            out = self.get_submodule(f"layer{number}")(out)
        out = self.activation(self.bn(out))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
