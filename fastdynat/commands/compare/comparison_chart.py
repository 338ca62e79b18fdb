"""The picture of a comparison (extra `plots`): robust validation accuracy over training time."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from fastdynat.commands.figures import PALETTE, TEXT, draw, new_figure, quiet_axes
from fastdynat.runs.atomic_files import write_bytes

STYLES = ("-", "--", ":")  # of a colour's first, second, third use
LABEL_POINTS, HEIGHT = 9, 4.2
LEADER = {
    "arrowstyle": "-",
    "linestyle": ":",
    "linewidth": 0.7,
    "alpha": 0.7,
    "relpos": (0, 0.5),
    "shrinkA": 2,
    "shrinkB": 0,
}
Curve = list[tuple[float, float]]  # (training seconds, accuracy in %)


def draw_comparison(doc: Mapping[str, Any], path: Path) -> None:
    """A line per method, the mean over its seeds; each seed as a thin line; names at the right edge."""
    methods = list(dict.fromkeys(run["method"] for run in doc["runs"]))
    height = max(HEIGHT, 1.0 + 0.2 * len(methods))
    figure = new_figure(height)
    axes = figure.subplots()
    unit, name = _unit(max(run["train_seconds"] for run in doc["runs"]))
    ends: list[tuple[str, tuple[float, float], str]] = []
    for number, method in enumerate(methods):
        colour, style = PALETTE[number % len(PALETTE)], STYLES[number // len(PALETTE) % len(STYLES)]
        runs = [run for run in doc["runs"] if run["method"] == method]
        whole = [_curve(run, unit) for run in runs if run["ended"] != "diverged"]
        lost = [_curve(run, unit) for run in runs if run["ended"] == "diverged"]
        end = _draw_method(axes, whole, lost, colour, style)
        if end is not None:
            ends.append((f"{method} ({len(lost)} of {len(runs)} diverged)" if lost else method, end, colour))
    axes.set_xlim(left=0)
    top = axes.get_ylim()[1]
    axes.set_ylim(-0.02 * top, top)  # a line along zero stays whole
    axes.set_xlabel(f"training time without validation, {name}", color=TEXT, fontsize=9)
    axes.set_ylabel("validation accuracy under PGD-10, %", color=TEXT, fontsize=9)
    axes.set_title(_title(doc), loc="left", color=TEXT, fontsize=10)
    quiet_axes(axes)
    _label(axes, ends, height)
    write_bytes(path, draw(figure, path.suffix, 150))


def _curve(run: Mapping[str, Any], unit: float) -> Curve:
    seconds = accumulate(row["train_seconds"] for row in run["epochs"])
    pairs = zip(seconds, (row.get("val_pgd10_acc") for row in run["epochs"]), strict=True)
    return [(x / unit, 100 * y) for x, y in pairs if y is not None]


def _unit(seconds: float) -> tuple[float, str]:
    return (3600, "hours") if seconds > 2 * 3600 else (60, "minutes") if seconds > 300 else (1, "seconds")


def _draw_method(
    axes: Axes, whole: list[Curve], lost: list[Curve], colour: str, style: str
) -> tuple[float, float] | None:
    """Draw the curves of one method; returns where its line ends, or None where there is nothing to draw.

    The mean ends with the shortest of the `whole` curves, so that it always has all of those seeds: it would
    jump where one drops out. Without any, the longest of the `lost` curves, of seeds that diverged, is drawn.
    """
    curves = [curve for curve in (*whole, *lost) if curve]
    if not curves:
        return None
    if len(whole) + len(lost) > 1:
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, linewidth=0.7, alpha=0.6)
    shared = [curve for curve in whole if curve] or [max(lost, key=len)]
    mean = [(fmean(x for x, _ in at), fmean(y for _, y in at)) for at in zip(*shared, strict=False)]
    marker = "o" if len(mean) == 1 else ""
    axes.plot(*zip(*mean, strict=True), color=colour, linestyle=style, linewidth=1.8, marker=marker)
    return mean[-1]


def _label(axes: Axes, ends: Sequence[tuple[str, tuple[float, float], str]], height: float) -> None:
    """Names at the right edge, spread where lines end close together, each tied to the end of its line."""
    bottom, top = axes.get_ylim()
    gap = LABEL_POINTS * 1.3 / (72 * 0.85 * height)  # of the axes, which have about so much of the picture
    places: list[float] = []
    ordered = sorted(ends, key=lambda end: end[1][1])
    for _, (_, y), _ in ordered:
        places.append(max((y - bottom) / (top - bottom), places[-1] + gap if places else 0.0))
    for i in reversed(range(len(places))):  # what was pushed over the top comes down again
        places[i] = min(places[i], 1.0 if i + 1 == len(places) else places[i + 1] - gap)
    for (name, end, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            name,
            xy=end,
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=LABEL_POINTS,
            verticalalignment="center",
            arrowprops=LEADER | {"color": colour},
        )


def _title(doc: Mapping[str, Any]) -> str:
    config, env = doc["runs"][0]["config"], doc["environment"]
    where = ", ".join(env["gpus"]) or f"{env['cpu']}, {env['threads']} threads"
    return f"{config['model']} on {config['data']}: {where}"
