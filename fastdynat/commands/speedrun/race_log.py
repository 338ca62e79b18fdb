"""The record log: definitions with their results, and the speed-up over the baseline, as rows of a table."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdynat.commands.speedrun.race_results import MACHINE, StoredResult, read_result
from fastdynat.commands.speedrun.race_rules import broken_rules
from fastdynat.commands.speedrun.record_definition import (
    RecordDefinition,
    definition_names,
    earlier_records,
    read_definition,
)
from fastdynat.documents import convert

HEADER = (
    *("record", "track", "date", "what changed", "machine", "seconds", "PGD-20 %", "AutoAttack %"),
    *("speed-up", "counts"),
)
NOT_IN_A_NAME = re.compile(r"\((R|TM)\)|^\d+-core | \d+-Core| Processor| CPU| @.*")
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # the widest first
NOT_MEASURED = "not measured yet"


def read_log(folder: Path) -> dict[str, StoredResult]:
    """The results in `folder` by record; empty where there is none.

    Raises:
        UserError: a file that is no result.
    """
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}


def log_table(folder: Path, track: str | None = None) -> list[tuple[str, ...]]:
    """`HEADER`, and a row for each record of `track`, or of all; a record follows the one that it changes."""
    results = read_log(folder)
    records = {name: read_definition(name) for name in definition_names()}
    for name, result in results.items():
        records.setdefault(name, _stored_definition(result, folder / f"{name}.json"))
    chosen = [record for record in records.values() if track in (None, record.track)]
    chosen.sort(key=lambda record: (record.track, earlier_records(record, records), record.date, record.name))
    return [HEADER, *(_row(record, results.get(record.name), results) for record in chosen)]


def _stored_definition(result: StoredResult, path: Path) -> RecordDefinition:
    return convert(result.definition, RecordDefinition, origin=str(path))


def _row(
    record: RecordDefinition, result: StoredResult | None, results: dict[str, StoredResult]
) -> tuple[str, ...]:
    algorithm = f" Changes the algorithm: {record.algorithm}" if record.algorithm else ""
    date = record.date if result is None else result.date
    head = (record.name, record.track, date, f"{record.changed}{algorithm}")
    if result is None or not result.summary:
        return (*head, "", NOT_MEASURED, "", "", "", "")
    found = result.summary
    return (
        *head,
        machine_text(record.track, result.laps[0]["environment"]),
        seconds_text(found),
        f"{100 * found['pgd20']:.2f}",
        _percent(found["sample_autoattack"], 1),
        speedup_text(record.track, result, results),
        "yes" if result.counts else "no",
    )


def machine_text(track: str, environment: Mapping[str, Any]) -> str:
    """What times compare within, in short: a GPU, or a processor with its widest vectors and the threads."""
    if track.startswith("gpu"):
        return str((environment["gpus"] or ["no GPU"])[0])
    name = " ".join(NOT_IN_A_NAME.sub(" ", environment["cpu"]).split())
    flags = environment["processor"]["flags"]
    widest = next((f" ({text})" for flag, text in VECTORS.items() if flag in flags), "")
    return f"{name}{widest}, {environment['threads']} thread{'s' * (environment['threads'] != 1)}"


def result_cells(result: StoredResult) -> tuple[str, ...]:
    """The cells of a finished race's table: record, seconds, seeds, clean, PGD-20, AutoAttack, counts."""
    found = result.summary
    shares = (_percent(found[key], 2) for key in ("clean", "pgd20", "sample_autoattack"))
    return (result.name, seconds_text(found), str(found["seeds"]), *shares, "yes" if result.counts else "no")


def _percent(share: float | None, digits: int) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def seconds_text(found: dict[str, Any]) -> str:
    """Mean seconds with the range over seeds."""
    low, high = found["seconds_range"]
    return f"{found['seconds']:.1f} ({low:.1f} to {high:.1f})"


def speedup_text(track: str, result: StoredResult, results: dict[str, StoredResult]) -> str:
    """The baseline's mean seconds over those of `result`, of the same race and over the same seeds.

    The baseline is the plain loop of the track. Of two races on one kind of machine, the ratio has a ~ in
    front. There is none between two kinds of machine, targets or sets of test images, nor where one of them
    does not count; but the baseline's gap to AutoAttack takes no speed-up away.
    """
    base = baseline(track, result.data, results)
    if base is None or broken_rules(track, base.target, base.laps, largest_gap=math.inf):
        return ""
    if base.name == result.name:
        return "1"
    if not result.counts or base.target != result.target:
        return ""
    if not same_images(result, base):
        return ""
    own = result.summary["seconds"]
    beside = result.alongside.get(base.name)
    if beside:  # in the order of the seeds; a race that was stopped may lack the last one of a record
        pairs = list(zip(beside, (lap["seconds"] for lap in result.laps), strict=False))
        return f"{sum(base for base, _ in pairs) / sum(own for _, own in pairs):.1f}"
    return f"~{base.summary['seconds'] / own:.1f}" if same_machine(result, base) else ""


def baseline(track: str, data: str, results: dict[str, StoredResult]) -> StoredResult | None:
    """The plain loop of the track on these images; None where it has no finished lap."""
    return next(
        (
            result
            for result in results.values()
            if result.definition["loop"] == "plain"
            and (result.definition["track"], result.data) == (track, data)
            and result.summary
        ),
        None,
    )


def same_images(result: StoredResult, base: StoredResult) -> bool:
    """True if all laps were tested on the same images."""
    return len({lap["test"]["sha256"] for lap in [*base.laps, *result.laps]}) == 1


def same_machine(result: StoredResult, base: StoredResult) -> bool:
    """True if times compare: the laps ran on one kind of machine, with the same threads and torch."""
    kinds = [[lap["environment"][key] for key in MACHINE] for lap in [*base.laps, *result.laps]]
    return all(kind == kinds[0] for kind in kinds)
