"""The tables of a report: text for each cell."""

import shlex
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fastdynat.commands.report.report_charts import most_robust_index
from fastdynat.commands.report.run_records import Measured, Record, ReportedCheckpoint, TestImages
from fastdynat.evaluation import Measurement


@dataclass(frozen=True)
class Missing:
    """One sentence on what the page lacks, and the command that makes it ("" where there is none)."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class AccuracyColumn:
    """A column of the accuracies: an attack and what it was allowed."""

    attack: str
    norm: str
    eps: float | None
    dataset: str
    source: str | None = None

    @classmethod
    def of(cls, measured: Measured) -> "AccuracyColumn":
        radius = ("", 0.0) if measured.result.attack == "clean" else (measured.norm, measured.eps)
        return cls(measured.result.attack, *radius, measured.dataset, measured.source)

    @property
    def radius(self) -> str:
        """The threat model as the head of the column says it."""
        if self.attack == "clean":
            return "no attack"
        radius = (
            f"{self.norm or 'its own norm'}, not limited to eps"
            if self.eps is None
            else describe_radius(self.norm, self.eps)
        )
        return radius if self.source is None else f"{radius}, made on weights {self.source[:8]}"


def describe_radius(norm: str, eps: float) -> str:
    """``linf 8/255`` or ``l2 0.5``."""
    return f"{norm} {255 * eps:.4g}/255" if norm == "linf" else f"{norm} {eps:.4g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a number in %, or a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def command(*words: object) -> str:
    """A command line that a shell reads as `words`."""
    return shlex.join(["fastdynat", *map(str, words)])


def training_seconds(record: Record) -> float:
    """Seconds of training without validation."""
    return float(sum(row.get("train_seconds") or 0.0 for row in record.rows))


def run_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per run: its configuration and training time."""
    rows = []
    for record in records:
        c = record.config
        where = f" {Path(str(c.get('data_dir'))).name}" if c.get("data") == "imagefolder" else ""
        size = "" if c.get("image_size") is None else f" at {c['image_size']} px"
        rows.append(
            {
                "name": record.name,
                "method": c.get("method", "-"),
                "model": c.get("model", "-"),
                "data": f"{c.get('data', '-')}{where}{size}",
                "epochs": f"{len(record.rows)}"
                + (f" of {c['epochs']}" if c.get("epochs") not in (None, len(record.rows)) else ""),
                "seconds": f"{training_seconds(record):,.0f}",
                "seed": c.get("seed", "-"),
            }
        )
    return rows


def cells(checkpoint: ReportedCheckpoint) -> dict[AccuracyColumn, Measured]:
    """One measurement for each column; of each dataset, all are of the same images (`chosen_images`).

    Of several for one column, those of the present code go first, then the lowest.
    """
    chosen = chosen_images(checkpoint)
    found: dict[AccuracyColumn, Measured] = {}
    for new in checkpoint.measured:
        column = AccuracyColumn.of(new)
        old = found.get(column)
        if new.test_images in chosen and (old is None or _merit(new) > _merit(old)):
            found[column] = new
    return found


def _merit(measured: Measured) -> tuple[bool, float]:
    return measured.current, -measured.result.accuracy


def chosen_images(checkpoint: ReportedCheckpoint) -> set[TestImages]:
    """The images that the report is about, a set of them for each dataset.

    The largest set with both clean and robust accuracy, or if there is none, with robust accuracy, or with
    any. Of equally large ones that of the present code, then that with the lowest robust accuracy: nothing
    says which of them the run's own images are.
    """
    sets: dict[TestImages, list[Measured]] = {}
    for measured in checkpoint.measured:
        sets.setdefault(measured.test_images, []).append(measured)

    def merit(images: TestImages) -> tuple[Any, ...]:
        robust = [m for m in sets[images] if _in_the_ball(AccuracyColumn.of(m), checkpoint)]
        natural = any(m.result.attack == "clean" for m in sets[images])
        best = max(map(_merit, robust or sets[images]))
        return natural and bool(robust), bool(robust), images.count, best, images.digest

    chosen: dict[str, TestImages] = {}
    for images in sorted(sets, key=merit):
        chosen[images.dataset] = images
    return set(chosen.values())


