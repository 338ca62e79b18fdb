"""The report in a browser: no errors, no sideways scrolling on a phone or a desktop, light and dark."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import needs
from PIL import Image

from fastdynat.commands.main import main

pytestmark = needs("matplotlib", "jinja2", "chromium")
TINY = [
    "--train-size",
    "100",
    "--val-size",
    "20",
    "--batch-size",
    "50",
    "--steps",
    "1",
    "--epochs",
    "2",
    "--quiet",
]
# In the page: tells the page around it how wide it is and where the fragment leads.
PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  seen: innerWidth, wide: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  broken: [...document.images].filter(image => !image.naturalWidth).length,
  widest: Math.max(...[...document.querySelectorAll("svg")]
    .map(chart => chart.getBoundingClientRect().width)),
}), "*"))</script></body>"""
# A window cannot be as narrow as a phone, a frame can.
FRAME = """<!DOCTYPE html><link rel="icon" href="data:,"><body style="margin: 0">
<iframe src="page.html" style="width: {width}px; height: 880px; border: 0"></iframe>
<script>addEventListener("message",
  event => document.documentElement.dataset.seen = event.data)</script></body>"""


def chromium(profile: Path, page: Path, *flags: str) -> tuple[str, list[str]]:
    """Load the page; return its output and the lines of the browser's console."""
    command = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=3000", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def probed(folder: Path, html: str, width: int) -> tuple[dict[str, float], list[str]]:
    """The measurements of the page in a frame of this width, and the console's messages."""
    (folder / "page.html").write_text(html.replace("</body>", PROBE))
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width))
    dom, console = chromium(folder / "profile", frame, "--window-size=1400,900", "--dump-dom")
    seen = re.search(r'data-seen="(.*?)"', dom)
    assert seen is not None, dom[:500]
    return json.loads(seen[1].replace("&quot;", '"')), console


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs, one of them with a long name."""
    folder = tmp_path_factory.mktemp("report")
    runs = [folder / "madry", folder / ("dynat-" + "a-very-long-name-of-a-run-" * 5)]
    for run in runs:
        assert main(["train", "--method", "dynat", "--run-dir", str(run), *TINY]) == 0
        assert main(["eval", str(run), "--attacks", "clean,fgsm,pgd2,pgd3,pgd4", "--num-images", "20"]) == 0
    assert main(["report", *map(str, runs), "--out", str(folder / "out"), "--num-images", "8"]) == 0
    return folder / "out" / "index.html"


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_and_nothing_goes_wrong(index: Path, tmp_path: Path, width: int) -> None:
    seen, console = probed(tmp_path, index.read_text(), width)
    assert console == []
    assert seen["seen"] == width
    assert seen["wide"] <= width
    assert seen["broken"] == 0
    assert 0.25 * width < seen["widest"] < width


def test_the_probe_sees_what_goes_wrong(tmp_path: Path) -> None:
    html = (
        '<!DOCTYPE html><body><div style="width: 600px">x</div><svg></svg><img src="data:,">'
        '<script>console.error("oh")</script></body>'
    )
    seen, console = probed(tmp_path, html, 400)
    assert seen["wide"] >= 600
    assert seen["broken"] == 1
    assert len(console) == 1


def test_light_and_dark_look_different_and_neither_is_blank(index: Path, tmp_path: Path) -> None:
    means = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        flags = (
            "--window-size=1000,1600",
            f"--blink-settings=preferredColorScheme={number}",
            f"--screenshot={shot}",
        )
        chromium(tmp_path / f"profile-{scheme}", index, *flags)
        pixels = np.asarray(Image.open(shot).convert("L")).astype(float) / 255
        assert len(np.unique(pixels)) > 50
        background = np.median(pixels)
        assert (np.abs(pixels - background) > 0.4).mean() > 0.01  # text
        means[scheme] = background
    assert means["dark"] < 0.2 < 0.9 < means["light"]
