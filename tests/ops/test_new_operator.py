"""``python -m fastdynat.ops.new NAME`` on a copy of the checkout: its example builds, runs and passes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs

from fastdynat.errors import UserError
from fastdynat.ops.new import FILES, check_operator_name

ROOT = Path(__file__).parents[2]
NAME = "scale_pixels"
COMPARED = f"""
import sys
import torch
from fastdynat.ops.checks import {NAME}_cases as checks

torch.ops.load_library(sys.argv[1])
for case in checks.{NAME}_cases():
    if not case.gpu_only:
        (x,) = case.make(torch.device("cpu"))
        got, expected = checks.run_{NAME}(x, backend="cpp"), checks.run_{NAME}(x, backend="eager")
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert got is not expected
print(torch._C._dispatch_has_kernel_for_dispatch_key("fastdynat::{NAME}", "CPU"))
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(cwd)}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout to which the operator was added."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", ".*cache")
    for folder in ("csrc", "kernels", "fastdynat", "tests/ops", "tests/support"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / file, copy / file)
    done = run(sys.executable, "-m", "fastdynat.ops.new", NAME, cwd=copy)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed[: len(FILES)] == [file.format(name=NAME) for file in FILES]
    assert "next:" in printed
    assert all((copy / file.format(name=NAME)).is_file() for file in FILES)
    return copy


def test_the_new_test_passes(checkout: Path) -> None:
    test = f"tests/ops/test_{NAME}.py"
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test, cwd=checkout)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@needs("ruff")
def test_the_files_are_clean(checkout: Path) -> None:
    folders = ("fastdynat/ops", "kernels", "tests/ops")
    for command in (("check",), ("format", "--check")):
        done = run(sys.executable, "-m", "ruff", *command, *folders, cwd=checkout)
        assert done.returncode == 0, done.stdout


@needs("ext", "cxx")
def test_the_cpp_kernel_equals_the_eager_form(checkout: Path) -> None:
    package = Path(torch.__file__).parent
    library = checkout / "scale_pixels.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{package / 'include'}"]
    link = [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]
    compiler = shutil.which("g++") or os.environ.get("CXX", "c++")
    done = run(compiler, *flags, f"csrc/{NAME}.cpp", "-o", library, *link, cwd=checkout)
    assert done.returncode == 0, done.stderr[-4000:]
    done = run(sys.executable, "-c", COMPARED, library, cwd=checkout)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pgd_step_l2", r"'pgd_step_l2' is taken: fastdynat/ops/pgd_step_l2\.py exists"),
        ("prepare", "'prepare' is taken by a name in fastdynat.ops"),
        ("checks", "'checks' is taken by a name in fastdynat.ops"),
        ("torch", "'torch' is taken"),
        ("Step", "lower-case words"),
        ("two words", "lower-case words"),
        ("class", "lower-case words"),
        ("../step", "lower-case words"),
        ("1step", "lower-case words"),
    ],
)
def test_refused_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_operator_name(name, ROOT)


def test_only_a_checkout_takes_an_operator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run this in a checkout"):
        check_operator_name(NAME, tmp_path)


def test_the_command_needs_one_name() -> None:
    done = run(sys.executable, "-m", "fastdynat.ops.new", cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "usage: python -m fastdynat.ops.new NAME\n")
