"""Help, lists and refusals need no torch: nothing heavy is imported before a command runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdynat.methods import METHODS, method_class, options_type

# Modules that help and errors must not import. sklearn and matplotlib are slow, numpy is not free.
HEAVY = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "sklearn",
    "matplotlib",
    "safetensors",
    "PIL",
    "timm",
    "datasets",
    "nvidia",
)
# An import of one of them fails, and says so.
BLOCKED = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Block())
from fastdynat.commands.main import main
code = 0
for line in sys.stdin.read().splitlines():
    try:
        code = main(line.split("\\x1f"))
    except SystemExit as end:
        code = end.code or 0
    print("exit", code, line.replace("\\x1f", " "), file=sys.stderr)
"""


def answers(*commands: list[str]) -> list[str]:
    """Exit code and standard error of each command, in a process where nothing heavy can be imported."""
    text = "\n".join("\x1f".join(command) for command in commands)
    done = subprocess.run([sys.executable, "-c", BLOCKED], input=text, capture_output=True, text=True)
    assert "imported" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr.splitlines()


COMMANDS = (
    *("train", "pack", "eval", "compare", "export", "report", "boundary", "recipes"),
    *("speedrun", "bench", "doctor"),
)


def test_help_and_lists_import_nothing_heavy() -> None:
    asked = [
        *(["--help"], ["--version"], ["recipes"], ["eval", "--list-attacks"], ["speedrun", "--list"]),
        *([command, "--help"] for command in COMMANDS),
        *(["train", "--method", method, "--help"] for method in METHODS),
        *(["bench", "--method", method, "-h"] for method in ("madry", "trades")),
        *(["train", "--recipe", recipe, "--help"] for recipe in ("rice2020", "dynat-awp", "dyart-cifar10")),
    ]
    lines = answers(*asked)
    assert lines == [f"exit 0 {' '.join(command)}" for command in asked]


def test_the_help_of_a_file_that_names_the_method(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("# fastdynat run\nmethod: mart\nepochs: 3\n")
    asked = [["train", "--config", str(file), "--help"], ["train", "--resume", str(tmp_path), "--help"]]
    assert answers(*asked) == [f"exit 0 {' '.join(command)}" for command in asked]
    shown = subprocess.run(
        [sys.executable, "-m", "fastdynat", *asked[0]], capture_output=True, text=True, check=True
    ).stdout
    assert "--floor" in shown  # MART's own option


REFUSED = [
    ["trian"],
    ["train", "--epoch-s", "3"],
    ["train", "--fold", "x"],
    ["train", "--epochs", "1e23"],
    ["train", "--epochs", "9" * 23],
    ["train", "--lr", "inf"],
    ["train", "--eps", "nan"],
    ["train", "--awp", "1e20"],
    ["train", "--run-dir", ""],
    ["train", "--data", "cifar1O"],
    ["train", "--method", "dynta"],
    ["train", "--recipe", "rice2002"],
    ["train", "--resume", "nowhere"],
    ["train", "--config", "nowhere.yaml"],
    ["train", "--method", "mart", "--beta=-1"],
    ["train", "--milestones", "0.5"],
    ["eval", "RUN", "--shard", "5/4"],
    ["eval", "RUN", "--batch-size", "0"],
    ["eval"],
    ["export"],
    ["export", "RUN"],
    ["boundary", "RUN", "other"],
    ["compare", "--methods", "madry,dynta"],
    ["compare", "--seeds", "1,1"],
    ["compare", "--set", "dynat.beta"],
    ["bench", "--seconds", "0"],
    ["doctor", "--jsno"],
    ["recipes", "x"],
    ["speedrun", "--record", "cpu2-marry"],
    ["speedrun", "--target", "30"],
    ["speedrun", "--seeds", "0"],
]


def test_refusals_import_nothing_heavy(tmp_path: Path) -> None:
    lines = answers(*REFUSED)
    assert len(lines) == 2 * len(REFUSED)
    assert all(line.startswith("fastdynat: error: ") for line in lines[::2])
    assert lines[1::2] == [f"exit 2 {' '.join(command)}" for command in REFUSED]


@pytest.mark.parametrize(
    "statement", ["import fastdynat", "import fastdynat.config", "import fastdynat.methods.options"]
)
def test_the_package_imports_nothing_heavy(statement: str) -> None:
    code = f"import sys\n{statement}\nfound = set({HEAVY}) & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_come_at_their_first_use() -> None:
    code = """
import fastdynat
assert {"PGD", "trades_loss", "ops", "evaluation"} <= set(dir(fastdynat))
assert callable(fastdynat.ops.random_start)
from fastdynat import PGD, trades_loss
from fastdynat.methods import Dynat, DynatOptions, METHODS
from fastdynat.methods.dynat import DynatOptions as same
from fastdynat.runs import load_network
from fastdynat.commands.export.export_config import ExportConfig
from fastdynat.commands.export.write_export import export_run
from fastdynat.commands.evaluate.settle import EvalConfig
assert DynatOptions is same is Dynat.options_type and METHODS["dynat"] is Dynat
assert {"Dynat", "DynatOptions"} <= set(dir(fastdynat.methods))
try:
    fastdynat.runs.nothing
except AttributeError as error:
    assert "fastdynat.runs" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_options_are_those_of_the_class(method: str) -> None:
    assert options_type(method.upper()) is method_class(method).options_type
    assert method_class(method).name == method
    assert METHODS[method] is method_class(method)


@pytest.mark.parametrize(
    "command", [["--help"], ["train", "--help"], ["recipes"], ["eval", "--list-attacks"], ["--version"]]
)
def test_a_reader_that_leaves_is_no_error(command: list[str]) -> None:
    """`fastdynat train --help | head`: here the reader is gone from the start."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fastdynat", *command], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (1, 141)


def test_attack_names_are_refused_without_torch() -> None:
    wrong = [
        (["--attacks", "pdg20"], "did you mean 'pgd20'"),
        (["--attacks", "clean,transfer-pdg20"], "did you mean 'pgd20'"),
        (["--attacks", "clean,Clean"], "named twice"),
        (["--attacks", ","], "no attack named"),
        (["--attacks", "mim", "--norm", "l1", "--eps", "1"], "only linf and l2; use pgd20 under l1"),
    ]
    lines = answers(*(["eval", "RUN", *flags] for flags, _ in wrong))
    assert [line.partition(" eval")[0] for line in lines[1::2]] == ["exit 2"] * len(wrong)
    for line, (_, message) in zip(lines[::2], wrong, strict=True):
        assert message in line
