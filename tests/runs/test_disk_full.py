"""No room: one line with the file and the bytes, exit code 2, and earlier files are intact."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastdynat.commands.main import main
from fastdynat.runs import WriteError, find_checkpoint
from fastdynat.runs.atomic_files import replacing, saving, write_bytes
from fastdynat.runs.manifest import check_manifest

TINY = [
    "--train-size",
    "64",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--steps",
    "1",
    "--method",
    "madry",
    "--quiet",
]
FLAGS = [*TINY, "--epochs", "3"]


def fastdynat(
    *arguments: object, limit: int | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """The command line in a new process, where no file may exceed `limit` bytes."""

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "fastdynat", *map(str, arguments)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, preexec_fn=set_limit, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def refused(done: "subprocess.CompletedProcess[str]", *words: str) -> str:
    """The one line of a refusal."""
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
    return lines[0]


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if ".fastdynat-" in path.name or ".partial" in path.name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--run-dir", str(path), *FLAGS, "--stop-after", "1"]) == 0
    return path


@pytest.fixture
def paused(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "paused", symlinks=True))


def test_a_resume_without_room_loses_nothing_and_goes_on_with_room(
    trained: Path, paused: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(trained, tmp_path / "whole", symlinks=True))
    before = find_checkpoint(paused, "last")
    line = refused(
        fastdynat("train", "--resume", paused, "--quiet", limit=50_000), "cannot write", "File too large"
    )
    assert re.search(r"[\d,]{6,} bytes are needed; a file may have 50,000 bytes", line)
    assert f"go on with: fastdynat train --resume {paused}" in line
    assert "model.safetensors" in line
    assert find_checkpoint(paused, "last") == before
    assert before is not None
    check_manifest(before)
    assert leftovers(paused) == []
    assert len((paused / "metrics.jsonl").read_text().splitlines()) == 1
    for run in (paused, whole):
        assert main(["train", "--resume", str(run), "--quiet"]) == 0
    left, right = (load_file(run / "last" / "model.safetensors") for run in (paused, whole))
    assert all(bool((left[key] == right[key]).all()) for key in left)


@pytest.mark.slow
def test_training_state_and_exports_without_room(trained: Path, tmp_path: Path) -> None:
    done = fastdynat("train", "--run-dir", tmp_path / "run", *FLAGS, limit=2000)
    refused(done, "cannot write", "File too large")
    assert leftovers(tmp_path) == []
    for name in ("net.pt", "net.pt2"):
        out = tmp_path / name
        kind = "robustbench" if name == "net.pt" else "torch"
        done = fastdynat(
            "export", trained, "--out", out, "--format", kind, "--dataset", "cifar10", limit=50_000
        )
        refused(done, f"cannot write {out}", "File too large")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_results_without_room(trained: Path, tmp_path: Path) -> None:
    """The table is still printed; the cache is done without."""
    out = tmp_path / "x.json"
    out.write_text("old")
    flags = ("--attacks", "clean", "--num-images", "20", "--checkpoints", "last", "--json", out)
    done = fastdynat("eval", trained, *flags, limit=300)
    refused(done, f"cannot write {out}", "bytes are needed")
    assert "clean" in done.stdout
    assert done.stdout.count("results are not kept") + done.stderr.count("results are not kept") == 1
    assert (out.read_text(), leftovers(tmp_path)) == ("old", [])


def test_a_full_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "fastdynat", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["fastdynat: error: input or output: No space left on device"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_writers_on_a_full_disk(small_disk: Path) -> None:
    import torch

    state = {"a": torch.zeros(100_000)}

    def weights() -> None:
        from safetensors.torch import save_file

        with replacing(small_disk / "x.safetensors", needed=400_000) as new:
            save_file(state, new)

    def pickled() -> None:
        with saving(small_disk / "x.pt", needed=400_000) as file:
            torch.save(state, file)

    for write in (weights, pickled, lambda: write_bytes(small_disk / "x", bytes(400_000))):
        with pytest.raises(
            WriteError,
            match=r"x\S*: No space left on device; 400,000 bytes are needed; [\d,]+ bytes are free",
        ):
            write()
        assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_during_training(small_disk: Path) -> None:
    run = small_disk / "run"
    line = refused(
        fastdynat("train", "--run-dir", run, *FLAGS), "No space left on device", "bytes are needed"
    )
    assert f"make room, then go on with: fastdynat train --resume {run}" in line
    assert leftovers(run) == []
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert [json.loads(row)["epoch"] for row in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
