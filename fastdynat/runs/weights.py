"""Weights as safetensors with a JSON sidecar: open without running code, checked before use."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdynat import __version__
from fastdynat.data import DatasetInfo
from fastdynat.errors import UserError
from fastdynat.models import build_model
from fastdynat.runs.files import sync_file, write_text
from fastdynat.runs.manifest import check_manifest, sha256
from fastdynat.runs.rundir import BEST, STATE

FORMAT = "fastdynat-weights/1"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What `NAME.json` says about `NAME.safetensors`. eps in [0, 1] pixel units."""

    architecture: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    dataset: str
    class_names: tuple[str, ...]
    role: str  # "model" or "guide"
    method: str
    norm: str
    eps: float
    eval_eps: float
    epoch: int  # epochs completed
    val_clean_acc: float | None
    val_pgd10_acc: float | None


_NUMBER, _NONE = (int, float), type(None)
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("architecture", "dataset", "role", "method", "norm"), str),
    **dict.fromkeys(("image_shape", "class_names"), list),
    **dict.fromkeys(("mean", "std"), (list, _NONE)),
    **dict.fromkeys(("num_classes", "epoch"), int),
    **dict.fromkeys(("eps", "eval_eps"), _NUMBER),
    **dict.fromkeys(("val_clean_acc", "val_pgd10_acc"), (*_NUMBER, _NONE)),
}


def save_weights(path: Path, state: dict[str, Tensor], sidecar: Sidecar) -> None:
    """Write `path` (.safetensors) and its sidecar (.json). `state` is a state dict; tensors may be on any device."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    sync_file(path)
    about = {
        "format": FORMAT,
        "fastdynat": __version__,
        "weights": path.name,
        "sha256": sha256(path),
        **asdict(sidecar),
    }
    write_text(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")


def read_sidecar(path: Path) -> tuple[Sidecar, str]:
    """The sidecar of the weights at `path` and the sha256 that it promises.

    Raises:
        UserError: it is missing, not JSON, of another format, or lacks a field.
    """
    sidecar = path.with_suffix(".json")
    try:
        about: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {sidecar}: {error.strerror}; weights and their .json belong together") from None
    except ValueError:  # not JSON, or not UTF-8
        raise UserError(f"{sidecar} is not JSON: it is truncated or not a fastdynat checkpoint") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{sidecar} is not a fastdynat checkpoint (its format is not {FORMAT})")
    try:
        values = {f.name: about[f.name] for f in fields(Sidecar)}
        promised = str(about["sha256"])
    except KeyError as error:
        raise UserError(f"{sidecar} lacks {error}: it was damaged or edited") from None
    for key, kinds in _KINDS.items():
        if not isinstance(values[key], kinds) or isinstance(values[key], bool):
            raise UserError(f"{sidecar}: {key} cannot be {values[key]!r}: it was damaged or edited")
    for key in ("image_shape", "mean", "std", "class_names"):
        values[key] = None if values[key] is None else tuple(values[key])
    return Sidecar(**values), promised


def load_state(path: Path) -> tuple[dict[str, Tensor], Sidecar]:
    """The tensors at `path` (on the CPU) and their sidecar, once the sha256 is right.

    Raises:
        UserError: missing, truncated, not safetensors, or not the bytes the sidecar was written for.
    """
    sidecar, promised = read_sidecar(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    found = sha256(path)
    if found != promised:
        raise UserError(f"{path} is damaged or was changed: sha256 {found[:12]}..., its .json says {promised[:12]}...")
    try:
        return load_file(path), sidecar
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None


def build_from_sidecar(sidecar: Sidecar) -> nn.Module:
    """The untrained network that `sidecar` describes."""
    return build_model(
        sidecar.architecture,
        num_classes=sidecar.num_classes,
        image_shape=sidecar.image_shape,
        mean=sidecar.mean,
        std=sidecar.std,
    )


def put_state(network: nn.Module, state: dict[str, Tensor], origin: Path, architecture: str) -> None:
    """Load `state` into `network` strictly.

    Raises:
        UserError: names or shapes differ, so the file belongs to another architecture.
    """
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{origin} is not a {architecture}: {first}") from None


def foreign(sidecar: Sidecar, info: DatasetInfo) -> str:
    """In words, what data a network was trained on, if its classes or images are not those of `info`; else ""."""
    theirs, ours = (len(sidecar.class_names), sidecar.image_shape), (len(info.class_names), info.image_shape)
    if theirs != ours:
        return (
            f"{sidecar.dataset} ({theirs[0]} classes, images {theirs[1]}), but {info.name} has {ours[0]} classes and "
            f"images {ours[1]}"
        )
    for number, (a, b) in enumerate(zip(sidecar.class_names, info.class_names, strict=True)):
        if a != b:
            return f"{sidecar.dataset}, whose class {number} is {a!r}, but in {info.name} it is {b!r}"
    return ""


def guide_weights(path: Path) -> Path:
    """The weights that a user means by `path`: a .safetensors file, or of a run directory its best checkpoint's model.

    Raises:
        UserError: neither is there.
    """
    if path.suffix == ".safetensors":
        return path
    weights = path / BEST / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{path} is neither a .safetensors file nor a run directory with a best checkpoint")
    return weights.resolve()


def load_network(path: Path) -> tuple[nn.Module, Sidecar]:
    """The trained network at `path` (.safetensors), on the CPU in eval mode, and its sidecar.

    Raises:
        UserError: see `load_state` and `put_state`.
    """
    state, sidecar = load_state(path)
    network = build_from_sidecar(sidecar)
    put_state(network, state, path, sidecar.architecture)
    return network.eval(), sidecar


def load_checkpoint(run: Path, checkpoint: str) -> tuple[nn.Module, Sidecar, str]:
    """The network of a checkpoint of `run`, which is there, its sidecar and the sha256 of its weights.

    Raises:
        UserError: damaged files; see `check_manifest` and `load_network`.
    """
    # The link is followed once: the run may still be training, and move it.
    files = (run / checkpoint).resolve()
    check_manifest(files, optional=(STATE,))
    weights = files / "model.safetensors"
    network, sidecar = load_network(weights)
    return network, sidecar, read_sidecar(weights)[1]
