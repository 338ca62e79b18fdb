"""The result of a record: one JSON file, written after each lap, from which a stopped race continues."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastdynat.commands.speedrun.race_rules import broken_rules
from fastdynat.commands.speedrun.record_definition import RecordDefinition
from fastdynat.documents import read_json, through_json
from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import write_text

FORMAT = "fastdynat-speedrun/1"
DIRTY = "-dirty"  # at the end of a commit that the checkout differed from
MACHINE = ("cpu", "threads", "torch", "gpus", "processor")  # what a time depends on
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything besides its definition that the laps of a record must share.

    Attributes:
        commit: of the checkout; see `source_commit`.
        code: digest of the package, its extension and the record's own files.
        data: name of the images, with the format of their files.
        test: sha256 of the test images.
        raced: names of the records that take turns.
        machine: the keys `MACHINE` of a lap's environment.
    """

    commit: str
    code: str
    data: str
    test: str
    raced: list[str]
    machine: Values


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """The document in the file: see docs/speedrun.md for its keys."""

    name: str
    definition: Values
    commit: str
    command: str
    alongside: dict[str, list[float]]
    raced: list[str]
    data: str
    target: float
    laps: list[Values]
    summary: Values
    counts: bool
    reasons: list[str]
    date: str
    code: str = ""  # results of earlier versions have none


def result_document(
    record: RecordDefinition,
    laps: Sequence[Mapping[str, Any]],
    *,
    target: float | None,
    own: Identity,
    command: str,
    alongside: Mapping[str, list[float]],
) -> Values:
    """The document of `record` after `laps`.

    Args:
        target: None is the record's own.
        own: what the laps share.
        alongside: seconds of the laps of the other records of the race.
    """
    target = record.target if target is None else target
    reasons = broken_rules(record.track, target, laps)
    if own.commit.endswith(DIRTY):
        reasons.append("the checkout had changes that are in no commit; commit them and race again")
    return {
        "format": FORMAT,
        "name": record.name,
        "date": datetime.now(UTC).date().isoformat(),
        "counts": not reasons,
        "reasons": reasons,
        "target": target,
        "summary": means_over_seeds(laps),
        "definition": asdict(record),
        "data": own.data,
        "commit": own.commit,
        "code": own.code,
        "command": command,
        "raced": list(own.raced),
        "alongside": dict(alongside),
        "laps": list(laps),
    }


def unchanged(before: StoredResult, document: Mapping[str, Any]) -> Values:
    """Date and command of `before` if `document` has no new lap or target: its command was run again."""
    if (before.laps, before.target) != (document["laps"], document["target"]):
        return {}
    return {"date": before.date, "command": before.command}


def means_over_seeds(laps: Sequence[Mapping[str, Any]]) -> Values:
    """Means over seeds; empty without laps."""
    if not laps:
        return {}
    times = [lap["seconds"] for lap in laps]
    whole = all(lap["sample"] is not None for lap in laps)

    def mean(*keys: str) -> float:
        return round(statistics.fmean(_at(lap, keys) for lap in laps), 6)

    return {
        "seeds": len(laps),
        "seconds": round(statistics.fmean(times), 3),
        "seconds_range": [min(times), max(times)],
        "cpu_seconds": mean("cpu_seconds"),
        "preparation_seconds": mean("preparation_seconds"),
        "first_update_seconds": mean("first_update_seconds"),
        "reading_seconds": mean("reading_seconds"),
        "clean": mean("test", "clean", "accuracy"),
        "pgd20": mean("test", "pgd20", "accuracy"),
        "sample_pgd20": mean("sample", "pgd20") if whole else None,
        "sample_autoattack": mean("sample", "autoattack", "accuracy") if whole else None,
    }


def _at(values: Any, keys: Sequence[str]) -> float:
    for key in keys:
        values = values[key]
    return float(values)


def read_result(path: Path) -> StoredResult:
    """The result in the file `path`. Raises UserError where it cannot be read or is another document."""
    return read_json(
        path, StoredResult, what="a result of fastdynat speedrun", format=FORMAT, remedy="remove it"
    )


def write_result(path: Path, document: Values) -> None:
    """Write `document` to `path` in one step. Raises WriteError."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def finished_laps(path: Path, record: RecordDefinition, own: Identity) -> list[Values]:
    """The laps in the file `path` of a race that goes on; empty where there is no file.

    Raises:
        UserError: they were run with another definition, code, machine or data, or beside other records, so
            that their times and those to come are not of one race.
    """
    if not path.exists():
        return []
    stored = read_result(path)
    now: dict[str, tuple[Any, Any]] = {
        "the definition": (stored.definition, through_json(asdict(record))),
        "the commit": (stored.commit, own.commit),
        "the code": (stored.code, own.code),
        "the data": (stored.data, own.data),
        "the list of records": (stored.raced, own.raced),
    }
    machine = through_json(own.machine)
    for lap in stored.laps:
        before = {key: lap["environment"][key] for key in MACHINE}
        now["the machine, its threads or torch"] = (before, machine)
        now["the set of test images"] = (lap["test"]["sha256"], own.test)
        if (before, lap["test"]["sha256"]) != (machine, own.test):
            break
    for what, (before, after) in now.items():
        if before != after:
            short = f" ({before} before, {after} now)" if isinstance(before, str) else ""
            raise UserError(
                f"{path}: {what} has changed since this race began{short}; "
                "keep the file and choose another --out"
            )
    return stored.laps
