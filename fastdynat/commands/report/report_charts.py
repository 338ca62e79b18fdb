"""Charts of a report: each on one pair of axes, as SVG in the page and as a panel of a PNG file."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import accumulate
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastdynat.commands.figures import BLUE, PALETTE, TEXT, draw, quiet_axes
from fastdynat.commands.report.run_records import Record
from fastdynat.evaluation.curves import EpsCurve
from fastdynat.evaluation.margins import Margins

STYLES = ("-", "--", ":", "-.")  # of a colour's first, second, ... use
WIDTH, HEIGHT = 4.2, 2.7  # inches of a chart: about the width of a phone at the size of the page's text
# From low to high; opaque, and dark enough at one end and light enough at the other to stand on white and on
# black.
RAMP = LinearSegmentedColormap.from_list("ramp", ["#17324d", BLUE, "#cfe6f7"])
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Look:
    """Colour and line style of a run in every chart."""

    colour: str
    style: Any  # of matplotlib's, as text


@dataclass(frozen=True)
class Panel:
    """A chart: `alt` says in words what it shows."""

    title: str
    alt: str
    draw: Callable[[Axes], None]
    height: float = HEIGHT


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name."""
    kinds = [Look(colour, style) for style in STYLES for colour in PALETTE]
    return {name: kinds[i % len(kinds)] for i, name in enumerate(names)}


def svg(panel: Panel, salt: str) -> str:
    """The chart as an <svg> element, for a page that sets colour and font of its text.

    salt: no two pictures of a page may have the same.
    """
    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure = Figure(figsize=(WIDTH, panel.height), layout="constrained")
        _put(panel, figure.subplots())
        none: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=none)
    drawn = text.getvalue()
    drawn = re.sub(
        r'<g id="[^"]*"', "<g", drawn[drawn.index("<svg") :]
    )  # the same in every picture of a page
    drawn = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1),
        count=1,
    )
    return drawn.replace(TEXT, "currentColor")


