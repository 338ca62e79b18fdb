"""Weights files as targets of an evaluation or an export."""

import logging
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fastdynat.config import ModelConfig
from fastdynat.config.eval_config import EvalConfig
from fastdynat.data import DatasetInfo
from fastdynat.errors import UserError
from fastdynat.runs import Sidecar, read_sidecar
from fastdynat.training.networks import pixel_statistics

logger = logging.getLogger(__name__)

SAFE = ".safetensors"
SUFFIXES = (SAFE, ".pt", ".pth", ".bin", ".ckpt")


def is_weights_file(name: str | Path) -> bool:
    """True if `name` is a weights file: by its name, or an existing file."""
    path = Path(name)
    return path.suffix in SUFFIXES if not path.exists() else path.is_file()


def is_described(file: Path) -> bool:
    """True if fastdynat wrote `file`, with a .json that describes its network."""
    return file.suffix == SAFE and file.with_suffix(".json").exists()


def check_weights_file(file: Path, config: EvalConfig) -> None:
    """Raise UserError for a missing file, or one whose network or data set is not known."""
    if not file.exists():
        raise UserError(f"no weights at {file}")
    described = is_described(file)
    if config.model is None and not described:
        raise UserError(
            f"{file} does not name its network; give --model, for example --model wrn-28-10-silu-same"
        )
    if config.data == "auto" and not (described and config.model is None):
        raise UserError(f"{file} comes without data: give --data, for example --data cifar10")


def described_weights(file: Path, config: EvalConfig) -> Sidecar | None:
    """The sidecar of `file`, unless --model says another network."""
    return read_sidecar(file)[0] if config.model is None and is_described(file) else None


def weights_of_file(
    file: Path, model: str, normalize: Literal["none", "dataset", "released"], info: DatasetInfo
) -> tuple[nn.Module, str]:
    """The network `model` with the weights in `file`, and a digest of both; logs the normalisation."""
    from fastdynat.models.foreign import load_weights_file

    mean, std = pixel_statistics(ModelConfig(normalize=normalize), info)
    shapes: dict[str, Any] = {"num_classes": info.num_classes, "image_shape": info.image_shape}
    found = load_weights_file(file, model, mean=mean, std=std, **shapes)
    logger.info("%s: %s", file, found.note)
    return found.model, found.sha256
