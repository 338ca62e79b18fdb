"""Foreign state dicts: read without running code, loaded whatever wrapper they were saved from."""

import re
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdynat.documents import short_repr
from fastdynat.documents.tensor_files import read_pickle, read_safetensors, starts_as_a_page
from fastdynat.errors import UserError, first_line
from fastdynat.models.build import Normalize
from fastdynat.models.released_keys import in_our_names

HOLDERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
)  # under which training scripts keep the state dict
WRAPPER = re.compile(
    r"(module|_orig_mod|model)\."
)  # DataParallel and averages, torch.compile, normalising wrappers
OURS = re.compile(rf"(?:{WRAPPER.pattern})*normalize\.mean")
SHOWN = 3


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`: safetensors, or torch.save of one, plain or under `state_dict`, `model`, ...

    Raises: UserError where the file is missing, damaged, needs code to open, or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if starts_as_a_page(path):
        raise UserError(
            f"{path} is a web page, not weights: the download asked for a confirmation; fetch it by hand"
        )
    stored = read_pickle(
        path, what="a weights file", remedy="save the state_dict alone, by torch.save or as .safetensors"
    )
    inner = (
        next((stored[key] for key in HOLDERS if isinstance(stored.get(key), dict)), stored)
        if isinstance(stored, dict)
        else {}
    )
    state = {key: value for key, value in inner.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no state dict, plain or under {', '.join(HOLDERS)}")
    for key, value in state.items():
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(
                f"{path}: {short_repr(key)} is no plain tensor ({value.layout}, {value.dtype} on "
                f"{value.device})"
            )
    return state


def put_published_state(model: nn.Module, state: dict[str, Tensor], origin: Path) -> nn.Module:
    """`model` with all of `state`, behind a `Normalize` if only the state has one (as this library saves it).

    Wrappers' prefixes go from the front of a key, and only where the model has no such key. Batch norm's
    counter of batches, which predicts nothing, may be missing or left over.

    Raises: UserError naming keys that are missing or unexpected, or the first shape or kind of number that
    differs.
    """
    mean = next((value for key, value in state.items() if OURS.fullmatch(key)), None)
    if mean is not None and "normalize.mean" not in model.state_dict():
        zeros = (0.0,) * mean.numel()
        model = nn.Sequential(OrderedDict(normalize=Normalize(zeros, (1.0,) * mean.numel()), net=model))
    wanted = model.state_dict().keys()
    state = in_our_names(state, wanted)
    renamed = {without_wrappers(key, wanted): value for key, value in state.items()}
    if len(renamed) < len(state):
        raise UserError(
            f"{origin} holds two networks: keys that differ in nothing but module., model. or _orig_mod."
        )
    check_kinds(model.state_dict(), renamed, origin)
    try:
        missing, unexpected = (
            [key for key in keys if not key.endswith("num_batches_tracked")]
            for keys in model.load_state_dict(renamed, strict=False)
        )
    except (
        Exception
    ) as error:  # shapes that differ are a RuntimeError, tensors of another kind fail in their own way
        reason = "".join(str(error).splitlines()[1:2]) or f" {first_line(error)}"
        raise UserError(f"{origin} is of another architecture:{reason}".replace("\t", " ")) from None
    if missing or unexpected:
        raise UserError(
            f"{origin} is of another architecture: {counted_keys('missing', missing)}, "
            f"{counted_keys('unexpected', unexpected)}"
        )
    return model


def check_kinds(wanted: dict[str, Tensor], state: dict[str, Tensor], origin: Path | str) -> None:
    """Raise UserError for integer, boolean or complex weights, which torch would convert silently."""
    for key, value in state.items():
        own = wanted.get(key)
        if isinstance(own, Tensor) and own.is_floating_point() and not value.is_floating_point():
            raise UserError(
                f"{origin}: {key} is {value.dtype}, the network's is {own.dtype}: it was quantised or "
                "belongs to another network; save the weights as floating point"
            )


def without_wrappers(key: str, wanted: Collection[str]) -> str:
    """`key` without the wrappers' prefixes, if that is a key of the network; else as it is."""
    bare = key
    while bare not in wanted and (match := WRAPPER.match(bare)):
        bare = bare[match.end() :]
    return bare if bare in wanted else key


def counted_keys(what: str, keys: list[str]) -> str:
    """The number of `keys` and the first of them, in words."""
    more = f", and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} keys {what}" + (f" ({', '.join(keys[:SHOWN])}{more})" if keys else "")
