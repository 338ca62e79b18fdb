"""What all pictures share (extra `plots`): transparent, in colours that can be read on white and on black."""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEXT, BLUE, RED, GREY = "#808080", "#2f81c7", "#c94f4f", "#9a9a9a"


def new_figure(height: float, width: float = 8.5) -> Figure:
    """An empty figure, sizes in inches."""
    # Text stays text in an SVG, so that it can be found and read aloud.
    matplotlib.rcParams["svg.fonttype"] = "none"
    return Figure(figsize=(width, height), layout="constrained")


def quiet(axes: Axes) -> None:
    """Two axes in grey, no box."""
    axes.tick_params(colors=TEXT, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(TEXT)
