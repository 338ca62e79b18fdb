"""Weights that the model of a run starts from (--init-from): found, checked and put in."""

import importlib
import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.config import ModelConfig
from fastdynat.data import DatasetInfo
from fastdynat.documents import open_file
from fastdynat.errors import UserError
from fastdynat.execution.process_state import process_state_kept
from fastdynat.models import split_style
from fastdynat.models.external import torchvision_names
from fastdynat.models.initial_state import put_initial_state
from fastdynat.models.state_digest import state_digest
from fastdynat.models.state_files import read_state_dict
from fastdynat.models.zoo import downloaded, timm_pretrained, torchvision_pretrained
from fastdynat.runs import Sidecar, guide_weights, load_state, read_sidecar
from fastdynat.runs.manifest import sha256
from fastdynat.training.frozen_parts import FrozenParts
from fastdynat.user_code import HUB, short_name, without_place

logger = logging.getLogger(__name__)

LIBRARIES = ("timm", "torchvision")  # whose published weights --init-from can name
PIXEL_KEY = "normalize.mean"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights found at --init-from.

    Attributes:
        state: tensors by their names in the source.
        origin: the source in words.
        sha256: of the file, or of all tensors.
        about: the sidecar, where this library wrote the weights.
        pixels: mean and standard deviation that they expect, where the source says so beside `state`.
    """

    state: dict[str, Tensor]
    origin: str
    sha256: str
    about: Sidecar | None = None
    pixels: tuple[Tensor, Tensor] | None = None


def is_place(source: str) -> bool:
    """True if `source` (--init-from) is a path: no library, and no repository on the hub."""
    return source not in LIBRARIES and not source.startswith(HUB)


def resolved_init(model: ModelConfig, name: str) -> tuple[str | None, str]:
    """--init-from by a name that means the same from another directory, and the model: `name`, or that of
    the weights for ``model: auto``.

    Raises:
        UserError: timm or torchvision for a network that is not theirs, RobustBench, or auto for weights that
            say no network.
    """
    source = model.init_from
    if source is None:
        return None, name
    if source.startswith("robustbench:"):
        raise UserError(
            f"--init-from {source}: give the file and its network. fastdynat eval {source} --data cifar10 "
            "--attacks clean downloads it below ./models; then --init-from that file, with --model"
        )
    if source in LIBRARIES:
        theirs = name.lower().startswith(f"{source}:") or (
            source == "torchvision" and name.lower() in torchvision_names()
        )
        if not theirs:
            raise UserError(
                f"--init-from {source}: --model {short_name(name)} is not one of its networks; "
                f"name one with --model {source}:NAME, or give the weights as a file"
            )
        return source, name
    if not is_place(source):
        return source, name
    path = Path(source).expanduser().absolute()
    if model.model == "auto":
        weights = _weights_file(path)
        if not weights.with_suffix(".json").exists():
            raise UserError(f"--init-from {source}: the file does not name its network; give --model")
        name = read_sidecar(weights)[0].architecture
    return str(path), name


def put_initial_weights(model: nn.Module, config: ModelConfig, info: DatasetInfo, frozen: FrozenParts) -> str:
    """Put the weights at --init-from into `model`, log what was done, and return their sha256.

    frozen: parameters that are not trained; a reinitialised last layer must not be among them.

    Raises:
        UserError: the source is missing, damaged, another than at the run's start, or of another network.
    """
    with process_state_kept():  # building a published network draws random numbers
        found = find_initial(config, info)
    if config.init_sha256 not in (None, found.sha256):
        raise UserError(
            f"{found.origin} has sha256 {found.sha256}, not {config.init_sha256}: the weights have changed; "
            "restore the original ones, or start a new run without --init-sha256"
        )
    _check_normalize(config, found)
    other = found.about is not None and found.about.class_names != info.class_names
    placed = put_initial_state(
        model,
        found.state,
        found.origin,
        num_classes=info.num_classes,
        other_classes=other,
        pixels=found.pixels,
    )
    if found.about is not None:
        _check_architecture(found.about, config, found.origin)
    frozen.refuse(placed.head, "was reinitialised for other classes and would stay random; leave it out")
    head = ""
    if placed.head:
        layer = placed.head[0].rpartition(".")[0]
        before = f"{placed.classes} to " if placed.classes else "other "
        head = f"; last layer {layer} reinitialised ({before}{info.num_classes} classes)"
    logger.info("model initialised from %s, sha256 %s...%s", found.origin, found.sha256[:12], head)
    return found.sha256


def find_initial(config: ModelConfig, info: DatasetInfo) -> InitialWeights:
    """The weights at --init-from, read or downloaded. Raises UserError where they cannot be had."""
    source = config.init_from
    assert source is not None
    if source in LIBRARIES:
        return _published(source, config.model, info)
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB), info)
    path = _weights_file(Path(source))
    if path.with_suffix(".json").exists() and path.suffix == ".safetensors":
        state, about = load_state(path)
        role = f"{path} (best checkpoint, epoch {about.epoch})" if path != Path(source) else str(path)
        return InitialWeights(
            state=state, origin=f"{role}: {_described(about)}", sha256=read_sidecar(path)[1], about=about
        )
    return InitialWeights(state=read_state_dict(path), origin=str(path), sha256=sha256(path))


def _weights_file(path: Path) -> Path:
    """The weights file that `path` is, or that the run directory `path` has."""
    if not path.exists():
        raise UserError(f"--init-from: {path} does not exist; give a weights file or a run directory")
    return guide_weights(path) if path.is_dir() else path


def _described(about: Sidecar) -> str:
    return f"{short_name(about.architecture)} trained by {about.method} on {about.dataset}"


def _published(source: str, model: str, info: DatasetInfo) -> InitialWeights:
    """The published weights of the library `source` for `model`, at the data's image size."""
    if info.image_shape[0] != 3:
        raise UserError(
            f"--init-from {source}: published weights take RGB images, {info.name} has "
            f"{info.image_shape[0]} channel(s); leave it out"
        )
    name = model.partition(":")[2] or model
    if source == "timm":
        network, note = timm_pretrained(name, image_size=info.image_shape[1:])
    else:
        network, note = torchvision_pretrained(name)
    state = network.state_dict()
    return InitialWeights(state=state, origin=f"{source}:{name}, {note}", sha256=state_digest(state))


