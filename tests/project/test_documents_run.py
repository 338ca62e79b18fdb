"""Every command and Python block of README.md and docs/ runs, page by page, on tiny data.

What a block above is marked with says what is not run, and why (`support.documents`).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.documents import PAGES, ROOT, Block, blocks, name_of
from support.networks import tiny_cnn

from fastdynat.attacks import registry
from fastdynat.commands.main import main
from fastdynat.methods import METHODS

EXTEND = ROOT / "docs" / "extend.md"
IMAGES = "--val-size 4 --batch-size 4"
DIGITS = "--train-size 60 --val-size 20 --batch-size 20"
EVALUATED = "--num-images 8 --batch-size 8"
LANGUAGES = {"sh", "python", "yaml", "text"}
UNATTACKED = ("natural", "distillation")  # they have no --steps


def small(words: list[str], extra: str) -> list[str]:
    """The words of a fastdynat command with little data, few steps and few epochs."""
    command, given = words[0], dict(pairwise(words))
    flags = extra
    if command in ("train", "compare") and "--resume" not in words:
        flags = f"{IMAGES if given.get('--data') == 'imagefolder' else DIGITS} --quiet {extra}"
        if given.get("--method") not in UNATTACKED:
            flags += " --steps 1"
        budget = "--budget-seconds" in words
        flags += " --budget-seconds 1" if budget else f" --epochs {min(2, int(given.get('--epochs', 1)))}"
    if command in ("eval", "report"):
        flags = f"{EVALUATED} {extra}"
    return with_flags(words, flags)


def with_flags(words: list[str], flags: str) -> list[str]:
    """`words` with their options' values replaced by those in `flags`, which may also add options."""
    words = list(words)
    for option, value in re.findall(r"(--[a-z-]+)(?:[ =]([^-\s]\S*))?", flags):
        if option in words:
            if value:
                words[words.index(option) + 1] = value
        else:
            words += [option, value] if value else [option]
    return words


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' commands take: images, weights, and runs."""
    folder = tmp_path_factory.mktemp("documents")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for kind in ("cat", "dog"):
            (folder / "cifar10-jpeg" / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "cifar10-jpeg" / split / kind / f"{i}.jpg")
    extra = generator.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "1m.npz", image=extra, label=np.arange(40) % 2)
    convolution = torch.nn.Conv2d(3, 4, 3, stride=4)
    net = torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 2))
    torch.save(net.state_dict(), folder / "w.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for method in ("natural", "dynat"):
            words = ["train", "--method", method, "--run-dir", f"runs/{method}"]
            assert main(small(words, "")) == 0
    return folder


def names(model: torch.nn.Module) -> dict[str, Any]:
    """Variables of a page's Python blocks: a network, images of every class, images it classifies right."""
    x, x_test = torch.rand(160, 3, 8, 8), torch.rand(16, 3, 8, 8)
    y, y_test = torch.arange(160) % 10, model.eval()(x_test).argmax(1)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    found = {"model": model, "images": x, "labels": y, "x_test": x_test, "y_test": y_test}
    return {**found, "optimizer": optimizer, "__name__": "page"}


def run_shell(command: str, extra: str) -> None:
    """One command of a shell block, in the current folder."""
    program = command.partition(" ")[0]
    if program == "torchrun":  # its script need not be beside this Python
        command = command.replace(program, f"{shlex.quote(sys.executable)} -m torch.distributed.run", 1)
    if program != "fastdynat":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-c", command], check=True, env={**os.environ, "PATH": path})
        return
    words = shlex.split(command)[1:]
    if words[0] == "train" and "--run-dir" in words:
        shutil.rmtree(words[words.index("--run-dir") + 1], ignore_errors=True)  # the page makes it itself
    words = small(words, extra)
    assert main(words) == 0, words
    for option in ("--json", "--chart", "--out"):
        if option in words:
            assert Path(words[words.index(option) + 1]).exists(), words


def run_python(block: Block, page: dict[str, Any]) -> None:
    """One Python block, in the names of its page."""
    page.pop("adv_images", None)
    exec(compile(block.text, block.where, "exec", dont_inherit=True), page)
    if "adv_images" in page:
        (eps,) = {eval(radius) for radius in re.findall(r"\beps=([\d./ ]+)", block.text)}
        moved = (page["adv_images"] - page["images"]).detach().abs().amax()
        assert 0 < float(moved) <= eps * (1 + 1e-5)


def run(page: Path, *, slow: bool) -> None:
    """The blocks of `page` in order, in the current folder."""
    torch.manual_seed(0)
    known = names(tiny_cnn())
    for block in blocks(page):
        if block.title is not None:
            Path(block.title).write_text(block.text)
        elif block.not_run is not None or (block.slow and not slow):
            continue
        elif block.language == "sh":
            for command in block.commands:
                run_shell(command, block.extra)
        elif block.language == "python":
            run_python(block, known)


RUNNABLE = [
    page for page in PAGES if any(b.not_run is None and b.language in ("sh", "python") for b in blocks(page))
]
FAST = [page for page in RUNNABLE if any(b.not_run is None and not b.slow for b in blocks(page))]
SLOW = [page for page in RUNNABLE if any(b.slow for b in blocks(page))]


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `home` for one page, and the current folder."""
    copy = tmp_path / "home"
    shutil.copytree(home, copy, symlinks=True)
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(str(copy))
    yield copy
    # The registrations by the page's files: another copy of them would be another method or attack.
    METHODS.pop("squeeze", None)
    for pattern in [p for p, e in registry._registered.items() if e.module.startswith("user_file")]:
        del registry._registered[pattern], registry._constructors[pattern]


@pytest.mark.filterwarnings("ignore")  # of a network that has seen 60 images much is to be warned of
@pytest.mark.parametrize("page", FAST, ids=name_of)
def test_the_page_runs(page: Path, folder: Path) -> None:
    run(page, slow=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_the_page_runs_with_its_slow_blocks(page: Path, folder: Path) -> None:
    run(page, slow=True)


@pytest.mark.filterwarnings("ignore")
def test_the_example_method_without_its_own_term_is_madrys(folder: Path) -> None:
    (block,) = [block for block in blocks(EXTEND) if block.title == "squeeze.py"]
    Path("squeeze.py").write_text(block.text)
    for method, flags in (("squeeze.py:Squeeze", "--squeeze-weight 0"), ("madry", "")):
        name = method.partition(".")[0]
        words = ["train", "--method", method, "--run-dir", f"runs/{name}", "--epochs", "2"]
        assert main(small(words, flags)) == 0
    left, right = (load_file(f"runs/{name}/last/model.safetensors") for name in ("squeeze", "madry"))
    learned = [key for key in left if key.endswith(("weight", "bias"))]
    assert learned
    for key in learned:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_in_a_language_that_is_run_or_only_shown(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES
    shown = [block.where for block in blocks(page) if block.language == "yaml" and block.title is None]
    assert not shown, "YAML that no command reads"


def test_most_blocks_run() -> None:
    found = [b for page in PAGES for b in blocks(page) if b.language in ("sh", "python") and b.title is None]
    assert len([b for b in found if b.not_run is None]) > 2 * len([b for b in found if b.not_run]) > 0
