"""Networks trained elsewhere, for the evaluation: by their library's name, or from the user's code."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fastdynat.errors import UserError
from fastdynat.models.build import build_model
from fastdynat.models.external import build_timm, build_torchvision
from fastdynat.models.finite import check_finite
from fastdynat.models.initial_state import network_pixels, put_initial_state
from fastdynat.models.own_networks import Shape, check_network_output, network_of
from fastdynat.models.state_digest import state_digest
from fastdynat.models.state_files import put_published_state, read_state_dict
from fastdynat.models.zoo import robustbench, timm_pretrained, torchvision_pretrained
from fastdynat.user_code import import_object, is_user_code


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A network in eval mode, on the CPU where its maker put it there.

    Attributes:
        model: float images (N, C, H, W) in [0, 1] -> logits (N, num_classes).
        name: the name given by the user.
        sha256: of that name, of the user's source file where there is one, and of all parameters and buffers
            by their names: what predicts something else has another digest. A change in a file that theirs
            imports is not seen.
        note: what was put in front of it, and what is suspicious about it; "" if nothing.
    """

    model: nn.Module
    name: str
    sha256: str
    note: str


def load_foreign(
    name: str,
    *,
    num_classes: int | None = None,
    image_shape: Shape | None = None,
    weights: Path | str | None = None,
) -> ForeignModel:
    """The network called `name`, checked to map `image_shape` to `num_classes` logits where these are given.

    Args:
        name: one of ``robustbench:NAME[:DATASET[:THREAT]]`` (cifar10 and Linf unless given);
            ``torchvision:NAME``, ``timm:NAME``: with their default weights, whose mean and std are put in
            front; ``module:callable``, ``path/to/file.py:callable``: returns an nn.Module; called with
            num_classes and image_shape if it has parameters of these names. It takes images in [0, 1] as they
            are.
        weights: a state dict (.safetensors, or torch.save without code) to load instead of the published or
            made weights. Images come in [0, 1] as they are, unless the file brings this library's
            normalisation.

    Raises: UserError where the name, the file, the download or the user's code fails, or the network does not
    fit.
    """
    weights = None if weights is None else Path(weights)
    kind, _, rest = name.partition(":")
    if not kind or not rest:
        raise UserError(
            f"unknown network {name!r}: give robustbench:NAME, torchvision:NAME, timm:NAME, module:callable "
            "or path/to/file.py:callable"
        )
    source = b""
    if kind == "robustbench":
        model, note = robustbench(rest, weights)
    elif kind in ("torchvision", "timm"):
        model, note = _external(kind, rest, num_classes, image_shape, weights)
    else:
        offered = {"num_classes": num_classes, "image_shape": image_shape}
        model, source = network_of(name, {key: value for key, value in offered.items() if value is not None})
        model, note = (
            model if weights is None else put_published_state(model, read_state_dict(weights), weights),
            "",
        )
    model.eval()
    check_finite(model, name if weights is None else weights)
    suspicion = "" if image_shape is None else check_network_output(model, name, num_classes, image_shape)
    return ForeignModel(
        model=model,
        name=name,
        sha256=_digest(name, source, model),
        note="; ".join(filter(None, (note, suspicion))),
    )


def load_weights_file(
    file: Path,
    name: str,
    *,
    num_classes: int,
    image_shape: Shape,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> ForeignModel:
    """The network `name` (as for `build_model`) with the weights in `file`, which may be a released one's.

    Args:
        mean, std: of a `Normalize` in front, per channel in [0, 1] units; those in `file` go before them.

    Raises: UserError where the file fails, or its weights do not fit the network, the last layer included.
    """
    model = build_model(name, num_classes=num_classes, image_shape=image_shape, mean=mean, std=std)
    source = import_object(name)[1] if is_user_code(name) else b""
    state = read_state_dict(file)
    placed = put_initial_state(model, state, str(file), num_classes=num_classes)
    if placed.head:
        raise UserError(
            f"{file} is for {placed.classes} classes, but the data has {num_classes}: give the data set that "
            "it was trained on"
        )
    model.eval()
    found = network_pixels(model)
    note = "" if found is None else f"{name}, images normalised by mean {found[0]} and std {found[1]}"
    suspicion = check_network_output(model, name, num_classes, image_shape)
    return ForeignModel(
        model=model,
        name=str(file),
        sha256=_digest(name, source, model),
        note="; ".join(filter(None, (note, suspicion))),
    )


def _external(
    kind: str, name: str, num_classes: int | None, image_shape: Shape | None, weights: Path | None
) -> tuple[nn.Module, str]:
    if weights is None:
        return torchvision_pretrained(name) if kind == "torchvision" else timm_pretrained(name)
    if num_classes is None or image_shape is None:
        raise UserError(f"{kind}:{name} with weights of your own needs num_classes and image_shape")
    build, name = (build_torchvision, name.lower()) if kind == "torchvision" else (build_timm, name)
    model = build(name, num_classes=num_classes, image_shape=image_shape)
    return put_published_state(model, read_state_dict(weights), weights), ""


def _digest(name: str, source: bytes, model: nn.Module) -> str:
    digest = hashlib.sha256(name.encode())
    digest.update(source)
    digest.update(state_digest(model.state_dict()).encode())
    return digest.hexdigest()