def _put(panel: Panel, axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    panel.draw(axes)
    quiet_axes(axes)


def sheet(panels: Sequence[Panel], legend: Mapping[str, Look]) -> bytes:
    """All charts of a section as the content of one PNG file, two beside each other, with a legend above."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    heights = [max(p.height for p in panels[columns * row : columns * (row + 1)]) for row in range(rows)]
    figure = Figure(
        figsize=(WIDTH * columns, sum(heights) + 0.4 + 0.2 * (len(legend) // (2 * columns))),
        layout="constrained",
    )
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights}).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _put(panel, axes)
        axes.set_title(panel.title, loc="left", color=TEXT, fontsize=9)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if legend:
        handles = [
            matplotlib.lines.Line2D([], [], color=look.colour, linestyle=look.style)
            for look in legend.values()
        ]
        names = [name.replace("$", r"\$") for name in legend]
        figure.legend(
            handles,
            names,
            loc="outside upper left",
            ncol=2 * columns,
            frameon=False,
            labelcolor=TEXT,
            fontsize=8,
        )
    return draw(figure, ".png", 100)


def time_unit(seconds: float) -> tuple[float, str]:
    """A readable unit of time: its seconds, and its name."""
    return (3600, "hours") if seconds > 2 * 3600 else (60, "minutes") if seconds > 300 else (1, "seconds")


def series(record: Record, column: str, factor: float, unit: float | None) -> Points:
    """A column of the run's metrics, over epochs, or over training time in `unit` seconds.

    A loss is over that of the first epoch: those of different methods are different functions, and can be far
    apart.
    """
    seconds = list(accumulate(row.get("train_seconds") or 0.0 for row in record.rows))
    x = [row["epoch"] for row in record.rows] if unit is None else [s / unit for s in seconds]
    first = next((row["loss"] for row in record.rows if row.get("loss")), 1.0)
    factor = factor / first if column == "loss" else factor
    return [
        (at, factor * row[column])
        for at, row in zip(x, record.rows, strict=True)
        if row.get(column) is not None
    ]


def most_robust_index(record: Record) -> int | None:
    """The index of the epoch with the highest robust validation accuracy, from 0; None where none was
    validated. That of the best checkpoint may be another one (`Method.select_by`).
    """
    accuracies = {i: a for i, row in enumerate(record.rows) if (a := row.get("val_pgd10_acc")) is not None}
    return max(accuracies, key=accuracies.__getitem__, default=None)


def draw_series(
    records: Sequence[Record],
    legend: Mapping[str, Look],
    column: str,
    factor: float,
    unit: tuple[float, str] | None,
) -> Callable[[Axes], None]:
    """Lines over epochs or time, the most robust epoch of each as a ring."""

    def draw(axes: Axes) -> None:
        for record in records:
            points = series(record, column, factor, unit and unit[0])
            look, best = legend[record.name], most_robust_index(record)
            if not points:
                continue
            style: dict[str, Any] = {"color": look.colour, "linestyle": look.style, "linewidth": 1.6}
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 25 else "", **style)
            ring = [
                p
                for p, row in zip(points, _rows_with(record, column), strict=True)
                if row is record.rows[best or 0]
            ]
            if best is not None and ring:
                axes.plot(
                    *ring[0],
                    "o",
                    markersize=8,
                    markerfacecolor="none",
                    color=look.colour,
                    markeredgewidth=1.4,
                )
        axes.set_xlabel("epoch" if unit is None else f"training time, {unit[1]}", color=TEXT, fontsize=8)
        if unit is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.set_xlim(left=0)

    return draw


def _rows_with(record: Record, column: str) -> list[dict[str, Any]]:
    return [row for row in record.rows if row.get(column) is not None]


def scale(norm: str) -> tuple[float, str]:
    """The factor for radii of `norm` on an axis, and their unit."""
    return (255, "1/255") if norm == "linf" else (1, "1")


def draw_curves(curves: Mapping[str, EpsCurve], legend: Mapping[str, Look]) -> Callable[[Axes], None]:
    """Accuracy in % over the radius, with 95 % intervals as bands."""

    def draw(axes: Axes) -> None:
        norm = ""
        for name, c in curves.items():
            factor, norm = scale(c.norm)[0], c.norm
            x, look = [factor * e for e in c.eps], legend[name]
            low, high = ([100 * interval[end] for interval in c.ci] for end in (0, 1))
            axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)
            axes.plot(
                x, [100 * a for a in c.accuracy], color=look.colour, linestyle=look.style, linewidth=1.6
            )
        axes.set_xlabel(f"radius eps, {_unit(norm)}", color=TEXT, fontsize=8)
        axes.set_ylabel("accuracy, %", color=TEXT, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)

    return draw


def _unit(norm: str) -> str:
    return (
        f"{norm}, in {scale(norm)[1]} of the pixel range" if norm == "linf" else f"{norm}, pixels in [0, 1]"
    )


def draw_margins(found: Mapping[str, Margins], legend: Mapping[str, Look]) -> Callable[[Axes], None]:
    """Histograms of the distances as steps, in % of the images."""

    def draw(axes: Axes) -> None:
        norm = ""
        for name, m in found.items():
            norm, look = m.norm, legend[name]
            total = sum(m.counts) / m.found if m.found else 1
            edges = [scale(norm)[0] * edge for edge in m.edges]
            shares = [100 * count / total for count in m.counts]
            axes.stairs(shares, edges, color=look.colour, linestyle=look.style, linewidth=1.4)
        axes.set_xlabel(f"distance, {_unit(norm)}", color=TEXT, fontsize=8)
        axes.set_ylabel("% of the images", color=TEXT, fontsize=8)
        axes.set_xlim(left=0)

    return draw


def draw_trade(
    points: Mapping[str, Sequence[Mapping[str, Any]]], legend: Mapping[str, Look]
) -> Callable[[Axes], None]:
    """Robust over clean accuracy, 95 % intervals as a cross; a ring for a last, not best, checkpoint."""

    def draw(axes: Axes) -> None:
        for name, marks in points.items():
            for mark in marks:
                (x, x_ci), (y, y_ci) = mark["clean"], mark["robust"]
                errors = [
                    [[100 * (v - low)], [100 * (high - v)]] for v, (low, high) in ((x, x_ci), (y, y_ci))
                ]
                colour = legend[name].colour
                fill = colour if mark["filled"] else "none"
                axes.errorbar(
                    100 * x,
                    100 * y,
                    errors[1],
                    errors[0],
                    fmt="o",
                    color=colour,
                    elinewidth=0.9,
                    markerfacecolor=fill,
                )
        axes.set_xlabel("clean accuracy, %", color=TEXT, fontsize=8)
        axes.set_ylabel("robust accuracy, %", color=TEXT, fontsize=8)

    return draw


def draw_heat(
    values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], across: str = ""
) -> Callable[[Axes], None]:
    """A table of accuracies in % as coloured cells with their numbers."""

    def draw(axes: Axes) -> None:
        numbers = np.array([[np.nan if v is None else 100 * v for v in row] for row in values], dtype=float)
        mesh = axes.pcolormesh(np.ma.masked_invalid(numbers), cmap=RAMP, edgecolors="face", linewidth=0.3)
        for i, j in np.ndindex(*numbers.shape):
            if np.isfinite(numbers[i, j]):
                colour = readable_on([float(c) for c in mesh.to_rgba(numbers[i, j])[:3]])
                axes.text(
                    j + 0.5,
                    i + 0.5,
                    f"{numbers[i, j]:.0f}",
                    color=colour,
                    fontsize=7,
                    ha="center",
                    va="center",
                )
        turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(np.arange(len(columns)) + 0.5, [short(c) for c in columns], **turned)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [short(r) for r in rows])
        axes.invert_yaxis()
        axes.set_xlabel(across, color=TEXT, fontsize=8)
        axes.tick_params(length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    return draw


def short(name: str) -> str:
    """`name` as it fits beside a chart; matplotlib would read dollars as formulas."""
    return (name if len(name) <= 18 else f"{name[:10]}…{name[-7:]}").replace("$", r"\$")


def luminance(rgb: Sequence[float]) -> float:
    """Relative luminance (WCAG 2.1) of sRGB values in [0, 1]."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def readable_on(rgb: Sequence[float]) -> str:
    """Black or white, whichever has more contrast: at least 4.58 on any colour."""
    light = luminance(rgb)
    return "#000000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else "#ffffff"
