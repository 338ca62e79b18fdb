"""ResNet-18 for small images: the usual one and LBGAT/DYNAT's slower-striding guide.

Parameter names are the ones common in published checkpoints (conv1, layer1.0.conv1, ..., linear), so those
load by key. Convolutions keep PyTorch's default initialisation, as the published training runs do. A `Style`
puts another normalisation and another activation in the places of batch norm and ReLU; the names stay.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.models.layer_styles import PLAIN, Style

WIDTHS = (64, 128, 256, 512)
BLOCKS_PER_STAGE = 2


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, padding: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=padding, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, BatchNorm after each, ReLU after the sum with the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, style: Style = PLAIN) -> None:
        super().__init__()
        self.activation = style.activation()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = style.norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = style.norm(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, style.norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(out)) + self.shortcut(x))


def make_layer(in_channels: int, width: int, stride: int, style: Style) -> nn.Sequential:
    """Stack one stage of blocks; only its first block strides."""
    blocks = [BasicBlock(in_channels, width, stride, style)]
    blocks += [BasicBlock(width, width, 1, style) for _ in range(BLOCKS_PER_STAGE - 1)]
    return nn.Sequential(*blocks)


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem and no max-pool (11.17 M parameters).

    Strides (1, 2, 2, 2) are the usual CIFAR network, 0.56 GMAC at 32x32. Strides (1, 1, 2, 2) are the guide
    that LBGAT and DYNAT ship as "ResNet18_cifar": the same parameters, but stage 2 stays at full resolution,
    so 1.76 GMAC, 3.2 times the arithmetic. The final pooling is adaptive, so any image size that survives the
    strides works.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        strides: tuple[int, int, int, int] = (1, 2, 2, 2),
        style: Style = PLAIN,
    ) -> None:
        super().__init__()
        self.activation = style.activation()
        self.conv1 = conv3x3(in_channels, WIDTHS[0])
        self.bn1 = style.norm(WIDTHS[0])
        self.layer1 = make_layer(WIDTHS[0], WIDTHS[0], strides[0], style)
        self.layer2 = make_layer(WIDTHS[0], WIDTHS[1], strides[1], style)
        self.layer3 = make_layer(WIDTHS[1], WIDTHS[2], strides[2], style)
        self.layer4 = make_layer(WIDTHS[2], WIDTHS[3], strides[3], style)
        self.linear = nn.Linear(WIDTHS[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to logits (N, num_classes)."""
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
