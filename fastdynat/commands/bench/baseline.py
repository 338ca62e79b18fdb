"""Comparison with the results of earlier."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastdynat.commands.bench.results import FORMAT, machine, setting_values
from fastdynat.config import TrainConfig
from fastdynat.documents import convert, read_json, short_repr, through_json
from fastdynat.documents.numbers import AboveZero
from fastdynat.errors import UserError
from fastdynat.terminal.consoles import AS_IS, PlainTable

MACHINE = ("cpu", "threads", "gpus", "tf32_convolutions")


@dataclass(frozen=True, kw_only=True)
class _Rates:
    """Images per second."""

    median: AboveZero


@dataclass(frozen=True, kw_only=True)
class _Row:
    """The compared fields of a row; a matrix product has no rates."""

    kind: str
    name: str
    ours: bool
    invalid: str | bool | None
    images_per_s: _Rates | None = None


@dataclass(frozen=True, kw_only=True)
class _Result:
    """The fields that are read from a result."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: list[_Row]
    complete: bool = True


def read_baseline(path: Path, config: TrainConfig[Any]) -> dict[str, Any]:
    """The results in `path`, which must be of the resolved `config` and of this machine.

    Raises:
        UserError: it cannot be read, is no result of `fastdynat bench`, or is of something else.
    """
    doc = read_json(
        path,
        dict[str, Any],
        what="a result of fastdynat bench",
        format=FORMAT,
        remedy=f"write one with --json {path}",
    )
    found = convert(
        doc, _Result, origin=str(path), why=f"it was damaged or edited; write another with --json {path}"
    )
    if not found.complete:
        raise UserError(
            f"{path} is from an unfinished measurement, with each row timed once; measure again with "
            f"--json {path}"
        )
    _agree(path, "setting", doc["settings"], through_json(setting_values(config)))
    _agree(
        path, "machine", *({key: env.get(key) for key in MACHINE} for env in (doc["environment"], machine()))
    )
    return doc


def _agree(path: Path, what: str, stored: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key in sorted({*stored, *ours}):
        if stored.get(key) != ours.get(key):
            raise UserError(
                f"{path} is of another {what}: {key} was {short_repr(stored.get(key))} and is "
                f"{short_repr(ours.get(key))}; "
                "measure both alike, or leave --baseline out"
            )


def compare_with_baseline(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rate now over that of before, for each of our own rows that both have and that was valid before.

    For a row that is invalid now, the ratio is None, and `invalid` gives the reason.
    """
    old = {(row["kind"], row["name"]): row for row in before["rows"]}
    found = []
    for row in now["rows"]:
        earlier = old.get((row["kind"], row["name"]))
        if not row["ours"] or earlier is None or earlier["invalid"] or "images_per_s" not in earlier:
            continue
        ratio = row["images_per_s"]["median"] / earlier["images_per_s"]["median"]
        found.append(
            {
                "kind": row["kind"],
                "name": row["name"],
                "ratio": None if row["invalid"] else round(ratio, 4),
                "invalid": row["invalid"],
            }
        )
    return found


def report_baseline(found: list[dict[str, Any]], path: str, tolerance: float, console: Console) -> bool:
    """Print the ratios; whether no row is invalid or slower than `tolerance` allows.

    Raises:
        UserError: the two have no row in common.
    """
    if not found:
        raise UserError(f"{path} has none of these rows: measure with the same --peers and --switches")
    console.print(f"\nrate, times that of {path}", **AS_IS)
    table = PlainTable("row", "ratio", "")
    for row in found:
        remark, ratio = f"INVALID: {row['invalid']}", "-"
        if row["ratio"] is not None:
            remark, ratio = "slower" if row["ratio"] < 1 - tolerance else "", f"{row['ratio']:.3f}"
        table.add_row(f"{row['kind']}, {row['name']}", ratio, remark)
    console.print(table)
    return all(row["ratio"] is not None and row["ratio"] >= 1 - tolerance for row in found)
