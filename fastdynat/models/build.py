"""Build a network by name: pixel normalisation first, then ours, torchvision's or timm's backbone."""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdynat.errors import UserError, first_line, unknown_name
from fastdynat.machine.free_memory import check_room
from fastdynat.models.conv_stem import build_conv_stem, conv_stem_name, conv_stem_names
from fastdynat.models.external import build_timm, build_torchvision, torchvision_names
from fastdynat.models.layer_styles import split_style
from fastdynat.models.own_networks import look, output_shape, own_network
from fastdynat.models.preact_resnet import PreActResNet
from fastdynat.models.ra_resnet import RaResNet, RaWideResNet
from fastdynat.models.resnet import ResNet18
from fastdynat.models.small import SmallNet
from fastdynat.models.wide_resnet import WideResNet, check_size
from fastdynat.user_code import is_user_supplied, short_name

LARGE = 512 * 512  # pixels of an image from which on a forward pass may not fit in memory
OURS: dict[str, Callable[..., nn.Module]] = {
    "small": SmallNet,
    "small_wide": partial(SmallNet, width=2),
    "resnet18": ResNet18,
    "resnet18_s1122": partial(ResNet18, strides=(1, 1, 2, 2)),
    "preact_resnet18": PreActResNet,
    "preact_resnet18_s2222": partial(PreActResNet, strides=(2, 2, 2, 2)),
    "preact_resnet34": partial(PreActResNet, depth=34),
    "preact_resnet50": partial(PreActResNet, depth=50),
    "wrn-28-10": partial(WideResNet, depth=28, width=10),
    "wrn-34-10": partial(WideResNet, depth=34, width=10),
    "rawrn-70-16": RaWideResNet,
    "rawrn-101-2": partial(
        RaResNet,
        blocks=(7, 11, 18, 1),
        widths=(512, 1024, 2016, 4032),
        group_widths=(64, 128, 252, 504),
    ),
    "raresnet-50": RaResNet,
}


class Normalize(nn.Module):
    """Subtract a per-channel mean and divide by a per-channel standard deviation, in [0, 1] pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map float images (N, C, H, W) in [0, 1] to the same shape, normalised."""
        return (x - self.mean) / self.std


