"""The state of a comparison beside its runs, so that the same command continues where it stopped."""

import json
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdynat.documents import convert, read_json
from fastdynat.documents.numbers import AboveZero, Count, Finite, Positive
from fastdynat.errors import UserError
from fastdynat.evaluation import Measurement
from fastdynat.runs import looks_like_run
from fastdynat.runs.atomic_files import write_text

FILE, FORMAT = "ledger.json", "fastdynat-compare-ledger/1"


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """`probe.probe`."""

    epochs: Positive
    start_seconds: Finite
    first_epoch_seconds: Finite
    later_epoch_seconds: Finite
    expected_seconds: Finite


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The outcome of a run."""

    ended: Literal["finished", "diverged"] = "finished"  # where it is left out, the run has not ended
    reason: str = ""
    peak_memory_bytes: Count | None


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The file as a whole."""

    budget_seconds: AboveZero | None
    probes: dict[str, dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]


class Ledger(MutableMapping[str, dict[str, Any]]):
    """The file OUT/ledger.json, rewritten at each change. As a mapping: the measurements of
    `evaluation.measure_runs`.

    Attributes:
        probes: seconds per epoch and number of epochs by method, where there is a budget.
        runs: by run name, how it ended ("finished" or "diverged"), the reason if that was before its last
            epoch, and its peak memory.
    """

    def __init__(self, folder: Path, budget: float | None) -> None:
        """Read what is in `folder`, if anything; nothing is written before `save`.

        Raises:
            UserError: the folder holds something else, a damaged ledger, or a comparison with another budget.
        """
        self.path = folder / FILE
        self.budget = budget
        self.probes: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self._known: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._read(folder)
        elif folder.exists() and (not folder.is_dir() or any(p.name != ".lock" for p in folder.iterdir())):
            raise UserError(f"{folder} is not empty and holds no comparison; choose another --out")

    def _read(self, folder: Path) -> None:
        stored = read_json(
            self.path, _Stored, what="a comparison's ledger", format=FORMAT, remedy="choose a new --out"
        )
        budget, self.probes, self.runs, self._known = (
            stored.budget_seconds,
            stored.probes,
            stored.runs,
            stored.evaluations,
        )
        origin, why = str(self.path), "it was damaged or edited; choose a new --out"
        convert(self.probes, dict[str, _Probe], origin=origin, why=why)
        convert(self.runs, dict[str, _Run], origin=origin, why=why)
        for found in convert(self._known, dict[str, Measurement], origin=origin, why=why).values():
            found.check(origin)
        if budget != self.budget:
            raise UserError(
                f"the comparison in {folder} was begun with budget_seconds {budget}, not {self.budget}; "
                "keep it, or choose a new --out"
            )

    def move(self, folder: Path) -> None:
        """Write into the new, empty `folder` from now on."""
        self.path = folder / FILE

    def save(self) -> None:
        """Write everything, in one step."""
        values = {"format": FORMAT, "budget_seconds": self.budget, "probes": self.probes, "runs": self.runs}
        write_text(self.path, json.dumps(values | {"evaluations": self._known}, indent=1) + "\n")

    def has_ended(self, run: Path) -> bool:
        """True where the run in the folder `run` needs no more training."""
        return "ended" in self.runs.get(run.name, {}) and looks_like_run(run)

    def epochs(self, method: str) -> int | None:
        """The number of epochs of `method` that fit into the budget; None without a budget or measurement."""
        return self.probes[method]["epochs"] if method in self.probes else None

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._known[key]

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        self._known[key] = value
        self.save()

    def __delitem__(self, key: str) -> None:
        del self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
