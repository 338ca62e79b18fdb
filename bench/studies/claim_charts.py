"""The chart of the study: robust accuracy, overfitting and labels over the epochs."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fastdynat.commands.figures import PALETTE, TEXT, draw, new_figure, quiet_axes
from fastdynat.runs.atomic_files import write_bytes

NAMES = {"madry": "Madry", "dynat": "DYNAT", "trades": "TRADES", "lbgat": "LBGAT"}
PANELS = (
    ("val_pgd10_acc", "held-out images, PGD-10"),
    ("train_adv_acc", "training images, attacked"),
    ("label_agreement", "dynamic label = true label"),
)


def mean_curve(runs: Mapping[str, Mapping[str, Any]], arm: str, column: str) -> tuple[list[int], list[float]]:
    """Epochs and mean over the seeds of a column, in %, of the block "methods"; empty where no run has it."""
    values: dict[int, list[float]] = {}
    for run in runs.values():
        if run["arm"] != arm or run["block"] != "methods" or column not in run["log"]:
            continue
        for epoch, value in zip(run["log"]["epoch"], run["log"][column], strict=True):
            if value is not None:
                values.setdefault(epoch, []).append(100 * value)
    return list(values), [fmean(found) for found in values.values()]


def draw_claim(runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One panel a column, one line a method: means over the seeds there are."""
    figure = new_figure(3.2)
    for axes, (column, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        panel(axes, runs, column)
        axes.set_title(title, loc="left", color=TEXT, fontsize=9)
        axes.set_xlabel("epoch", color=TEXT, fontsize=8)
        quiet_axes(axes)
    lines = [Line2D([], [], color=colour) for colour in colours().values()]
    figure.legend(
        lines,
        list(NAMES.values()),
        loc="outside lower center",
        ncol=4,
        frameon=False,
        labelcolor=TEXT,
        fontsize=8,
    )
    write_bytes(path, draw(figure, path.suffix, 150))


def colours() -> dict[str, str]:
    """A colour for each method."""
    return dict(zip(NAMES, (PALETTE[0], PALETTE[4], PALETTE[2], PALETTE[6]), strict=True))


def panel(axes: Axes, runs: Mapping[str, Mapping[str, Any]], column: str) -> None:
    """The lines of one column, in %."""
    for arm, colour in colours().items():
        epochs, values = mean_curve(runs, arm, column)
        if epochs:
            axes.plot(epochs, values, color=colour, linewidth=1.6)
    axes.set_ylabel("%", color=TEXT, fontsize=8)
