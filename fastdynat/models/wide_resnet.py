"""WideResNet as in TRADES: ReLU, no dropout, shortcut from the pre-activated input where channels change.

With SiLU it has the activations of Gowal et al. 2020 and DyART (in each place of a ReLU), with
`Style.same_padding` also their padding of strided convolutions.
"""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.errors import UserError
from fastdynat.machine.free_memory import check_room
from fastdynat.models.layer_styles import PLAIN, Style
from fastdynat.models.preact_resnet import pad_same
from fastdynat.models.resnet import conv3x3

MAX_DEPTH = 1000


def check_size(depth: int, width: int, num_classes: int) -> None:
    """Raise UserError for a depth and width that fit into no memory: both may come from a file or a flag."""
    if depth > MAX_DEPTH:
        raise UserError(
            f"wrn-{depth}-{width}: depth must be at most {MAX_DEPTH}; the deepest published one is 94"
        )
    blocks, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
    weights = num_classes * widths[-1]
    for before, after in pairwise(widths):
        weights += 10 * before * after + 9 * (2 * blocks - 1) * after * after
    check_room(4 * weights, f"wrn-{depth}-{width}: choose a smaller one; its weights alone take")


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, plus the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, style: Style = PLAIN) -> None:
        super().__init__()
        self.activation = style.activation()
        self.bn1 = style.norm(in_channels)
        self.pads = style.same_padding and stride == 2
        self.conv1 = conv3x3(in_channels, out_channels, stride, padding=0 if self.pads else 1)
        self.bn2 = style.norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        # camelCase because published TRADES-style checkpoints store the projection under this key.
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual and the shortcut."""
        out = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        if self.pads:
            out = pad_same(out)
        return self.conv2(self.activation(self.bn2(self.conv1(out)))), shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        residual, shortcut = self.parts(x)
        return residual + shortcut


class WideStage(nn.Module):
    """A stack of wide blocks at one width; only the first strides."""

    def __init__(
        self, num_blocks: int, in_channels: int, out_channels: int, stride: int, style: Style = PLAIN
    ) -> None:
        super().__init__()
        blocks = [WideBlock(in_channels, out_channels, stride, style)]
        blocks += [WideBlock(out_channels, out_channels, 1, style) for _ in range(num_blocks - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-width; at 32x32, WRN-34-10 has 46.16 M parameters, 6.66 GMAC; WRN-28-10 36.48 M, 5.24 GMAC.

    Unlike the TRADES class it registers no second copy of the first stage (`sub_block1`), which never ran
    there but grew the parameter count and every checkpoint. Initialisation is that code's: convolutions
    normal with standard deviation sqrt(2 / (k * k * out_channels)), BatchNorm 1 and 0, the bias of the last
    layer 0.

    Raises: UserError where depth is not 6n + 4 or width is below 1.
    """

    def __init__(
        self, *, depth: int, width: int, num_classes: int, in_channels: int, style: Style = PLAIN
    ) -> None:
        super().__init__()
        self.activation = style.activation()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise UserError(
                f"wrn-{depth}-{width}: depth must be 10, 16, 22, 28, 34, ... (6n + 4) and width at least 1"
            )
        num_blocks = (depth - 4) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.block1 = WideStage(num_blocks, 16, 16 * width, 1, style)
        self.block2 = WideStage(num_blocks, 16 * width, 32 * width, 2, style)
        self.block3 = WideStage(num_blocks, 32 * width, 64 * width, 2, style)
        self.bn1 = style.norm(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to logits (N, num_classes)."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = self.activation(self.bn1(out))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
