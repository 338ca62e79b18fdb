"""Metrics of a run: means over an epoch on the device, and the files with one row per epoch."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdynat.distributed import World
from fastdynat.errors import UserError
from fastdynat.methods.base import SHARE_OF
from fastdynat.runs.atomic_files import write_text
from fastdynat.runs.metrics_rows import read_rows


class Averages:
    """Means of scalars weighted by images, accumulated on the device without waiting for it.

    A scalar with a `SHARE_OF` counts that share of a batch's images only (`methods.base.logged_mean`).

    Attributes:
        images: their number; a share of one where several ranks have the same image.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}  # images of the batches that logged the key
        self.images: float = 0

    def add(self, logs: Mapping[str, Tensor], images: float) -> None:
        """Add one batch's means, taken over `images` images."""
        for key, value in logs.items():
            term = value.detach().double() * images
            self._sums[key] = self._sums[key] + term if key in self._sums else term
            self._counts[key] = self._counts.get(key, 0) + images
        self.images += images

    def means(self) -> dict[str, float]:
        """The means so far, each over the images of the batches that logged it (waits for the device)."""
        sums = {key: float(value) for key, value in self._sums.items()}
        weights = {key: self._weight(key, sums) for key in sums if not key.startswith(SHARE_OF)}
        return {key: sums[key] / weight for key, weight in weights.items() if weight}

    def _weight(self, key: str, sums: Mapping[str, float]) -> float:
        """The number of images that the sum of `key` is over."""
        shared = SHARE_OF + key
        # A batch without the share, as before a resume from an earlier version, counts with all its images.
        return self._counts[key] - self._counts.get(shared, 0) + sums.get(shared, 0)

    def of_all(self, world: World) -> "Averages":
        """The averages over the images of all ranks; every rank must call it (waits for the device)."""
        if world.alone:
            return self
        found = Averages()
        own = {key: float(value) for key, value in self._sums.items()}
        for images, sums, counts in world.gather((self.images, own, self._counts)):
            found.images += images
            for key, value in sums.items():
                found._sums[key] = found._sums.get(key, torch.zeros((), dtype=torch.float64)) + value
                found._counts[key] = found._counts.get(key, 0) + counts[key]
        return found

    def state_dict(self) -> dict[str, Any]:
        sums = {key: value.cpu() for key, value in self._sums.items()}
        return {"images": round(self.images), "sums": sums, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.images = state["images"]
        self._sums = {key: value.to(device) for key, value in state["sums"].items()}
        # States of earlier versions have no counts: every batch logged every key.
        self._counts = dict(state.get("counts") or dict.fromkeys(self._sums, self.images))


class MetricsLog:
    """metrics.jsonl and metrics.csv, one row per epoch, and TensorBoard events if asked for.

    Both files are rewritten whole at each epoch: a kill leaves the old or the new one, and resuming drops the
    rows of epochs that run again.
    """

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self.jsonl, self.csv = folder / "metrics.jsonl", folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        if self.jsonl.exists():
            self.rows = read_rows(self.jsonl)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an extra; `resolve` checked that it is there

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def restore(self, epochs: int, row: dict[str, Any] | None) -> None:
        """Bring the rows in line with a checkpoint after `epochs` epochs.

        row: that of the last of them, as the checkpoint stores it; None where it stores none.

        Raises:
            UserError: there are rows of later epochs, so a later checkpoint is missing.
        """
        last = max((row["epoch"] for row in self.rows), default=0)
        # Earlier versions wrote the row first and had none in the checkpoint: a kill left one row more.
        if last > epochs + (row is None and epochs > 0):
            newest = (
                f"the newest complete checkpoint is of epoch {epochs}"
                if epochs
                else "there is no complete checkpoint"
            )
            raise UserError(
                f"{self.jsonl} has rows up to epoch {last}, but {newest}: parts of the run were not copied "
                f"or were removed. Restore its checkpoints, or move {self.jsonl.name} away to go on from "
                f"epoch {epochs + 1}"
            )
        kept = [row for row in self.rows if row["epoch"] <= epochs]
        if row is not None and last < epochs == row.get("epoch"):
            kept.append(row)
        if kept != self.rows:
            self.rows = kept
            self._write()

    def append(self, row: dict[str, Any]) -> None:
        """Add the row of one finished epoch."""
        self.rows.append(row)
        self._write()
        if self._writer is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "epoch":
                    self._writer.add_scalar(key, value, row["epoch"])
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        write_text(self.jsonl, "".join(json.dumps(row) + "\n" for row in self.rows))
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.csv, text.getvalue())
