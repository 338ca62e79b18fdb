"""Reading of a run's metrics.jsonl, one row per epoch; `fastdynat.training.metrics` writes it."""

from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from fastdynat.documents import convert, read_json_lines
from fastdynat.documents.numbers import Count, Positive, Whole
from fastdynat.errors import UserError

WHAT = "a run's metrics"


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Columns of every row; the others depend on the method."""

    epoch: Positive
    train_seconds: Annotated[float, Meta(ge=0, le=1e12)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one per epoch, in order. Raises UserError where it is damaged."""
    remedy = "move it away to go on without the rows of earlier epochs"
    rows = read_json_lines(path, dict[str, bool | Whole | float | None], what=WHAT, remedy=remedy)
    origins = [f"{path}, line {number}" for number in range(1, len(rows) + 1)]
    why = f"it is damaged or was edited; {remedy}"
    epochs = [
        convert(row, _Row, origin=origin, why=why).epoch for row, origin in zip(rows, origins, strict=True)
    ]
    for origin, (before, epoch) in zip(origins[1:], pairwise(epochs), strict=True):
        if epoch <= before:
            raise UserError(f"{origin}: epoch {epoch} follows epoch {before}: {why}")
    return rows


@dataclass(frozen=True, kw_only=True)
class _Best:
    """The part of a row that `best_epoch` reads."""

    epoch: Count
    best: bool | None = None


def best_epoch(path: Path) -> int | None:
    """The last epoch that is marked as best; None where there is none or the file is damaged."""
    with suppress(UserError):
        return max((row.epoch for row in read_json_lines(path, _Best, what=WHAT) if row.best), default=None)
    return None
