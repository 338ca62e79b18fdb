"""Measurements as files, so that nothing is measured twice and what was interrupted goes on."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdynat.documents import DocumentError, convert, read_json
from fastdynat.documents.numbers import Radius
from fastdynat.evaluation.outcome import Measurement, pack_bits
from fastdynat.runs import WriteError
from fastdynat.runs.atomic_files import make_folder, write_text

logger = logging.getLogger(__name__)

FOLDER, FORMAT = "evaluations", "fastdynat-measurement/1"


@dataclass(frozen=True, kw_only=True)
class Key:
    """Everything that a measurement's accuracy depends on but the machine.

    Attributes:
        weights: sha256 of the network's weights.
        images: digest of all test images and labels, also where only a shard of them is measured.
        search: the attack's numbers and class; None for clean accuracy.
        batch_size: as asked for, of attacks whose result depends on it; a halved one is in the measurement.
        draws: `image_draws.VERSION`; None for the authors' AutoAttack, which makes its own.
        source: sha256 of the weights that a transfer attack is made on.
        standing: digest of which images are attacked (`standing_digest`); None is all.
        shard: which share of the images, "I/N".
        version: `runs.code_version`.
    """

    weights: str
    images: str
    attack: str
    search: dict[str, Any] | None
    seed: int
    amp: str
    batch_size: int | None = None
    draws: int | None = None
    source: str | None = None
    standing: str | None = None
    shard: str | None = None
    version: str

    def text(self) -> str:
        """As JSON; fields that may be None are left out where they are."""
        left_out = ("batch_size", "draws", "source", "standing", "shard")
        parts = {k: v for k, v in asdict(self).items() if v is not None or k not in left_out}
        return json.dumps(parts, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class _Key:
    """The fields of a stored key that readers require."""

    weights: str
    attack: str
    amp: str
    search: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _About:
    """The optional fields that describe a measurement.

    Attributes:
        norm, eps: the threat model of the evaluation.
        attack_norm, attack_eps: norm and radius that the accuracy is about (`record.judged_radius`).
    """

    norm: str = ""
    eps: Radius = 0.0
    dataset: str = ""
    attack_norm: str = ""
    attack_eps: Radius | None = None


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A file of this format."""

    key: dict[str, Any]
    about: dict[str, Any]
    measurement: Measurement


def search_numbers(search: Any) -> dict[str, Any] | None:
    """The values of an attack's dataclass, with the name of its class (`STORED_AS`, if renamed)."""
    if search is None:
        return None
    assert is_dataclass(search)
    name = vars(type(search)).get("STORED_AS", type(search).__name__)
    return {"class": name, **asdict(search)}  # type: ignore[arg-type]


def standing_digest(standing: Tensor | None) -> str | None:
    """The sha256 of which images are attacked, (N,) bool."""
    return None if standing is None else hashlib.sha256(pack_bits(standing).encode()).hexdigest()


class Store(MutableMapping[str, dict[str, Any]]):
    """One file per measurement in `folder`, by `Key.text`. A damaged or foreign file is as good as none.

    about: what a reader of the files wants to know beside the key; stored with each measurement.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self._refused = False

    def path(self, key: str, suffix: str = ".json") -> Path:
        """The file of the measurement; with another suffix, a file beside it."""
        parts = json.loads(key)
        shard = f".{parts['shard'].replace('/', 'of')}" if "shard" in parts else ""
        name = f"{_slug(parts['attack'])}{shard}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return self.folder / f"{name}{suffix}"

    def shard_counts(self, attack: str) -> list[int]:
        """Into how many shards measurements of `attack` were divided whose first shard is there."""
        pattern = re.compile(re.escape(_slug(attack)) + r"\.1of(\d+)-\w+\.json")
        return sorted(
            {int(match[1]) for path in _files(self.folder) if (match := pattern.fullmatch(path.name))}
        )

    def __getitem__(self, key: str) -> dict[str, Any]:
        path = self.path(key)
        if not path.exists():
            raise KeyError(key)
        try:
            stored, _, measurement = read_file(path)
            if json.dumps(stored, sort_keys=True) != key:
                raise DocumentError(f"{path} holds another measurement")
        except DocumentError as error:
            logger.warning("%s; its attack is run again", error)
            raise KeyError(key) from None
        return asdict(measurement)

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        self.put(key, value, {})

    def put(self, key: str, value: dict[str, Any], about: dict[str, Any]) -> None:
        """Store a measurement; `about` is said of this one beside what is said of all."""
        about = self.about | about
        document = {"format": FORMAT, "key": json.loads(key), "about": about, "measurement": value}
        try:
            make_folder(self.folder)
            write_text(self.path(key), json.dumps(document, indent=1) + "\n")
        except WriteError as error:
            if not self._refused:  # the others will not be kept either
                logger.warning("results are not kept: %s; use --cache DIR", error)
            self._refused = True

    def __delitem__(self, key: str) -> None:
        try:
            self.path(key).unlink()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return (json.dumps(key, sort_keys=True) for key, _, _ in read_folder(self.folder))

    def __len__(self) -> int:
        return len(read_folder(self.folder))


def read_measurements(run: Path | str) -> list[tuple[dict[str, Any], dict[str, Any], Measurement]]:
    """The stored measurements of the run directory `run`: key, about and numbers, in the order of their
    files' names.

    Damaged and foreign files are left out. Keys with "standing" are stages of a column, those with "shard"
    parts of one.
    """
    run = Path(run)
    return read_folder(run / FOLDER)


def read_folder(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any], Measurement]]:
    """`read_measurements` of any folder."""
    found = []
    for path in _files(folder):
        try:
            found.append(read_file(path))
        except DocumentError:
            continue
    return found


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any], Measurement]:
    """One stored measurement: its key, what it is about, and its numbers.

    Raises:
        DocumentError: it cannot be read, is not one of this format, is damaged, or was edited by hand.
    """
    stored = read_json(path, _Stored, what="a measurement of fastdynat", format=FORMAT)
    for kind, values in ((_Key, stored.key), (_About, stored.about)):
        convert(values, kind, origin=str(path))
    return stored.key, stored.about, stored.measurement.check(str(path))


def as_measurement(values: dict[str, Any]) -> Measurement:
    """Back from the values that JSON holds."""
    return Measurement(**{**values, "ci": tuple(values["ci"])})


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def _slug(attack: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "_", attack)
