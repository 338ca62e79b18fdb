"""The attacked images of a run as the content of a PNG file."""

import base64
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fastdynat.commands.figures import TEXT, draw
from fastdynat.commands.report.findings import PICTURES
from fastdynat.commands.report.report_charts import short

CELL = 0.6  # inches of a picture


def draw_gallery(name: str, found: Mapping[str, Any]) -> bytes:
    """A row of pictures per kind, a column per image; `found` is a finding of `findings.examples`."""
    columns = len(found["examples"])
    figure = Figure(figsize=(1.2 + CELL * columns, 0.4 + CELL * len(PICTURES)), layout="constrained")
    figure.suptitle(short(name), color=TEXT, fontsize=8)
    grid = figure.subplots(len(PICTURES), columns, squeeze=False)
    for line, kind in zip(grid, PICTURES, strict=True):
        for axes, example in zip(line, found["examples"], strict=True):
            axes.imshow(np.asarray(Image.open(BytesIO(base64.b64decode(example["pictures"][kind])))))
            axes.set_axis_off()
        label = f"x {found['gain']:g}" if kind == "perturbation" else kind.replace("_", " ")
        line[0].text(
            -0.15, 0.5, label, transform=line[0].transAxes, color=TEXT, fontsize=7, ha="right", va="center"
        )
    return draw(figure, ".png", 72)
