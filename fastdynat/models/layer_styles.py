"""Normalisation and activation layers of a network, named by suffixes of the network's name."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

MAX_GROUPS = 32


@dataclass(frozen=True)
class Style:
    """`norm`: channels -> normalisation layer. `activation`: -> activation layer, stateless.

    `same_padding`: wide and pre-activation networks pad a strided 3x3 convolution as TensorFlow's "SAME"
    does, behind the image before around it; pre-activation ones also project by 3x3, as DeepMind's do.
    `raw_shortcut`: pre-activation networks project a block's input as it is, before batch norm and ReLU.
    """

    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    activation: Callable[[], nn.Module] = nn.ReLU
    same_padding: bool = False
    raw_shortcut: bool = False


PLAIN = Style()


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with gcd(32, channels) groups: 32 (Wu & He 2018) wherever the width allows it.

    That is also what DyART's GN networks have (through Opacus' replacement of batch norm). 16 channels get 16
    groups.
    """
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels)


def split_style(name: str) -> tuple[str, Style]:
    """Split a network's name into its base (lower case, `-` between the words) and its style.

    >>> split_style("WRN_28_10_silu-gn")[0], split_style("small")[0]
    ('wrn-28-10', 'small')
    """
    whole = name.lower().replace("_", "-")
    preact = whole.startswith("preact-")
    same = whole.endswith("-same") and (preact or whole.startswith("wrn-"))
    raw = whole.endswith("-raw") and preact
    key = whole.removesuffix("-same" if same else "-raw") if same or raw else whole
    base = key.removesuffix("-gn")
    plain = base.removesuffix("-silu")
    norm, activation = nn.BatchNorm2d if base == key else group_norm, nn.ReLU if plain == base else nn.SiLU
    return plain, Style(norm, activation, same_padding=same, raw_shortcut=raw or (same and preact))