def _in_the_ball(column: AccuracyColumn, checkpoint: ReportedCheckpoint) -> bool:
    """True for an attack within the radius at which the run is evaluated."""
    return (column.norm, column.eps) == (checkpoint.sidecar.norm, checkpoint.sidecar.eval_eps)


def strongest(checkpoint: ReportedCheckpoint) -> tuple[AccuracyColumn, Measurement] | None:
    """The attack under which least is left, of those on the run's data and within its radius."""
    own = [
        (column, measured.result)
        for column, measured in cells(checkpoint).items()
        if column.dataset == checkpoint.sidecar.dataset and _in_the_ball(column, checkpoint)
    ]
    return min(own, key=lambda pair: pair[1].accuracy, default=None)


def clean(checkpoint: ReportedCheckpoint) -> Measurement | None:
    """The measurement without an attack, on the run's data: of the same images as `strongest`."""
    own = ("clean", checkpoint.sidecar.dataset)
    return next((m.result for c, m in cells(checkpoint).items() if (c.attack, c.dataset) == own), None)


def other_images(records: Sequence[Record]) -> list[Missing]:
    """A note for each checkpoint on its measurements of other images, which the page leaves out."""
    return [
        _other_images(record, checkpoint, left_out)
        for record in records
        for checkpoint in record.checkpoints
        if (left_out := _left_out(checkpoint))
    ]


def _left_out(checkpoint: ReportedCheckpoint) -> list[Measured]:
    chosen = chosen_images(checkpoint)
    return [m for m in checkpoint.measured if m.test_images not in chosen]


def _other_images(record: Record, checkpoint: ReportedCheckpoint, left_out: Sequence[Measured]) -> Missing:
    """A note on what is left out and which of it is lower than what is shown, with `_measure_again`."""
    accuracies = dict.fromkeys(_with_images(m, checkpoint) for m in left_out)
    text = (
        f"{record.name}, {' = '.join(checkpoint.names)}: left out, because they are of other images: "
        f"{', '.join(accuracies)}."
    )
    worst = strongest(checkpoint)
    lower = [m.result.attack for m in left_out if worst and _is_lower(m, worst[1], checkpoint)]
    if worst and lower:
        shown = f"{percent(worst[1].accuracy, 2)} % under {worst[0].attack}"
        text += f" Lower than the worst case that is shown, {shown}: {', '.join(dict.fromkeys(lower))}."
    return Missing(text, _measure_again(record, checkpoint, left_out))


def _with_images(measured: Measured, checkpoint: ReportedCheckpoint) -> str:
    """An accuracy with its images, and with its radius where that is not the run's."""
    result, column = measured.result, AccuracyColumn.of(measured)
    own = result.attack == "clean" or _in_the_ball(column, checkpoint)
    radius = "" if own else f", {column.radius}"
    images = f"{result.images:,} images of {measured.dataset}"
    return f"{result.attack} {percent(result.accuracy, 2)} % ({images}{radius})"


def _is_lower(measured: Measured, worst: Measurement, checkpoint: ReportedCheckpoint) -> bool:
    comparable = _in_the_ball(AccuracyColumn.of(measured), checkpoint)
    own = measured.dataset == checkpoint.sidecar.dataset
    return comparable and own and measured.result.accuracy < worst.accuracy


