"""The chart of the study: robust accuracy, overfitting and labels over the epochs."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.lines import Line2D

from fastdynat.commands.figures import PALETTE, TEXT, draw, new_figure, quiet_axes
from fastdynat.runs.atomic_files import write_bytes

# One row of panels a block, its arms by their names, in the order of the palette.
ROWS = (
    (
        "crop-flip",
        "crops and flips",
        {"madry": "Madry", "dynat": "DYNAT", "trades": "TRADES", "lbgat": "LBGAT"},
    ),
    (
        "none",
        "no augmentation",
        {"madry": "Madry", "dynat": "DYNAT", "true-labels": "DYNAT with true labels"},
    ),
)
COLOURS = {
    "madry": PALETTE[0],
    "dynat": PALETTE[4],
    "trades": PALETTE[2],
    "lbgat": PALETTE[6],
    "true-labels": PALETTE[1],
}
PANELS = (
    ("val_pgd10_acc", "held-out images, PGD-10"),
    ("train_adv_acc", "training images, attacked"),
    ("label_agreement", "dynamic label = true label"),
)
Runs = Mapping[str, Mapping[str, Any]]


def mean_curve(runs: Runs, arm: str, augment: str, column: str) -> tuple[list[int], list[float]]:
    """Epochs and means over the seeds of a column, in %, of `small` on 5,000 images; may be empty."""
    values: dict[int, list[float]] = {}
    for run in runs.values():
        same = (run["arm"], run["augment"], run["model"], run["images"]) == (arm, augment, "small", 5000)
        if not same or column not in run["log"]:
            continue
        for epoch, value in zip(run["log"]["epoch"], run["log"][column], strict=True):
            if value is not None:
                values.setdefault(epoch, []).append(100 * value)
    return list(values), [fmean(found) for found in values.values()]


def draw_claim(runs: Runs, path: Path) -> None:
    """One panel a column, one row a block, one line a method: means over the seeds there are."""
    figure = new_figure(5.8)
    panels = figure.subplots(len(ROWS), len(PANELS), squeeze=False)
    for row, (augment, where, names) in zip(panels, ROWS, strict=True):
        for axes, (column, title) in zip(row, PANELS, strict=True):
            for arm in names:
                epochs, values = mean_curve(runs, arm, augment, column)
                if epochs:
                    axes.plot(epochs, values, color=COLOURS[arm], linewidth=1.6)
            axes.set_title(f"{title}\n{where}", loc="left", color=TEXT, fontsize=9)
            axes.set_ylabel("%", color=TEXT, fontsize=8)
            axes.set_xlabel("epoch", color=TEXT, fontsize=8)
            quiet_axes(axes)
    names = {arm: name for _, _, found in ROWS for arm, name in found.items()}
    figure.legend(
        [Line2D([], [], color=COLOURS[arm]) for arm in names],
        list(names.values()),
        loc="outside lower center",
        ncol=len(names),
        frameon=False,
        labelcolor=TEXT,
        fontsize=8,
    )
    write_bytes(path, draw(figure, path.suffix, 150))
