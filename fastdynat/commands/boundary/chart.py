"""`fastdynat boundary RUN --chart FILE`: boundary speed over margin, a panel per epoch (extra `plots`)."""

import re
from pathlib import Path

import numpy as np

from fastdynat.commands.figures import BLUE, RED, TEXT, draw, new_figure, quiet_axes
from fastdynat.documents import regular_file
from fastdynat.errors import UserError
from fastdynat.evaluation.boundary_speed import FOLDER
from fastdynat.runs.atomic_files import write_bytes

PANELS, COLUMNS = 6, 3
NAME = re.compile(r"epoch-[0-9]{1,9}\.npz")
MAX_SIZE = 64 << 20  # bytes of the arrays of one validation
SHOWN = 0.99  # share of the points inside the axes; the rest sits on the border


def draw_speeds(run: Path, chart: Path) -> int:
    """Draw at most six validations of `run`, spread over its epochs. Returns how many it has.

    Raises:
        UserError: the run measured nothing, or a file of it is damaged.
    """
    files = sorted(path for path in (run / FOLDER).glob("epoch-*.npz") if NAME.fullmatch(path.name))
    if not files:
        raise UserError(f"{run} has no boundary speeds: train with --boundary-speed 500")
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, PANELS).round().astype(int))]
    data = [_read(path) for path in chosen]
    margins, speeds = (255 * np.concatenate([d[name] for d in data]) for name in ("margin", "speed"))
    right = float(np.quantile(margins, SHOWN)) if len(margins) else 1.0
    top = float(np.quantile(np.abs(speeds), SHOWN)) if len(speeds) else 1.0

    rows = -(-len(chosen) // COLUMNS)
    figure = new_figure(0.6 + 2.4 * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, path, values in zip(panels, chosen, data, strict=False):
        x, y = (
            np.clip(255 * values[name], -bound, bound) for name, bound in (("margin", right), ("speed", top))
        )
        axes.axhline(0, color=TEXT, linewidth=0.8)
        axes.axvline(255 * float(values["near"]), color=TEXT, linewidth=0.8, linestyle="--")
        for side, colour, what in ((y < 0, RED, "approaches"), (y >= 0, BLUE, "moves away")):
            axes.scatter(x[side], y[side], s=6, color=colour, alpha=0.6, linewidths=0, label=what)
        axes.set_title(f"epoch {int(path.stem.removeprefix('epoch-'))}", loc="left", color=TEXT, fontsize=9)
        quiet_axes(axes)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    figure.supxlabel("margin, in 1/255 (dashed: the radius of evaluation)", color=TEXT, fontsize=9)
    figure.supylabel("change per update, in 1/255", color=TEXT, fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside upper right",
        ncol=2,
        markerscale=2,
        frameon=False,
        labelcolor=TEXT,
        fontsize=8,
    )
    write_bytes(chart, draw(figure, chart.suffix, 150))
    return len(files)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one validation, of the images for which a boundary point was found."""
    regular_file(path, remedy="remove it to draw the others")
    try:
        with np.load(path, allow_pickle=False) as file:
            if sum(member.file_size for member in file.zip.infolist()) > MAX_SIZE:
                raise ValueError
            values = {name: file[name] for name in ("margin", "speed", "near")}
        shapes = {values[name].shape for name in ("margin", "speed")}
        if len(shapes) > 1 or values["margin"].ndim != 1 or not np.isfinite(float(values["near"])):
            raise ValueError
        found = np.isfinite(values["margin"])
        return {
            "near": values["near"],
            **{name: values[name][found].astype(float) for name in ("margin", "speed")},
        }
    except Exception as error:  # a zip file can be broken in many ways
        raise UserError(f"{path} is damaged ({type(error).__name__}); remove it to draw the others") from None
