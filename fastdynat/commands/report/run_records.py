"""The record of a run that a report reads: configuration, metrics, checkpoints and measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from fastdynat.commands.evaluate.measurement_store import read_measurements
from fastdynat.config import read_config_file
from fastdynat.errors import UserError, one_line
from fastdynat.evaluation import Measurement
from fastdynat.runs import (
    BEST,
    CONFIG,
    LAST,
    Sidecar,
    code_version,
    find_checkpoint,
    read_sidecar,
    require_run,
)
from fastdynat.runs.layout import real
from fastdynat.runs.metrics_rows import read_rows

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Measured:
    """A measurement with its threat model; `eps` is None where the attack was not limited to the run's ball.

    images: digest of the images and their labels.
    current: whether the present version of the code measured it.
    source: sha256 of the weights that a transfer attack was made on; None for other attacks.
    """

    norm: str
    eps: float | None
    dataset: str
    result: Measurement
    images: str
    current: bool
    source: str | None = None

    @property
    def test_images(self) -> "TestImages":
        """The images that it was measured on."""
        return TestImages(self.dataset, self.images, self.result.images)


@dataclass(frozen=True)
class TestImages:
    """Images that accuracies are of: their dataset, their digest and how many they are."""

    dataset: str
    digest: str
    count: int


@dataclass(frozen=True)
class ReportedCheckpoint:
    """A checkpoint: `names` are best, last or both; `weights` is their sha256."""

    names: tuple[str, ...]
    path: Path
    weights: str
    sidecar: Sidecar
    measured: list[Measured]


@dataclass(frozen=True)
class Record:
    """A run; `stale` counts measurements of checkpoints that it no longer has.

    name: the folder's, escaped where fonts have nothing for it; with the folders above it as far as other
        runs of the report have the same. No two runs of a report share a name.
    """

    name: str
    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    checkpoints: list[ReportedCheckpoint]
    stale: int

    def checkpoint(self, wanted: str) -> ReportedCheckpoint | None:
        """The best or the last checkpoint, as `wanted`; the one that is there where there is only one."""
        return next(
            (c for c in self.checkpoints if wanted in c.names),
            self.checkpoints[0] if self.checkpoints else None,
        )


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Read the runs at `paths`, each one once.

    Raises:
        UserError: a path that is no run, or a file of it that is damaged.
    """
    for path in paths:
        require_run(path)
    unique = {real(path): path for path in paths}
    resolved = list(unique)
    return [_read(path, _short_name(resolved, at)) for at, path in enumerate(unique.values())]


def _short_name(paths: Sequence[Path], at: int) -> str:
    """The last folders of ``paths[at]``, escaped: as few as no other one of the different `paths` ends in.

    The whole path with its number where escaping makes it that of another one.
    """
    path, others = paths[at], [*paths[:at], *paths[at + 1 :]]
    for count in range(1, len(path.parts) + 1):
        name = _ending(path, count)
        if all(name != _ending(other, count) for other in others):
            return name
    return f"{one_line(str(path))} ({at + 1})"


def _ending(path: Path, parts: int) -> str:
    return one_line(str(Path(*path.parts[-parts:])))


def _read(path: Path, name: str) -> Record:
    metrics = path / "metrics.jsonl"
    measured = _in_full(path)
    checkpoints = []
    for folder, links, sidecar, weights in _sidecars(path):
        own = [m for of, m in measured if of == weights]
        checkpoints.append(ReportedCheckpoint(tuple(links), folder / WEIGHTS, weights, sidecar, own))
    stale = sum(of not in {c.weights for c in checkpoints} for of, _ in measured)
    return Record(
        name,
        path,
        read_config_file(path / CONFIG),
        read_rows(metrics) if metrics.exists() else [],
        checkpoints,
        stale,
    )


def _sidecars(run: Path) -> list[tuple[Path, list[str], Sidecar, str]]:
    """The folders of the run's checkpoints with names (best, last), sidecars and sha256 of the weights."""
    folders = _folders(run)
    while True:
        try:
            return [(folder, links, *read_sidecar(folder / WEIGHTS)) for folder, links in folders.items()]
        except UserError:
            # The run may still be training, and these no longer its checkpoints.
            if (newer := _folders(run)) == folders:
                raise
            folders = newer


def _folders(run: Path) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for link in (BEST, LAST):
        if (folder := find_checkpoint(run, link)) is not None:
            found.setdefault(real(folder), []).append(link)
    return found


def _in_full(run: Path) -> list[tuple[str, Measured]]:
    """The run's measurements with the sha256 of their weights, without stages and shards."""
    found = []
    for key, about, result in read_measurements(run):
        if "standing" in key or "shard" in key or not {"norm", "eps", "dataset"} <= about.keys():
            continue
        norm, eps = _judged_radius(key["search"] or {}, about, result)
        current = key.get("version") == code_version()
        measured = Measured(
            norm, eps, about["dataset"], result, str(key.get("images")), current, key.get("source")
        )
        found.append((key["weights"], measured))
    return found


def _judged_radius(
    search: dict[str, Any], about: dict[str, Any], result: Measurement
) -> tuple[str, float | None]:
    """Norm and radius that an accuracy is about; older files do not say so of the attack."""
    if "attack_norm" in about:
        return about["attack_norm"], about.get("attack_eps")
    if search.get("class") == "UserAttack":
        # `eps` is the threat model's; the attack's own norm is stored where it is a field of it.
        attack = search.get("attack")
        norm = str(attack.get("norm", "")) if isinstance(attack, dict) else ""
        return norm, about["eps"] if norm == about["norm"] else None
    if result.distances is not None and not isfinite(search.get("eps") or inf):  # nothing about a ball
        return search.get("norm", ""), None
    return about["norm"], about["eps"]
