"""Weights from elsewhere put into a network: all must fit but the last layer, where the classes differ."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdynat.errors import UserError
from fastdynat.models.build import Normalize
from fastdynat.models.finite import check_finite
from fastdynat.models.released_keys import in_our_names
from fastdynat.models.state_files import check_kinds, counted_keys, without_wrappers

COUNTER = "num_batches_tracked"  # of batch norm: predicts nothing
PIXELS = ("normalize.mean", "normalize.std")
BACKBONE = "net."  # before each name behind a `Normalize`
POSITIONS = "pos_embed"  # in the names of embeddings of positions, timm's and torchvision's
SHOWN = 3


@dataclass(frozen=True)
class Placed:
    """The result of `put_initial_state`.

    Attributes:
        head: names of the parameters that stay as they were drawn.
        classes: of the weights, where they are others than the network's; None where they are as many.
    """

    head: tuple[str, ...]
    classes: int | None


@torch.no_grad()
def put_initial_state(
    model: nn.Module,
    state: dict[str, Tensor],
    origin: str,
    *,
    num_classes: int,
    other_classes: bool = False,
    pixels: tuple[Tensor, Tensor] | None = None,
) -> Placed:
    """Copy `state` into `model`, but for the last layer where the number of classes is another.

    Wrappers' prefixes go from the front of a key, and the `net.` of `build_model` is added, only where the
    model has no such key. Nothing is copied before everything has been found to fit.

    Args:
        origin: of the weights, for messages.
        num_classes: of `model`.
        other_classes: the weights are for as many, but other classes: the last layer stays as it is too.
        pixels: mean and standard deviation (C) that the weights expect; None takes them from `state`, and
            without any there keeps the model's.

    Raises:
        UserError: a layer is missing, unexpected, or of another shape or kind of number, listed with both
            shapes; or a weight is not finite.
    """
    own = model.state_dict()
    found = _renamed(in_our_names(state, own), own.keys(), origin)
    if pixels is not None:
        found |= dict(zip(PIXELS, pixels, strict=True))
    if PIXELS[0] in found and PIXELS[0] not in own:
        _refuse_normalisation(found, origin)
    for name in set(PIXELS) & found.keys() & own.keys():
        if found[name].numel() == own[name].numel():
            found[name] = found[name].reshape(own[name].shape)
    differing = {
        name: (tuple(value.shape), tuple(own[name].shape))
        for name, value in found.items()
        if name in own and value.shape != own[name].shape
    }
    head, classes = _head(differing, num_classes)
    if not head and other_classes:
        head = _last_layer(model, num_classes)
    missing = [n for n in own if n not in found and n not in PIXELS and not n.endswith(COUNTER)]
    unexpected = [n for n in found if n not in own and not n.endswith(COUNTER)]
    wrong = {name: shapes for name, shapes in differing.items() if name not in head}
    if wrong or missing or unexpected:
        raise _misfit(origin, wrong, missing, unexpected)
    taken = {name: value for name, value in found.items() if name in own and name not in head}
    check_kinds(own, taken, origin)
    for name, value in taken.items():
        own[name].copy_(value)
    check_finite(model, origin)
    return Placed(head, classes)


def network_pixels(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the `Normalize` at the front of `model`; None without one."""
    front = getattr(model, "normalize", None)
    if not isinstance(front, Normalize):
        return None
    return tuple(front.mean.flatten().tolist()), tuple(front.std.flatten().tolist())


def _renamed(state: dict[str, Tensor], wanted: Iterable[str], origin: str) -> dict[str, Tensor]:
    names = set(wanted)
    inner = {name.removeprefix(BACKBONE) for name in names if name.startswith(BACKBONE)}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = without_wrappers(key, names)
        if name not in names and (bare := without_wrappers(key, inner)) in inner:
            name = f"{BACKBONE}{bare}"
        if name in found:
            raise UserError(f"{origin} holds two networks: {name} is in it twice, under different prefixes")
        found[name] = value
    return found


def _refuse_normalisation(found: dict[str, Tensor], origin: str) -> None:
    """Refuse weights of normalised images for a network that takes images in [0, 1] as they are."""
    mean, std = (found.pop(name, torch.ones(1)).flatten().tolist() for name in PIXELS)
    if any(mean) or any(value != 1 for value in std):
        raise UserError(
            f"{origin} expects images normalised by mean {mean} and std {std}, but a network of your own "
            "takes them in [0, 1]: normalise inside of it, in buffers normalize.mean and normalize.std"
        )


def _head(
    differing: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], num_classes: int
) -> tuple[tuple[str, ...], int | None]:
    """The parameters that differ in nothing but the number of classes, their first dimension, and that of the
    weights."""
    names = [
        name
        for name, (theirs, ours) in differing.items()
        if ours[:1] == (num_classes,) and len(theirs) == len(ours) and theirs[1:] == ours[1:]
    ]
    classes = {differing[name][0][0] for name in names}
    return (tuple(names), classes.pop()) if len(classes) == 1 else ((), None)


def _last_layer(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """The parameters of the last layer in the network with so many outputs."""
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == num_classes
    ]
    if not layers:
        return ()
    name, layer = layers[-1]
    return tuple(f"{name}.{key}" for key, _ in layer.named_parameters(recurse=False))


def _misfit(
    origin: str,
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    missing: list[str],
    unexpected: list[str],
) -> UserError:
    parts = []
    if wrong:
        shown = [
            f"{name} is {theirs} there, {ours} in the network" for name, (theirs, ours) in wrong.items()
        ][:SHOWN]
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        parts.append(f"{len(wrong)} of other shapes ({'; '.join(shown)}{more})")
    parts += [
        counted_keys(what, names)
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    remedy = "name its network with --model"
    if wrong and not missing and not unexpected and all(POSITIONS in name for name in wrong):
        remedy = "positions are those of another image size: choose theirs with --image-size"
    return UserError(f"{origin} does not fit the network: {', '.join(parts)}; {remedy}")