class Divide(nn.Module):
    """Divide logits by a constant: the same predictions, another cross-entropy."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, logits: Tensor) -> Tensor:
        """Map logits of any shape to the same shape."""
        return logits / self.divisor

    def extra_repr(self) -> str:
        return f"{self.divisor:g}"


def undivided(network: nn.Module) -> nn.Module:
    """`network` of `build_model` without its `Divide`, with the same layers; others as they are."""
    parts = dict(network.named_children())
    if not isinstance(network, nn.Sequential) or not isinstance(parts.pop("divide", None), Divide):
        return network
    return nn.Sequential(OrderedDict(parts))


def known_models() -> list[str]:
    """Return the names that `build_model` knows without a prefix; `wrn-D-W` and `timm:NAME` come on top.

    A torchvision name that is also one of ours (resnet18) means ours; `torchvision:resnet18` means theirs.
    """
    return sorted({*OURS, *conv_stem_names(), *torchvision_names()})


def build_model(
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    divisor: float = 1.0,
) -> nn.Module:
    """Build a network that takes float images (N, C, H, W) in [0, 1] and returns logits (N, num_classes).

    The state dict has the keys `normalize.mean`, `normalize.std` and `net.*`. Weights are freshly drawn from
    the global random state; the check that the images fit draws nothing from it.

    Args:
        name: One of `known_models()`, `wrn-DEPTH-WIDTH`, `torchvision:NAME` or `timm:NAME`. Case does not
            matter, and for our own networks `-` and `_` are the same. Most of them also with `-silu` (SiLU
            for ReLU), `-gn` (group norm for batch norm) or `-silu-gn` at their end, wide and pre-activation
            ones after that with `-same` (padding of Gowal et al. 2020), pre-activation ones with `-raw`
            (projection shortcuts of Wong et al. 2020). `NAME-cvst` has a convolutional stem.
            Or a network of the user (`own_networks`), which takes the images as they are:
            `path/to/file.py:callable`, or the name from `given_network`.
        num_classes: Width of the last layer.
        image_shape: (C, H, W) of the images that will come.
        mean: Per-channel mean in [0, 1] units, C numbers; 0 if None.
        std: Per-channel standard deviation in [0, 1] units, C positive numbers; 1 if None.
        divisor: Of the logits (`Divide`), for training; the state dict does not have it.

    Raises: UserError for an unknown name, a bad mean or std, a divisor for a network of the user, or images
        that the network cannot take.
    """
    channels = image_shape[0]
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2, got {num_classes}")
    if is_user_supplied(name):
        if divisor != 1:
            raise UserError(
                f"--logit-scale {divisor:g} is for networks by name, not for your own {short_name(name)}; "
                "leave it out"
            )
        return own_network(name, num_classes=num_classes, image_shape=image_shape, mean=mean)
    normalize = Normalize(
        _per_channel("mean", mean, channels, default=0.0), _per_channel("std", std, channels, default=1.0)
    )
    backbone = _build_backbone(name, num_classes, image_shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalize, net=backbone)
    if divisor != 1:
        layers["divide"] = Divide(divisor)
    model = nn.Sequential(layers)
    check_fit(model, name, num_classes=num_classes, image_shape=image_shape)
    return model


def _per_channel(
    what: str, values: Sequence[float] | None, channels: int, *, default: float
) -> tuple[float, ...]:
    if values is None:
        return (default,) * channels
    if len(values) != channels:
        raise UserError(
            f"{what} has {len(values)} numbers but the images have {channels} channels; give one per channel"
        )
    if what == "std" and min(values) <= 0:
        raise UserError(f"std must be positive, got {tuple(values)}")
    return tuple(float(value) for value in values)


def _build_backbone(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    source, _, rest = name.partition(":")
    if rest and source.lower() == "torchvision":
        return build_torchvision(rest.lower(), num_classes=num_classes, image_shape=image_shape)
    if rest and source.lower() == "timm":
        return build_timm(rest, num_classes=num_classes, image_shape=image_shape)
    if stem := conv_stem_name(name):
        return build_conv_stem(stem, num_classes=num_classes, image_shape=image_shape)
    if make := our_network(name):
        if isinstance(make, partial) and make.func is WideResNet:
            check_size(**make.keywords, num_classes=num_classes)
        return make(num_classes=num_classes, in_channels=image_shape[0], style=split_style(name)[1])
    if name.lower() in torchvision_names():
        return build_torchvision(name.lower(), num_classes=num_classes, image_shape=image_shape)
    raise _unknown_model(name)


def our_network(name: str) -> Callable[..., nn.Module] | None:
    """Our class called `name`, whatever its style, or a partial of it; None where the name is not ours."""
    key = split_style(name)[0]
    for ours, make in OURS.items():
        if ours.replace("_", "-") == key:
            return make
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", key):
        return partial(WideResNet, depth=int(match[1]), width=int(match[2]))
    return None


def _unknown_model(name: str) -> UserError:
    # The suggestion may come from all of torchvision, but a line that lists all of it would hide our own
    # names.
    message = str(unknown_name("model", name, known_models())).partition("known:")[0]
    ours = f"{', '.join(OURS)}, wrn-D-W (each also with -silu, -gn or -silu-gn)"
    ours += f", {', '.join(conv_stem_names())}"
    return UserError(f"{message}known: {ours}, timm:NAME and torchvision's classifiers")


def check_fit(model: nn.Module, name: str, *, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Run two zero images through the model in eval mode; mode, buffers and random state are restored.

    Raises: UserError naming the image size where the forward fails, returns anything but (2, num_classes), or
        takes more memory than there is.
    """
    channels, height, width = image_shape
    size = f"{channels}x{height}x{width} images"
    remedy = "choose another --model or pass a larger --image-size"
    out = _dry_run(model, name, image_shape) if height * width > LARGE else None
    try:
        out = look(model, torch.zeros(2, *image_shape)) if out is None else out
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"model {name!r} does not take {size} ({first_line(error)}); {remedy}") from error
    if output_shape(out) != (2, num_classes):
        raise UserError(
            f"model {name!r} maps two {size} to {output_shape(out)}, not to logits (2, {num_classes}); "
            f"{remedy}"
        )


def _dry_run(model: nn.Module, name: str, image_shape: tuple[int, int, int]) -> object:
    """The output of `model` for two meta images, without memory; None if its code needs values.

    Raises: UserError where one operation reads and writes more than the memory that there is.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and rarely needed

    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Largest() as largest:
            out = look(model, torch.zeros(2, *image_shape))
    except Exception:  # of any kind: what is wrong with the network, its forward says
        return None
    size = "x".join(map(str, image_shape))
    check_room(largest.bytes, f"model {name!r} at {size} images: choose a smaller --image-size; two take")
    return out


class _Largest(TorchDispatchMode):
    """Watches operations for the one with the most bytes in arguments and result."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {
            id(t): t.numel() * t.element_size() for t in tree_leaves((args, out)) if isinstance(t, Tensor)
        }
        self.bytes = max(self.bytes, sum(held.values()))
        return out
