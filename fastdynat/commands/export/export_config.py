"""The configuration of `fastdynat export`."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The fields of a `model_info` entry that only the authors know."""

    link: str | None = None
    """Address of the paper."""
    name: str | None = None
    """Title of the paper."""
    authors: str | None = None
    """Authors, separated by commas."""
    venue: str | None = None
    """Venue and year, such as ICML 2020; Unpublished otherwise."""
    additional_data: bool = False
    """Training used images beyond the dataset's own, directly or through a guide; always on for a run with
    --extra-data."""
    footnote: str | None = None
    """Footnote on the leaderboard; the number of measured images follows it."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write one checkpoint for other tools; it includes normalisation and takes images in [0, 1]."""

    out: str
    """File to write: NAME.pt for robustbench (NAME.json and NAME.py are written beside it), NAME.pt2 for
    torch, NAME.onnx for onnx."""
    format: Literal["robustbench", "torch", "onnx"] = "robustbench"
    """robustbench: weights, source and model_info; torch: a torch.export program; onnx needs the extra
    `export`."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to export."""
    overwrite: bool = False
    """Replace existing files."""
    dataset: str = "auto"
    """RobustBench's name of the data set (cifar10, cifar100, imagenet); auto is the run's."""
    model: str | None = None
    """Network of a weights file that fastdynat did not write, given in place of RUN: any name that train
    --model takes."""
    normalize: Literal["none", "dataset", "released"] = "none"
    """Mean/std layer in front of that network; a file that has its own mean and std keeps them."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Threat model for which that network was trained."""
    eps: float | str = "8/255"
    """Radius of that threat model: 8/255, 0.031, or 8 (read as 8/255)."""
    paper: Paper = field(default_factory=Paper)
