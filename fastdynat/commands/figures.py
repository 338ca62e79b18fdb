"""The style of all charts (extra `plots`): transparent, in colours that are legible on white and on black."""

import importlib.util
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from fastdynat.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".svg", ".png", ".pdf")
TEXT, BLUE, RED, GREY = "#767676", "#2f81c7", "#c94f4f", "#9a9a9a"
PALETTE = (BLUE, "#5aa9a3", "#8fb04a", "#c9a227", "#d1783c", "#b3568f", "#7d68c2", "#7f8c99", "#a8744f", GREY)


def check_picture(flag: str, path: str | None, suffixes: tuple[str, ...] = PICTURES) -> None:
    """Raise UserError if --FLAG cannot write `path`: an unknown suffix, or a picture without matplotlib."""
    if path is None:
        return
    suffix = Path(path).suffix
    if suffix not in suffixes:
        raise UserError(f"--{flag} must end in {', '.join(suffixes)}, got {path!r}")
    if suffix in PICTURES and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--{flag} {path} needs matplotlib: pip install 'fastdynat[plots]'")


def new_figure(height: float) -> "Figure":
    """An empty figure, 8.5 inches wide."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text in an SVG, so that it can be found and read aloud.
    matplotlib.rcParams["svg.fonttype"] = "none"
    return Figure(figsize=(8.5, height), layout="constrained")


def draw(figure: "Figure", suffix: str, dpi: float) -> bytes:
    """The content of a transparent picture file with the ending `suffix`."""
    content = BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."), transparent=True, dpi=dpi)
    return content.getvalue()


def quiet_axes(axes: "Axes") -> None:
    """Two grey axis lines with small numbers."""
    axes.tick_params(colors=TEXT, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(TEXT)
