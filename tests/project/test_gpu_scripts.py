"""bench/gpu_check.sh and gpu_train.sh without a GPU: limits, order, kept results, packed files."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, needs
from PIL import Image
from support import sanitized_calls

from fastdynat.commands.parsing.parse import early_flags
from fastdynat.commands.train import parse_train
from fastdynat.errors import UserError
from fastdynat.methods import method_class
from fastdynat.training.parts import build_parts, open_split
from fastdynat.training.resolve import resolve

SAY = [sys.executable, "-S", "-c"]  # without site-packages: starts at once


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """The modules of bench/gpu; bench/ comes last on the path, because it has its own autoattack.py."""
    sys.path.append(str(ROOT / "bench"))
    try:
        names = ("archive", "bare", "keys", "machine", "pack", "parts", "plan", "unpack", "wheels")
        modules = {name: import_module(f"gpu.{name}") for name in names}
        yield SimpleNamespace(
            **modules, gpu_check=import_module("gpu_check"), gpu_train=import_module("gpu_train")
        )
    finally:
        sys.path.remove(str(ROOT / "bench"))


def check(gpu: SimpleNamespace, folder: Path, *parts: Any, total: float = 60) -> Any:
    work = folder / "work"
    work.mkdir()
    env = {"PATH": os.environ["PATH"]}
    return gpu.parts.Check("gpu_check", parts, total=total, work=work, out=folder, cwd=folder, env=env)


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in json.loads((folder / "gpu_check.json").read_text())["parts"]}


# Parts


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_parts_are_in_order_and_their_limits_fit_one_call(
    gpu: SimpleNamespace, tmp_path: Path, device: str
) -> None:
    bare = gpu.bare.Bare(device, tmp_path)
    listed = gpu.plan.Plan(bare, gpu.plan.TINY if device == "cpu" else gpu.plan.Sizes(), tmp_path).parts()
    names = [part.name for part in listed]
    important = [
        "doctor",
        "tests",
        "resnet18-full",
        "resnet18-switches",
        "wrn-34-10",
        "operators",
        "memcheck",
        "train",
        "eval",
    ]
    assert names[0] == "build"
    assert names[1:10] == important
    assert sum(part.seconds for part in listed) + gpu.gpu_check.PREPARE < gpu.gpu_check.TOTAL <= 540
    assert all(part.seconds > part.grace for part in listed if part.seconds)
    assert [part.name for part in listed if part.bad] == ["memcheck", "racecheck"]
    training = gpu.gpu_train.Training(bare, tmp_path / "run", tmp_path, tmp_path, "0.45", [])
    listed = gpu.gpu_train.parts(bare, training, float("inf"))
    assert sum(part.seconds for part in listed) + gpu.gpu_train.PREPARE < gpu.gpu_train.TOTAL <= 540


@pytest.mark.parametrize("limit", [20, 3])  # 3: it is ended at its limit
def test_what_inductor_chose_beside_other_work_is_forgotten(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The part of the tests and cold compilations stores a choice and a kernel; the kernel stays."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    bare = gpu.bare.Bare("cpu", tmp_path)
    listed = {part.name: part for part in gpu.plan.Plan(bare, gpu.plan.TINY, tmp_path).parts()}
    write = "import os, pathlib, time; folder = pathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR']) / 'ab'; "
    write += "folder.mkdir(parents=True); [(folder / name).touch() for name in ('x.best_config', 'x.py')]; "
    write += f"time.sleep({30 if limit < 9 else 0})"
    few = {"seconds": limit, "most": limit, "grace": 1, "key": lambda folder: ""}
    tests = replace(listed["tests"], command=[*SAY, write], **few)
    after = gpu.parts.Part(name="measure", seconds=9, command=[*SAY, "pass"])
    run = check(gpu, tmp_path, tests, after)
    run.env = bare.env
    run.run()
    assert [path.name for path in sorted((tmp_path / "inductor").rglob("*.*"))] == ["x.py"]
    assert stored(tmp_path)["tests"]["status"] == ("timed out" if limit < 9 else "ok")


def test_training_without_cifar10_fits_the_digits(gpu: SimpleNamespace) -> None:
    flags = [*gpu.plan.Sizes().trained_on_digits, "--device", "cpu"]
    config = parse_train(flags, early_flags(flags)).command.train
    assert config.data.data == "digits"
    split = open_split(config)
    assert 0 < config.engine.check_fidelity <= len(split.val)
    engine = replace(config.engine, check_fidelity=len(split.val) + 1)
    resolved = resolve(replace(config, engine=engine), split.info)
    with pytest.raises(UserError, match="validation images"):
        build_parts(resolved, split)


def side_by_side(out: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "gpu" / "side_by_side.py"), "--out", str(out), *flags]


def test_commands_run_side_by_side_and_the_first_decides(tmp_path: Path) -> None:
    first = ["first", *SAY, "import time; time.sleep(0.5); print('--json done')", "--json", "x"]
    second = ["second", *SAY, "raise SystemExit(3)"]
    program = side_by_side(tmp_path / "out")
    done = subprocess.run([*program, ":::", *first, ":::", *second], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0
    told = [line.split(",")[0] for line in done.stdout.decode().splitlines()]
    assert told == ["second: exit status 3", "first: exit status 0"]
    assert (tmp_path / "out" / "first.log").read_text() == "--json done\n"
    assert subprocess.run([*program, *second, ":::", *first], timeout=60).returncode == 3


def test_the_others_are_ended_once_the_first_has_ended(tmp_path: Path) -> None:
    sleeps = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    commands = ["a", *SAY, "pass", ":::", "b", *SAY, sleeps]
    begin = time.monotonic()
    done = subprocess.run(
        [*side_by_side(tmp_path, "--until", "1"), *commands], stdout=subprocess.PIPE, timeout=60
    )
    assert done.returncode == 0
    assert 1 < time.monotonic() - begin < 30
    assert b"b: exit status -9" in done.stdout


def test_tests_beside_others_leave_their_summary_when_all_are_interrupted(tmp_path: Path) -> None:
    """As parts.finish does it: SIGINT to the session."""
    (tmp_path / "test_these.py").write_text("import time\n\n\ndef test_a():\n    time.sleep(60)\n")
    words = ["tests", *shards(tmp_path, tmp_path / "test_these.py", limit=300)]
    words += [":::", "b", *SAY, "import time; time.sleep(60)"]
    process = subprocess.Popen([*side_by_side(tmp_path / "out"), *words], start_new_session=True)
    lines = tmp_path / "out" / "tests-0.jsonl"
    until = time.monotonic() + 60
    while '"start"' not in (lines.read_text() if lines.exists() else ""):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 1
    assert json.loads((tmp_path / "out" / "tests.json").read_text())["bad"]


def test_an_exit_status_can_be_no_failure(gpu: SimpleNamespace, tmp_path: Path) -> None:
    for code, status in ((1, "ok"), (2, "failed")):
        folder = tmp_path / str(code)
        folder.mkdir()
        command = [*SAY, f"raise SystemExit({code})"]
        part = gpu.parts.Part(name="race", seconds=20, command=command, good_codes=(0, 1))
        assert check(gpu, folder, part).run() == (status == "ok")
        assert stored(folder)["race"]["status"] == status


def test_the_figure_of_a_race_is_that_of_its_results(gpu: SimpleNamespace, tmp_path: Path) -> None:
    paths = [tmp_path / "gpu1-a.json", tmp_path / "gpu1-b.json"]
    assert gpu.keys.race(paths) == "no lap ended"
    paths[0].write_text(json.dumps({"summary": {}}))
    assert gpu.keys.race(paths) == "no lap ended"
    paths[1].write_text(json.dumps({"summary": {"seconds": 41.26, "pgd20": 0.5031, "seeds": 1}}))
    assert gpu.keys.race(paths) == "gpu1-b 41.3 s, PGD-20 50.3%, seeds: 1"


def test_only_named_parts_run_in_their_usual_order(gpu: SimpleNamespace, tmp_path: Path) -> None:
    listed = gpu.plan.Plan(gpu.bare.Bare("cuda", tmp_path), gpu.plan.Sizes(), tmp_path).parts()
    assert [part.name for part in gpu.plan.chosen(listed, "speedrun,tests")] == ["tests", "speedrun"]
    assert gpu.plan.chosen(listed, None) == listed
    for wrong in ("tests,trian", ","):
        with pytest.raises(ValueError, match="no such part; parts are build, doctor"):
            gpu.plan.chosen(listed, wrong)


def test_limits_that_do_not_fit_are_refused(gpu: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="60 s, which is not less than 60 s"):
        check(gpu, tmp_path, *(gpu.parts.Part(name=n, seconds=30, command=[]) for n in "ab"))


def test_what_a_part_leaves_goes_to_the_next_and_never_back(gpu: SimpleNamespace, tmp_path: Path) -> None:
    parts = [gpu.parts.Part(name=n, seconds=s, command=[]) for n, s in (("a", 10), ("b", 20), ("c", 25))]
    run = check(gpu, tmp_path, *parts)
    assert [round(run.limit(i)) for i in range(3)] == [
        15,
        35,
        60,
    ]  # all the slack, but nothing of what comes after
    run.begin -= 15
    assert [round(run.limit(i)) for i in range(1, 3)] == [20, 45]  # a used it up: b and c keep their own


HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
time.sleep(600)
"""
WRITES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("SIGTERM", flush=True), sys.exit(9)))
try:
    print("begun", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("summary of what was done", flush=True)
    sys.exit(1)
"""


def test_a_hanging_part_is_ended_and_the_rest_runs(gpu: SimpleNamespace, tmp_path: Path) -> None:
    def part(name: str, program: str, seconds: float = 5, grace: float = 1, **more: Any) -> Any:
        return gpu.parts.Part(name=name, seconds=seconds, grace=grace, command=[*SAY, program], **more)

    def last_line(name: str) -> Any:
        return lambda folder: gpu.keys.last_line(folder / f"{name}.log")

    begin = time.monotonic()
    parts = [
        part("hangs", HANGS, 2, most=2),
        part("writes", WRITES, 4, 2, most=4, key=last_line("writes")),
        part("stops", WRITES, 4, 2, most=4, ends_by_time=True),
        part("fails", "print('why'); raise SystemExit(3)"),
        gpu.parts.Part(name="no program", seconds=5, command=["/no/such/program"], grace=1),
        part("no figure", "", key=lambda folder: (folder / "nothing").read_text()),
        part("left out", "", why_not="no such thing here"),
        part("good", "print('figure 7')", key=last_line("good")),
    ]
    assert check(gpu, tmp_path, *parts).run() is False
    assert time.monotonic() - begin < 25
    found = stored(tmp_path)
    assert {name: part["status"] for name, part in found.items()} == {
        **{
            "hangs": "timed out",
            "writes": "timed out",
            "stops": "stopped",
            "fails": "failed",
            "no program": "failed",
        },
        **{"no figure": "ok", "left out": "skipped", "good": "ok"},
    }
    assert found["writes"]["key"] == "summary of what was done"  # SIGINT came first, and no SIGTERM
    assert found["fails"]["code"] == 3
    assert "FileNotFoundError" in found["no figure"]["key"]
    assert found["left out"]["key"] == "no such thing here"
    child = int((tmp_path / "work" / "hangs.log").read_text().rpartition("child ")[2])
    assert (
        not Path(f"/proc/{child}").exists()
        or "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
    )
    table = (tmp_path / "gpu_check.txt").read_text()
    assert "figure 7" in table
    assert "8 parts: 2 timed out, 1 stopped, 2 failed, 2 ok, 1 skipped" in table


SANITIZER = """
import sys, time
print("========= COMPUTE-SANITIZER", flush=True)
try:
    print({told!r}, flush=True)
    time.sleep({seconds})
except KeyboardInterrupt:
    print("========= Error: process didn't terminate successfully")
print("========= ERROR SUMMARY: {errors} errors")
sys.exit({code})
"""
INVALID = "========= Invalid __global__ read of size 4 bytes"
RACE = "========= Error: Race reported between Write access at f+0x10 and Read access at f+0x20 [4 hazards]"


def test_errors_that_a_sanitizer_found_are_a_failure_even_at_its_limit(
    gpu: SimpleNamespace, tmp_path: Path
) -> None:
    def part(name: str, told: str = "1 of 12", seconds: float = 600, errors: int = 0, code: int = 0) -> Any:
        program = SANITIZER.format(told=told, seconds=seconds, errors=errors, code=code)
        bad, more = gpu.plan.FOUND_BY_SANITIZER, {"seconds": 4, "grace": 2, "most": 4}
        return gpu.parts.Part(name=name, command=[*SAY, program], ends_by_time=True, bad=bad, **more)

    parts = [
        part("late and clean"),
        part("late with errors", errors=3, code=9),
        part("late in a race", RACE),
        part("clean", seconds=0),
        part("another exit status", INVALID, seconds=0),
    ]
    assert check(gpu, tmp_path, *parts).run() is False
    found = stored(tmp_path)
    assert {name: one["status"] for name, one in found.items()} == {
        "late and clean": "stopped",
        "late with errors": "failed",
        "late in a race": "failed",
        "clean": "ok",
        "another exit status": "failed",
    }
    assert "ERROR SUMMARY: 3 errors" in found["late with errors"]["key"]
    assert INVALID in found["another exit status"]["key"]


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("========= Program hit cudaErrorIllegalAddress (error 700) on CUDA API call to cudaMemcpy", True),
        ("========= ERROR SUMMARY: 10 errors", True),
        ("========= ERROR SUMMARY: 0 errors", False),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", False),
        ("10 of 12: 10 operators on (1, 1, 1, 1)", False),
    ],
)
def test_lines_of_a_sanitizer(gpu: SimpleNamespace, line: str, bad: bool) -> None:
    assert any(re.search(mark, line) for mark in gpu.plan.FOUND_BY_SANITIZER) is bad


def test_sanitized_calls_begin_with_the_largest_packed_shape() -> None:
    numbers = [math.prod(shape) for shape in sanitized_calls.SHAPES]
    assert numbers == sorted(numbers, reverse=True)
    layout, shape = next(sanitized_calls.batches())
    assert shape == sanitized_calls.SHAPES[0]
    assert layout(*shape).is_contiguous()


def test_all_good_parts_are_a_success(gpu: SimpleNamespace, tmp_path: Path) -> None:
    good = gpu.parts.Part(name="good", seconds=8, command=[*SAY, ""])
    program = [*SAY, "print('Device not supported'); raise SystemExit(1)"]
    unable = gpu.parts.Part(name="unable", seconds=8, command=program, unable=("Device not supported",))
    assert check(gpu, tmp_path, good, unable).run() is True
    found = stored(tmp_path)
    assert found["unable"] == found["unable"] | {
        "status": "skipped",
        "key": "this machine cannot run it: Device not supported",
    }


def test_a_check_that_ends_with_a_lost_device_is_a_failure(gpu: SimpleNamespace, tmp_path: Path) -> None:
    """`fastdynat doctor --check` says so with exit status 2; nothing milder runs in its place."""
    lost = gpu.parts.Part(
        name="doctor", seconds=8, command=[*SAY, "print('broke the CUDA context'); raise SystemExit(2)"]
    )
    assert check(gpu, tmp_path, lost).run() is False
    assert stored(tmp_path)["doctor"] == stored(tmp_path)["doctor"] | {"status": "failed", "code": 2}


def test_parts_for_which_no_time_is_left(gpu: SimpleNamespace, tmp_path: Path) -> None:
    last = [gpu.parts.Part(name=n, seconds=s, command=[*SAY, ""]) for n, s in (("own", 10), ("leftover", 0))]
    run = check(gpu, tmp_path, *last)
    run.begin -= 58  # something before overran all
    assert run.run() is False
    assert {name: part["status"] for name, part in stored(tmp_path).items()} == {
        "own": "not run",
        "leftover": "skipped",
    }


def test_results_are_there_after_every_part(gpu: SimpleNamespace, tmp_path: Path) -> None:
    seen = []
    parts = [gpu.parts.Part(name=n, seconds=10, command=[*SAY, ""]) for n in "ab"]
    check(gpu, tmp_path, *parts).run(
        lambda: seen.append([part["status"] for part in stored(tmp_path).values()])
    )
    assert seen == [["ok", "not run"], ["ok", "ok"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_part_and_what_was_done_stands(tmp_path: Path, number: signal.Signals) -> None:
    """Started as a script's background: with SIGINT ignored."""
    script = f"""
import sys
sys.path.append({str(ROOT / "bench")!r})
from pathlib import Path
from gpu.parts import *
stop_at_signals()
folder = Path({str(tmp_path)!r})
commands = {{"a": ["true"], "b": ["sleep", "600"], "c": ["true"]}}
parts = [Part(name=name, seconds=9, command=command) for name, command in commands.items()]
try:
    paths = {{"PATH": "/usr/bin:/bin"}}
    Check("gpu_check", parts, total=60, work=folder, out=folder, cwd=folder, env=paths).run()
except Stopped as stopped:
    print(stopped)
"""
    command = f'trap "" INT; exec {sys.executable} -S -u -c "$1"'
    process = subprocess.Popen(["sh", "-c", command, "sh", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    until = next(line for line in process.stdout if "== b: at most" in line)
    time.sleep(0.3)
    process.send_signal(number)
    assert until
    out, _ = process.communicate(timeout=20)
    assert number.name in out
    assert [part["status"] for part in stored(tmp_path).values()] == ["ok", "interrupted", "not run"]


# The archive


def test_the_archive_keeps_its_limit(gpu: SimpleNamespace, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "parts"
    (folder / "tests").mkdir(parents=True)
    noise = rng.integers(33, 127, 700_000, dtype=np.uint8).tobytes()
    (folder / "big.log").write_bytes(b"first line\n" + noise + b"\nlast line\n")
    (folder / "tests" / "small.log").write_bytes(noise[:150_000])
    (folder / "weights.bin").write_bytes(rng.bytes(600_000))
    (folder / "rows.json").write_text("{}")
    target = tmp_path / "out.tar.gz"
    assert gpu.archive.write_archive(folder, target) == []
    whole = target.stat().st_size
    for limit in (whole - 1, 900_000, 300_000, 80_000):
        words = gpu.archive.write_archive(folder, target, limit)
        assert target.stat().st_size <= limit
        with tarfile.open(target) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
        assert files["rows.json"] == b"{}"  # what is small is never lost
        assert files["cut.txt"].decode().splitlines() == words
        assert words[0].startswith("big.log: ")
        if "big.log" in files:
            assert files["big.log"].startswith(b"first line\n")
            assert files["big.log"].endswith(b"\nlast line\n")
        assert all(
            name in files or f"{name}: not taken" in "".join(words)
            for name in ("weights.bin", "tests/small.log")
        )
    assert "weights.bin" not in files
    with pytest.raises(ValueError, match="nothing fits"):
        gpu.archive.write_archive(folder, target, 10)
    assert target.stat().st_size <= 80_000  # the earlier one stays


def test_weights_are_split_and_join(gpu: SimpleNamespace, tmp_path: Path) -> None:
    whole = os.urandom(1000)
    (tmp_path / "w").write_bytes(whole)
    pieces = gpu.archive.split_file(tmp_path / "w", tmp_path, 400)
    assert [piece.name for piece in pieces] == ["w.0", "w.1", "w.2"]
    assert b"".join(piece.read_bytes() for piece in pieces) == whole


# Tests in processes

TESTS = """
import os, signal, time
import pytest
def test_a_passes(): pass
def test_b_fails(): assert 1 == 2, "one is not two"
def test_c_hangs():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)
def test_d_dies(): os.kill(os.getpid(), signal.SIGSEGV)
@pytest.mark.skip(reason="not here")
def test_e_skipped(): pass
@pytest.mark.parametrize("n", range(6))
def test_f_passes(n): pass
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_g_has_a_broken_fixture(broken): pass
"""


def shards(folder: Path, *files: Path, limit: float = 3) -> list[str]:
    command = [
        sys.executable,
        str(ROOT / "bench" / "gpu" / "shards.py"),
        "--processes",
        "2",
        "--out",
        str(folder / "out"),
    ]
    return [*command, "--test-limit", str(limit), "--expression", "not slow", *map(str, files)]


def test_tests_that_hang_or_crash_keep_no_other_from_running(tmp_path: Path) -> None:
    (tmp_path / "test_these.py").write_text(TESTS)
    (tmp_path / "test_not_imported.py").write_text("import no_such_module\n")
    done = subprocess.run(
        shards(tmp_path, *sorted(tmp_path.glob("test_*.py"))), capture_output=True, text=True, timeout=120
    )
    found = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert done.returncode == 1
    once = {"failed": 1, "hung": 1, "crashed": 1, "skipped": 1, "error": 1, "files not collected": 1}
    assert found["counts"] == {"passed": 7, **once}, done.stdout
    assert found["not_reached"] == 0
    why = {bad["test"].rpartition("::")[2]: bad.get("why", "") for bad in found["bad"]}
    assert "one is not two" in why["test_b_fails"]
    assert why["test_d_dies"] == "signal 11"
    assert "no fixture" in why["test_g_has_a_broken_fixture"]
    assert any("no_such_module" in text for text in why.values())
    assert done.stdout.splitlines()[-1].startswith("7 passed, ")


def test_the_summary_of_tests_stands_when_time_is_up(tmp_path: Path) -> None:
    slow = "".join(f"def test_{name}(): time.sleep(600)\n" for name in "bc")
    (tmp_path / "test_these.py").write_text(f"import time\ndef test_a(): pass\n{slow}")
    process = subprocess.Popen(
        shards(tmp_path, tmp_path / "test_these.py", limit=300), stdout=subprocess.PIPE, text=True
    )
    lines = [tmp_path / "out" / f"tests-{k}.jsonl" for k in range(2)]
    until = time.monotonic() + 60
    while (
        time.monotonic() < until
        and sum(line.read_text().count('"start"') for line in lines if line.exists()) < 3
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    found = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert found["line"] == "1 passed, 2 not reached"
    assert {bad["outcome"] for bad in found["bad"]} == {"running when time was up"}
    assert out.splitlines()[-1] == found["line"]


def test_a_run_without_a_passing_test_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_these.py").write_text("import pytest\n@pytest.mark.skip\ndef test_a(): pass\n")
    done = subprocess.run(
        shards(tmp_path, tmp_path / "test_these.py"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 skipped"


# The pack


def wheel(
    folder: Path, name: str, requires: tuple[str, ...] = (), extra: dict[str, str] | None = None
) -> Path:
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/__init__.py", f"NAME = {name!r}\n")
        lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {r}" for r in requires)]
        archive.writestr(f"{module}-1.0.dist-info/METADATA", "\n".join(lines) + "\n\nAbout.\n")
        for member, text in (extra or {}).items():
            archive.writestr(member, text)
    return path


REQUIRES = {
    "tyro": (
        "docstring-parser>=0.16",
        "eval-type-backport; python_version < '3.10'",
        "typing-extensions>=4",
        "shtab; extra == 'x'",
    ),
    "torchattacks": ("torch>=1.7", "Odd_Name"),
}


@pytest.fixture
def packed(gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack of made-up wheels under real names and of 2 x (12 + 6) images; only the download is replaced."""
    examples = {"pyautoattack": {"pyautoattack/examples/model.pt": "x" * 10_000}}

    def download(name: str, python: str, folder: Path) -> Path:
        return wheel(folder, name, REQUIRES.get(name, ()), examples.get(name, {}))

    monkeypatch.setattr(gpu.wheels, "download", download)
    images = tmp_path / "images"
    for split, count in (("train", 12), ("test", 6)):
        for label in ("ant", "bee"):
            (images / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / split / label / f"{i:04}.jpg")
    gpu.pack.make_pack(tmp_path / "gpu-pack", python="3.12", data=images)
    return tmp_path / "gpu-pack"


def test_the_manifest_is_complete(gpu: SimpleNamespace, packed: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    names = {entry["name"] for entry in manifest["packages"]}
    assert names >= {"tyro", "msgspec", "docstring-parser", "torchattacks", "odd-name", "pyautoattack"}
    assert not names & {"torch", "typing-extensions", "shtab", "eval-type-backport"}
    files = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    told = {f"packages/{e['folder']}/{name}" for e in manifest["packages"] for name in e["files"]}
    told |= {"manifest.json", "cifar10-jpeg.tar.xz"} | ({"_C.abi3.so"} if manifest["extension"] else set())
    assert files == told
    assert "packages/pyautoattack-1.0/pyautoattack/examples/model.pt" not in files
    assert manifest["data"]["images"] == {"train": 24, "test": 12}
    built = (ROOT / "fastdynat" / "_C.abi3.so").is_file()
    missing = [word for word in gpu.pack.check_pack(packed) if built or "_C" not in word]
    assert missing == [word for word in missing if "CUDA half" in word or "sm_90" in word]


def test_what_is_missing_is_said(gpu: SimpleNamespace, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packed / "packages" / "tyro-1.0" / "tyro" / "__init__.py").unlink()
    (packed / "cifar10-jpeg.tar.xz").write_bytes(b"")
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["packages"] = [e for e in manifest["packages"] if e["name"] not in ("msgspec", "odd-name")]
    manifest["extension"] = {"sha256": "0", "sources": "0", "with_cuda": True, "architectures": ["sm_80"]}
    (packed / "manifest.json").write_text(json.dumps(manifest))
    missing = "\n".join(gpu.pack.check_pack(packed, 1000))
    packages = [
        "msgspec (stored documents), without which nothing",
        "tyro: 1 of its files",
        "odd-name, which torchattacks",
    ]
    for part in (*packages, "cifar10-jpeg.tar.xz as it was packed", "of others", "sm_90", "bytes of room"):
        assert part in missing
    assert gpu.pack.check_pack(packed.parent) == [f"{packed.parent} has no manifest.json"]


def test_nobody_elses_folder_is_replaced(gpu: SimpleNamespace, tmp_path: Path, packed: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not made by --pack"):
        gpu.pack.make_pack(tmp_path / "mine", python="3.12", data=None)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    gpu.pack.make_pack(packed, python="3.12", data=None)
    assert json.loads((packed / "manifest.json").read_text())["data"] is None


def test_too_many_images_become_a_balanced_subset(gpu: SimpleNamespace, tmp_path: Path, packed: Path) -> None:
    whole = (packed / "cifar10-jpeg.tar.xz").stat().st_size
    found = gpu.pack._data(tmp_path / "images", tmp_path / "few.tar.xz", whole // 2)
    assert (tmp_path / "few.tar.xz").stat().st_size <= whole // 2
    gpu.unpack.extract_data(tmp_path / "few.tar.xz", tmp_path / "few")
    for split, most in (("train", 12), ("test", 6)):
        ants, bees = (len(list((tmp_path / "few" / split / label).iterdir())) for label in ("ant", "bee"))
        assert 1 <= ants == bees < most
        assert found["images"][split] == ants + bees


# The environment


def test_the_callers_path_is_kept_and_only_what_lacks_is_added(
    gpu: SimpleNamespace, tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed packages are not taken from the pack: all are installed but odd-name, or none is."""
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{mine}:relative")
    monkeypatch.setenv("FASTDYNAT_GPU_PACK", str(packed))
    monkeypatch.setattr(gpu.bare, "take_extension", lambda *a, **k: (False, "no extension"))
    monkeypatch.setattr(gpu.bare, "graphics_card", lambda: "none")
    lacking = ["odd_name", "msgspec"]
    asked: list[dict[str, str]] = []

    def missing(env: dict[str, str], modules: list[str]) -> list[str]:
        asked.append(dict(env))
        return [name for name in modules if name in lacking and len(asked) == 1]

    monkeypatch.setattr(gpu.bare, "missing", missing)
    monkeypatch.setattr(gpu.bare, "look", lambda env, seconds: {"versions": {}})
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with gpu.bare.Bare("cpu", tmp_path) as bare:
        bare.prepare(10)
    entries = bare.env["PYTHONPATH"].split(":")
    assert entries[:3] == [str(ROOT), str(mine), os.path.abspath("relative")]
    assert sorted(Path(entry).name for entry in entries[3:]) == ["msgspec-1.0", "odd-name-1.0"]
    assert any("from gpu-pack: msgspec, odd-name" in word for word in bare.words)
    assert bare.missing == []


def test_a_slow_moment_does_not_hide_what_was_seen(
    gpu: SimpleNamespace, tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch is probed again with the prebuilt extension; if that takes too long, the first probe counts."""
    seen = {"versions": {"torch": "2.11.0", "triton": "3.6.0"}, "python": "3.12.3", "extension_error": "none"}
    looks = iter([seen, {"versions": {}, "torch_error": "importing it took longer than 30 s"}])
    monkeypatch.setenv("FASTDYNAT_GPU_PACK", str(packed))
    monkeypatch.setattr(gpu.bare, "missing", lambda env, modules: [])
    monkeypatch.setattr(gpu.bare, "look", lambda env, seconds: next(looks))
    monkeypatch.setattr(gpu.bare, "take_extension", lambda *a, **k: (True, "taken"))
    (tmp_path / "fastdynat").mkdir()
    (tmp_path / "fastdynat" / "_C.abi3.so").touch()
    monkeypatch.setattr(gpu.bare, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.bare.Bare, "_unpack_data", lambda self: None)
    with gpu.bare.Bare("cpu", tmp_path) as bare:
        bare.prepare(10)
        assert bare.about["software"] == "Python 3.12.3, torch 2.11.0, triton 3.6.0"
        assert bare.why_no_build() == "a built _C.abi3.so is there"  # and no minutes are spent on another
        assert bare.why_no_calls() == ""


def test_compiled_packages_of_another_python_are_not_used(
    gpu: SimpleNamespace, tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDYNAT_GPU_PACK", str(packed))
    monkeypatch.setattr(gpu.bare, "missing", lambda env, modules: ["msgspec"])
    monkeypatch.setattr(gpu.bare, "look", lambda env, seconds: {"versions": {}, "torch_error": "slow"})
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["python"] = "3.99"
    next(e for e in manifest["packages"] if e["name"] == "msgspec")["native"] = True
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with gpu.bare.Bare("cpu", tmp_path) as bare:
        bare.prepare(10)
    assert "msgspec-1.0" not in bare.env["PYTHONPATH"]
    assert any("msgspec was packed for Python 3.99" in word for word in bare.words)
    assert any("fastdynat does not start" in word for word in bare.words)


@needs("ext")
def test_an_extension_that_cannot_be_loaded_is_not_packed(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with CUDA is not called one for CPUs, because the Python at hand has no torch."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: without site-packages
    bare.chmod(0o755)
    monkeypatch.setattr(gpu.pack.sys, "executable", str(bare))
    monkeypatch.setattr(gpu.pack, "sources_newer_than", lambda built: None)
    with pytest.raises(
        ValueError, match=r"No module named 'torch'\): pack with the Python that it was built"
    ):
        gpu.pack._extension(tmp_path)


@pytest.mark.parametrize(
    ("found", "cuda", "taken"),
    [
        ({"extension": {"with_cuda": True}}, True, False),
        ({"extension": {"with_cuda": False}}, False, False),
        ({"extension": {"with_cuda": False}}, True, True),
        ({"extension_error": "ImportError: GLIBC_2.99"}, False, True),
        ({"torch_error": "importing it took longer than 60 s"}, True, False),  # it may well be good
    ],
)
def test_the_prebuilt_extension_takes_the_place_of_one_that_does_not_do(
    gpu: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: dict[str, Any],
    cuda: bool,
    taken: bool,
) -> None:
    (tmp_path / "fastdynat").mkdir()
    own = tmp_path / "fastdynat" / "_C.abi3.so"
    own.write_text("own")
    (tmp_path / "_C.abi3.so").write_text("packed")
    monkeypatch.setattr(gpu.machine, "ROOT", tmp_path)
    sources = {"sources": gpu.machine.extension_sources()}
    took, word = gpu.machine.take_extension(tmp_path, {"extension": sources}, found, cuda=cuda)
    assert (took, own.read_text()) == (taken, "packed" if taken else "own")
    other = gpu.machine.take_extension(
        tmp_path, {"extension": {"sources": "0"}}, {"extension_error": "x"}, cuda=cuda
    )
    assert other == (
        False,
        "fastdynat._C does not load (x), and the prebuilt one is of other sources: pack again",
    )
    assert word


def test_results_name_the_commit_that_was_taken_along(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.machine, "ROOT", tmp_path)  # no git here
    assert gpu.machine.commit(None) == "unknown"
    assert gpu.machine.commit({"commit": "abc", "tree": gpu.machine.tree()}) == "abc"
    assert gpu.machine.commit({"commit": "abc", "tree": "other"}) == "abc-dirty"
    assert gpu.machine.commit({"commit": "abc-dirty", "tree": "other"}) == "abc-dirty"


# Figures


def test_figures_are_those_of_the_files(gpu: SimpleNamespace, tmp_path: Path) -> None:
    results = ROOT / "bench" / "results"
    text = gpu.keys.bench(results / "engine_cpu.json")
    assert "step bf16 compiled 13 images/s" in text
    assert "3.0x released loop in plain PyTorch" in text
    assert "2.1x torchattacks.PGD" in text
    assert "amp 1.68" in text
    document = json.loads((results / "engine_cpu.json").read_text())
    asked = next(
        row
        for row in reversed(document["rows"])
        if row["kind"] == "step" and row["ours"] and not row["switch"]
    )
    document["roofline"] = {"here": {"floor_seconds": {"step": asked["seconds"]["median"] / 4}}}
    (tmp_path / "floor.json").write_text(json.dumps(document))
    assert "25% of the counted floor's rate" in gpu.keys.bench(tmp_path / "floor.json")
    shutil.copy(results / "engine_cpu.json", tmp_path / "stopped.json.partial")
    assert gpu.keys.bench(tmp_path / "stopped.json").startswith("stopped; so far; step bf16 compiled")
    assert gpu.keys.bench(tmp_path / "nothing.json") == "no row"
    assert "pgd_step_linf @ cifar cpp 0.66 of a copy's rate" in gpu.keys.operators(
        results / "operators_cpu.json"
    )
    assert gpu.keys.train(tmp_path / "metrics.jsonl") == "no epoch ended"


# The scripts as a user starts them


def on_cpu(script: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / script), *map(str, arguments)]
    extra = {"FASTDYNAT_GPU_CHECK_DEVICE": "cpu", "MAX_JOBS": "1", "PYTHON": sys.executable} | env
    return subprocess.run(command, env=os.environ | extra, capture_output=True, text=True)


@needs("ext")
def test_the_sanitized_calls_run() -> None:
    script = [
        sys.executable,
        str(ROOT / "tests" / "support" / "sanitized_calls.py"),
        "--on",
        "cpu",
        "cpp",
        "1e9",
    ]
    done = subprocess.run(script, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "clean", done.stderr[-3000:]


def rows(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "time_to_accuracy.json").read_text())


def test_gpu_train_says_how_long_a_target_took(tmp_path: Path) -> None:
    done = on_cpu("gpu_train.sh", tmp_path, "0.01", "--epochs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path)
    assert (found["reached"], found["target"], found["epochs"]) == (True, 0.01, 1)
    assert found["train_seconds"] == pytest.approx(
        sum(row["train_seconds"] for row in found["rows"]), abs=1e-3
    )
    assert found["wall_seconds"] > found["train_seconds"] > 0
    table = json.loads((tmp_path / "gpu_train.json").read_text())
    assert table["rows"] == found["rows"]
    assert {part["name"]: part["status"] for part in table["parts"]}["eval"] == "ok"
    with tarfile.open(tmp_path / "gpu_train.tar.gz") as tar:
        assert {
            "metrics.jsonl",
            "config.yaml",
            "train.log",
            "eval.json",
            "best/model.safetensors",
            "best/model.json",
        } <= set(tar.getnames())
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.slow
def test_gpu_train_goes_on_in_a_second_call(tmp_path: Path) -> None:
    """The first call stops after an epoch without the target; the second one ends the run."""
    place = ("--run-dir", tmp_path / "run")
    first = on_cpu("gpu_train.sh", tmp_path / "a", "1", *place, "--epochs", "3", "--stop-after", "1")
    assert (first.returncode, rows(tmp_path / "a")["epochs"]) == (1, 1), first.stdout + first.stderr
    second = on_cpu("gpu_train.sh", tmp_path / "b", "1", *place)
    found = rows(tmp_path / "b")
    assert (second.returncode, found["epochs"], found["reached"]) == (1, 3, False), (
        second.stdout + second.stderr
    )
    assert found["rows"][0] == rows(tmp_path / "a")["rows"][0]
    assert rows(tmp_path / "a")["wall_seconds"] > 0
    assert (found["continued"], found["wall_seconds"]) == (True, None)
    met = on_cpu("gpu_train.sh", tmp_path / "c", "0.001", *place)
    found = rows(tmp_path / "c")
    assert (met.returncode, found["target"], found["reached"], found["epochs"]) == (0, 0.001, True, 1), (
        met.stdout + met.stderr
    )


def test_a_continued_run_has_no_wall_time_and_the_target_of_its_last_call(
    tmp_path: Path, gpu: SimpleNamespace
) -> None:
    describe = import_module("time_to_accuracy").describe
    values = {"method": "natural", "stop_at": 0.9}
    text = "".join(f"{key}: {value}\n" for key, value in values.items())
    (tmp_path / "config.yaml").write_text(f"# fastdynat run\n{text}")
    (tmp_path / "environment.json").write_text("[]")
    score = method_class("natural").select_by
    epochs = [{"train_seconds": 2.0 + i, score: share} for i, share in enumerate((0.3, 0.5, 0.6))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs))
    found = describe(tmp_path, 0.5, None)
    assert (found["target"], found["reached"], found["epochs"], found["train_seconds"]) == (0.5, True, 2, 5.0)
    assert (found["continued"], found["wall_seconds"]) == (True, None)
    training = gpu.gpu_train.Training(None, tmp_path, tmp_path, tmp_path, "0.5", [])
    training.check = SimpleNamespace(outcomes=[SimpleNamespace(name="train", seconds=7.0)])
    assert training.wall() == []
    fresh = gpu.gpu_train.Training(None, tmp_path / "new", tmp_path, tmp_path, "0.5", [])
    fresh.check = training.check
    assert fresh.wall() == ["--wall", "7.0"]


# A bare machine: these modules are found in a pack only. On the path of every process, if the caller's
# PYTHONPATH is kept.
HIDDEN = (
    "tyro",
    "docstring_parser",
    "typeguard",
    "msgspec",
    "torchattacks",
    "pyautoattack",
    "foolbox",
    "eagerpy",
)
BARE = f"""
import sys
from importlib.machinery import PathFinder
class Hide:
    def find_spec(self, name, path=None, target=None):
        if path is not None or name not in {HIDDEN!r}:
            return None
        spec = PathFinder.find_spec(name, [entry for entry in sys.path if "gpu-pack" in entry])
        if spec is None:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return spec
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.slow
@needs("cxx")
def test_gpu_check_from_a_pack_without_network(tmp_path: Path) -> None:
    """Every part at tiny sizes on the CPU of a bare machine: no packages, where possible no network."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sitecustomize.py").write_text(BARE)
    pack, python = tmp_path / "gpu-pack", f"{sys.version_info.major}.{sys.version_info.minor}"
    made = on_cpu("gpu_check.sh", "--pack", pack, "--python-version", python)
    if "tyro" not in made.stdout.partition("missing")[0]:
        pytest.skip(f"no packages to be had: {made.stdout[-300:]}{made.stderr[-300:]}")
    bare = {
        "PYTHONPATH": str(tmp_path / "mine"),
        "FASTDYNAT_GPU_CHECK_DEVICE": "cpu",
        "FASTDYNAT_GPU_PACK": str(pack),
    }
    env = os.environ | bare | {"PYTHON": sys.executable, "MAX_JOBS": "1"}
    alone = subprocess.run(["unshare", "-n", "true"]).returncode == 0 if shutil.which("unshare") else False
    command = [
        *(["unshare", "-n"] if alone else []),
        "bash",
        str(ROOT / "bench" / "gpu_check.sh"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout
    assert "from gpu-pack: " in done.stdout
    parts = stored(tmp_path / "out")
    assert all(part["status"] in ("ok", "skipped") for part in parts.values())
    assert [name for name, part in parts.items() if part["status"] == "ok"][:3] == [
        "doctor",
        "tests",
        "resnet18-full",
    ]
    archive = tmp_path / "out" / "gpu_check.tar.gz"
    assert archive.stat().st_size < 16 * 2**20
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "all", filter="data")
    for name in ("resnet18-full", "resnet18-switches", "wrn-34-10", "operators", "eval"):
        assert json.loads((tmp_path / "all" / f"{name}.json").read_text())["format"].startswith("fastdynat-")
    names = {row["name"] for row in json.loads((tmp_path / "all" / "resnet18-full.json").read_text())["rows"]}
    assert "released loop in plain PyTorch" in names
