"""Pictures of `fastdynat bench` (extra `plots`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fastdynat.commands.figures import BLUE, GREY, PALETTE, RED, TEXT, draw, new_figure, quiet_axes
from fastdynat.runs.atomic_files import write_bytes

OURS, PEER, INVALID = BLUE, GREY, RED


def draw_rates(doc: Mapping[str, Any], path: Path) -> None:
    """Images per second of every row as bars, with whiskers from the 20th to the 80th percentile."""
    groups = {kind: [row for row in doc["rows"] if row["kind"] == kind] for kind in ("attack", "step")}
    groups = {kind: rows for kind, rows in groups.items() if rows}
    heights = [len(rows) for rows in groups.values()]
    figure = new_figure(1.2 + 0.34 * sum(heights) + 0.6 * len(heights))
    plots = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (kind, rows) in zip(plots[:, 0], groups.items(), strict=True):
        _bars(axes, rows)
        axes.set_title("attack" if kind == "attack" else "training step", loc="left", color=TEXT, fontsize=10)
    plots[-1, 0].set_xlabel("images/s", color=TEXT)
    s, env = doc["settings"], doc["environment"]
    where = ", ".join(env["gpus"]) or f"{env['cpu']}, {env['threads']} threads"
    figure.suptitle(
        f"{s['model']}, batch {s['batch_size']}, PGD-{s['steps']}: {where}", color=TEXT, fontsize=10
    )
    write_bytes(path, draw(figure, path.suffix, 150))


def draw_kinds(kinds: Mapping[str, float], title: str, path: Path) -> None:
    """Seconds by kind of operation as one stacked bar."""
    figure = new_figure(2.6)
    axes = figure.subplots()
    left, total = 0.0, sum(kinds.values())
    for (name, seconds), colour in zip(kinds.items(), PALETTE, strict=False):
        axes.barh([0], [1000 * seconds], left=left, color=colour, label=f"{name} {seconds / total:.0%}")
        left += 1000 * seconds
    axes.set_yticks([])
    axes.set_xlabel("ms", color=TEXT)
    axes.set_title(title, loc="left", color=TEXT, fontsize=10)
    quiet_axes(axes)
    figure.legend(loc="outside lower center", ncol=4, frameon=False, labelcolor=TEXT, fontsize=8)
    write_bytes(path, draw(figure, path.suffix, 150))


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    rates = [row["images_per_s"] for row in rows]
    middle = [rate["median"] for rate in rates]
    colours = [INVALID if row["invalid"] else OURS if row["ours"] else PEER for row in rows]
    spread = [[r["median"] - r["p20"] for r in rates], [r["p80"] - r["median"] for r in rates]]
    names = [f"{row['name']}{' (invalid)' if row['invalid'] else ''}" for row in rows]
    bars = axes.barh(range(len(rows)), middle, xerr=spread, color=colours, ecolor=TEXT, height=0.7)
    axes.bar_label(
        bars, [f"{m:,.0f}" if m >= 100 else f"{m:.1f}" for m in middle], padding=6, color=TEXT, fontsize=8
    )
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    quiet_axes(axes)
