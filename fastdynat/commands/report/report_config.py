"""The configuration of `fastdynat report`."""

import importlib.util
from dataclasses import dataclass

from fastdynat.config.value_ranges import check_values
from fastdynat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The contents of the page and its folder."""

    out: str = "report"
    """Folder of index.html, of the PNG files and of findings.json, from which a second call only draws."""
    attacks: bool = True
    """--no-attacks draws only what is on disk."""
    num_images: int = 500
    """Number of test images, from the first, on which networks are measured."""
    checkpoint: str = "best"
    """Checkpoint that is attacked: best, or last; the other one where a run has only that."""
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
