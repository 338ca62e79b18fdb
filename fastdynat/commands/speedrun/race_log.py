"""The record log: definitions with their results, and the speed-up over the baseline, as rows of a table."""

import math
import re
from collections import deque
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
    *("record", "track", "date", "what changed", "machine", "target %", "seconds", "PGD-20 %"),
    *("AutoAttack %", "speed-up", "counts"),
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
        return (*head, "", f"{100 * record.target:g}", NOT_MEASURED, "", "", "", "")
    found = result.summary
    return (
        *head,
        machine_text(record.track, result.laps[0]["environment"]),
        f"{100 * result.target:g}",
        seconds_text(found),
        f"{100 * found['pgd20']:.2f}",
        _percent(found["sample_autoattack"], 1),
        speedup_text(record.track, result, results),
        "yes" if result.counts else "no",
    )


def machine_text(track: str, environment: Mapping[str, Any]) -> str:
    """A machine as far as times compare, in short: a GPU, or a processor with its vectors and threads."""
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

    The baseline is the plain loop of the track. Where the two were not raced together, but on one kind of
    machine, the ratio has a ~ in front: the product of the ratios within the races that link them, or, where
    no races do, that of the seconds of two races. There is none between two kinds of machine, targets or sets
    of test images, nor where one of them does not count; but the baseline's gap to AutoAttack takes no
    speed-up away.
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
    ratios = ratios_to(base, result, results)
    if len(ratios) == 1:
        return f"{ratios[0]:.1f}"
    if not same_machine(result, base):
        return ""
    apart = base.summary["seconds"] / result.summary["seconds"]
    return f"~{math.prod(ratios) if ratios else apart:.1f}"


def ratios_to(base: StoredResult, result: StoredResult, results: Mapping[str, StoredResult]) -> list[float]:
    """Seconds of each record over those of the one before it in the same race, from `result` to `base`.

    The shortest chain of races, all on the baseline's images and kind of machine; empty where there is none.
    """
    waiting, seen = deque([(result, list[float]())]), {result.name}
    while waiting:
        last, ratios = waiting.popleft()
        if last.alongside.get(base.name):
            return [*ratios, _ratio(last, base.name)]
        for name in [name for name, times in last.alongside.items() if times and name not in seen]:
            link = results.get(name)
            if link is not None and same_images(link, base) and same_machine(link, base):
                waiting.append((link, [*ratios, _ratio(last, name)]))
                seen.add(name)
    return []


def _ratio(result: StoredResult, name: str) -> float:
    """Seconds of the record `name` over those of `result`, beside which it was raced."""
    # In the order of the seeds; a race that was stopped may lack the last one of a record.
    pairs = list(zip(result.alongside[name], (lap["seconds"] for lap in result.laps), strict=False))
    return sum(beside for beside, _ in pairs) / sum(float(own) for _, own in pairs)


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