def _from_hub(repository: str, info: DatasetInfo) -> InitialWeights:
    """The weights of USER/NAME[@REVISION] on the hub, and their mean and std where config.json says them."""
    name = f"{HUB}{repository}"
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"--init-from {name} needs huggingface_hub, which is not installed: pip install huggingface_hub"
        )
    hub: Any = importlib.import_module("huggingface_hub")
    missing = importlib.import_module("huggingface_hub.errors").EntryNotFoundError
    place, _, revision = repository.partition("@")

    def fetch(file: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(place, file, revision=revision or None))
        except missing as error:
            if isinstance(error, FileNotFoundError):  # not in the cache, and no network
                raise
            return None

    def load() -> tuple[Path | None, Path | None]:
        return next(filter(None, map(fetch, HUB_FILES)), None), fetch("config.json")

    weights, about = downloaded(name, load, remedy="or download its file and give that to --init-from")
    if weights is None:
        raise UserError(f"--init-from {name}: the repository has neither {' nor '.join(HUB_FILES)}")
    pixels = None if about is None else _hub_pixels(about, info)
    return InitialWeights(state=read_state_dict(weights), origin=name, sha256=sha256(weights), pixels=pixels)


def _hub_pixels(file: Path, info: DatasetInfo) -> tuple[Tensor, Tensor] | None:
    """The mean and standard deviation in the config.json of a timm model; None where it has none."""
    with open_file(file) as opened:
        try:
            stored = json.loads(opened.read())["pretrained_cfg"]
            mean, std = (torch.tensor([float(x) for x in stored[key]]) for key in ("mean", "std"))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
    channels = info.image_shape[0]
    return (mean, std) if len(mean) == len(std) == channels and bool((std > 0).all()) else None


def _check_architecture(about: Sidecar, config: ModelConfig, origin: str) -> None:
    """Refuse weights of another network: its shapes may fit, with another activation or padding."""
    theirs, ours = about.architecture, config.model
    if _plain(theirs) != _plain(ours):
        raise UserError(f"--model {short_name(ours)}: {origin} holds another network; leave --model out")


def _plain(name: str) -> str:
    named = without_place(name)
    return named if named != name or ":" in name else f"{split_style(name)}"


def _check_normalize(config: ModelConfig, found: InitialWeights) -> None:
    """Refuse a normalisation of one's own before weights that bring theirs."""
    brings = found.pixels is not None or any(key.endswith(PIXEL_KEY) for key in found.state)
    if brings and config.normalize != "none":
        raise UserError(
            f"--normalize {config.normalize}: {found.origin} brings its own mean and std; leave it out"
        )
