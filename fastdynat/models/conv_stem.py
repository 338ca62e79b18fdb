"""ConvNeXt, ViT and isotropic ConvNeXt with convolutional stems (Singh et al. 2023, arXiv 2303.01870).

timm's networks with another stem; parameter names are those of the released weights, which load by key. The
published ones are convnext-t, s, b and l, vit-s and vit-b, convnext-iso-s; the others follow the same rule.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.errors import UserError, first_line, unknown_name
from fastdynat.models.external import require_timm

ENDING = "-cvst"
EPS = 1e-6
# timm's backbone, and the channels of its stem's convolutions; strides follow from their number.
CONVNEXTS = {
    "convnext-atto": ("convnext_atto", (20, 40)),
    "convnext-t": ("convnext_tiny", (48, 96)),
    "convnext-s": ("convnext_small", (48, 96)),
    "convnext-b": ("convnext_base", (64, 96, 128)),
    "convnext-l": ("convnext_large", (96, 144, 192)),
}
VITS = {
    "vit-ti": ("deit_tiny_patch16_224", 24, 192),
    "vit-s": ("deit_small_patch16_224", 48, 384),
    "vit-b": ("vit_base_patch16_224", 48, 768),
}
ISOTROPIC = {"convnext-iso-ti": (24, 192, 6), "convnext-iso-s": (48, 384, 18)}  # first channels, width, depth


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """3x3 convolutions, each with layer norm and GELU; in front of tokens a 1x1 convolution follows.

    Args:
        channels: of the 3x3 convolutions; all stride by 2 but the third of three.
        tokens: width of the tokens; None for ConvNeXt, whose first stage takes the last of `channels`.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], tokens: int | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for number, width in enumerate(channels):
            stride = 1 if len(channels) == 3 and number == 2 else 2
            layers += [nn.Conv2d(before, width, 3, stride=stride, padding=1), ChannelNorm(width), nn.GELU()]
            before = width
        if tokens is not None:
            layers.append(nn.Conv2d(before, tokens, 1))
        self.stem = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, width, H / 4, W / 4), or H / 16, W / 16 in front of tokens."""
        return self.stem(x)


class IsotropicBlock(nn.Module):
    """ConvNeXt's block without layer scale: depthwise 7x7 convolution, layer norm, wide MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to the same shape."""
        rows = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(F.gelu(self.pwconv1(rows))).permute(0, 3, 1, 2)


class IsotropicConvNeXt(nn.Module):
    """ConvNeXt at a sixteenth of the image's resolution (Liu et al. 2022, section 3.3), with a ConvStem."""

    def __init__(self, first: int, width: int, depth: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = ConvStem(in_channels, tuple(first * 2**i for i in range(4)), width)
        self.blocks = nn.Sequential(*(IsotropicBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, num_classes)
        for layer in (*self.blocks.modules(), self.head):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        return self.head(self.norm(self.blocks(self.stem(x)).mean((-2, -1))))


def conv_stem_names() -> list[str]:
    """The names of the networks with convolutional stems."""
    return [f"{name}{ENDING}" for name in (*CONVNEXTS, *VITS, *ISOTROPIC)]


def conv_stem_name(name: str) -> str | None:
    """`name` as `conv_stem_names` spells it; None for the name of another network."""
    plain = name.lower().replace("_", "-")
    return plain if plain.endswith(ENDING) and ":" not in plain else None


def build_conv_stem(name: str, *, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build the network called `name` (one of `conv_stem_names`).

    Raises: UserError for an unknown name, without timm, or for images that the network refuses.
    """
    if name not in conv_stem_names():
        raise unknown_name("model", name, conv_stem_names())
    base, (channels, height, width) = name.removesuffix(ENDING), image_shape
    if height % 16 or width % 16:
        raise UserError(
            f"{name} takes images whose sides are multiples of 16 pixels, these are {height}x{width}; use "
            "another --image-size"
        )
    if base in ISOTROPIC:
        return IsotropicConvNeXt(*ISOTROPIC[base], num_classes=num_classes, in_channels=channels)
    theirs = (CONVNEXTS.get(base) or VITS[base])[0]
    timm: Any = require_timm(theirs)
    sizes = {"img_size": (height, width)} if base in VITS else {}
    try:
        model: Any = timm.create_model(theirs, num_classes=num_classes, in_chans=channels, **sizes)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"{name} cannot be built for {channels}x{height}x{width} images: {first_line(error)}"
        ) from error
    if base in CONVNEXTS:
        model.stem = ConvStem(channels, CONVNEXTS[base][1])
    else:
        _, first, tokens = VITS[base]
        model.patch_embed.proj = ConvStem(channels, tuple(first * 2**i for i in range(4)), tokens)
    return model
