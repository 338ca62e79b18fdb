"""images.png: the attacked images of all runs in one file."""

import base64
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fastdynat.pictures import TEXT
from fastdynat.report.charts import short
from fastdynat.report.findings import PICTURES

CELL = 0.5  # inches of a picture


def draw_gallery(examples: Mapping[str, Any], path: Path) -> None:
    """A row of pictures for each run and kind, a column for each image."""
    columns = max(len(value["examples"]) for value in examples.values())
    rows = len(PICTURES) * len(examples)
    figure = Figure(figsize=(1.9 + CELL * columns, 0.3 + CELL * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for number, (name, value) in enumerate(examples.items()):
        for row, kind in enumerate(PICTURES):
            line = grid[len(PICTURES) * number + row]
            for axes, example in zip(line, value["examples"], strict=False):
                axes.imshow(np.asarray(Image.open(BytesIO(base64.b64decode(example["pictures"][kind])))))
            label = f"x {value['gain']:g}" if kind == "perturbation" else kind.replace("_", " ")
            text = f"{short(name)}\n{label}" if row == 0 else label
            line[0].text(-0.15, 0.5, text, transform=line[0].transAxes, color=TEXT, fontsize=7, ha="right", va="center")
    figure.savefig(path, transparent=True, dpi=80)