def _measure_again(record: Record, checkpoint: ReportedCheckpoint, left_out: Sequence[Measured]) -> str:
    """The command that measures the attacks of `left_out` on the chosen images; "" where none surely does.

    None does for attacks that the run's radius and name do not describe (of another radius, made on other
    weights, or in the user's file), and for images that only their content tells from the chosen ones.
    """
    dataset = checkpoint.sidecar.dataset
    count = next((images.count for images in chosen_images(checkpoint) if images.dataset == dataset), None)
    shown = cells(checkpoint)
    attacks = [
        m.result.attack
        for m in left_out
        if m.dataset == dataset
        and m.test_images.count != count
        and m.source is None
        and AccuracyColumn.of(m) not in shown
        and ":" not in m.result.attack
        and (m.eps is None or m.result.attack == "clean" or _in_the_ball(AccuracyColumn.of(m), checkpoint))
    ]
    if not attacks or count is None:
        return ""
    which = ("--checkpoints", checkpoint.names[0], "--attacks", ",".join(dict.fromkeys(attacks)))
    return command("eval", record.path, *which, "--num-images", count)


def accuracy_table(records: Sequence[Record]) -> dict[str, Any]:
    """Clean and robust accuracies with their intervals, a row for each checkpoint."""
    measured = [(r, c, found) for r in records for c in r.checkpoints if (found := cells(c))]
    columns = list(dict.fromkeys(column for _, _, found in measured for column in found))
    # Clean first, then from weak to strong: the reader goes from what is easy to what is hard.
    columns.sort(
        key=lambda c: (
            c.attack != "clean",
            -fmean(found[c].result.accuracy for _, _, found in measured if c in found),
        )
    )
    sets = {m.test_images for _, _, found in measured for m in found.values()}
    rows = []
    for record, checkpoint, found in measured:
        worst, natural = strongest(checkpoint), clean(checkpoint)
        gap = natural.accuracy - worst[1].accuracy if worst and natural else None
        rows.append(
            {
                "name": record.name,
                "checkpoint": " = ".join(checkpoint.names),
                "epoch": checkpoint.sidecar.epoch,
                "cells": [_cell(found.get(column), sets) for column in columns],
                "gap": percent(gap),
            }
        )
    counts = sorted({images.count for images in sets})
    return {"columns": columns, "rows": rows, "images": ", ".join(f"{n:,}" for n in counts)}


def _cell(measured: Measured | None, sets: Set[TestImages]) -> dict[str, str] | None:
    """The text of a cell; it says which images it is of where `sets`, those of the table, leave that open."""
    if measured is None:
        return None
    own = measured.test_images
    count = f"{own.count:,} images" if len({images.count for images in sets}) > 1 else ""
    if any(images != own and (images.dataset, images.count) == (own.dataset, own.count) for images in sets):
        count = f"{own.count:,} images {own.digest[:8]}"
    low, high = map(percent, measured.result.ci)
    return {"value": percent(measured.result.accuracy, 2), "low": low, "high": high, "count": count}


def unevaluated(records: Sequence[Record]) -> list[Missing]:
    """The commands that measure the checkpoints without measurements."""
    found = []
    for record in records:
        if not record.checkpoints:
            resume = command("train", "--resume", record.path)
            found.append(Missing(f"{record.name} has no checkpoint yet.", resume))
        elif not any(c.measured for c in record.checkpoints):
            why = "only evaluations of checkpoints that are gone" if record.stale else "no evaluation"
            found.append(Missing(f"{record.name} has {why}.", command("eval", record.path)))
    return found


def gap_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Robust validation accuracy of the epoch where it is highest, and of the last one."""
    rows = []
    for record in records:
        best, last = most_robust_index(record), record.rows[-1] if record.rows else {}
        if best is None or last.get("val_pgd10_acc") is None:
            continue
        top = record.rows[best]
        drop = top["val_pgd10_acc"] - last["val_pgd10_acc"]
        rows.append(
            {
                "name": record.name,
                "best_epoch": top["epoch"],
                "best": percent(top["val_pgd10_acc"]),
                "last_epoch": last["epoch"],
                "last": percent(last["val_pgd10_acc"]),
                "drop": percent(drop),
                "width": f"{100 * top['val_pgd10_acc']:.1f}",
                "rest": f"{100 * last['val_pgd10_acc']:.1f}",
            }
        )
    return rows
