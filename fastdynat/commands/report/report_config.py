"""The configuration of `fastdynat report`."""

import importlib.util
from dataclasses import dataclass

from fastdynat.config.value_ranges import check_values
from fastdynat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The contents of the page and its folder."""

    out: str = "report"
    """Folder for index.html, the PNG files and findings.json, from which a second call redraws the page."""
    attacks: bool = True
    """--no-attacks runs no attack and draws only stored results."""
    num_images: int = 500
    """Number of test images, counted from the first, to measure on."""
    checkpoint: str = "best"
    """Checkpoint to attack: best or last; a run that has only one of them uses that one."""
    batch_size: int = 250
    """Images per batch."""
    data_dir: str = "auto"
    """Folder of the dataset; auto is the run's."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is a GPU if there is one."""
    seed: int = 1
    """Seed of the random starts."""


def check_report(config: ReportConfig) -> None:
    """Raise UserError where no report can be written, before any work is done."""
    check_values(config)
    if config.checkpoint not in ("best", "last"):
        raise UserError(f"--checkpoint must be best or last, got {config.checkpoint!r}")
    for name in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"fastdynat report needs {name}: pip install 'fastdynat[plots]'")
