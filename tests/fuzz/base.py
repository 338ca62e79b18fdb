"""The undamaged input: one small run with everything that can lie beside it."""

import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from fastdynat.commands.main import main
from fuzz.commands import BENCH, STARTS, TINY


def make_base(folder: Path) -> Path:
    """A run with evaluations, boundary speeds, a report, a bench result, a comparison and an image folder."""
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        for argv in (
            ["train", *TINY, "--run-dir", "run", "--boundary-speed", "4"],
            ["eval", "run", "--attacks", "clean,fgsm", "--num-images", "20"],
            ["report", "run", "--num-images", "8", "--out", "rep"],
            [*BENCH, "--json", "bench.json"],
            STARTS["compare"],
        ):
            code = main(argv)
            assert code == 0, (argv, code)
        rng = np.random.default_rng(0)
        for part, count in (("train", 8), ("test", 3)):
            for name in "ab":
                (folder / "pictures" / part / name).mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / "pictures" / part / name / f"{number}.png")
    return folder
