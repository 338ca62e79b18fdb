"""Files for the user: through links, into pipes and devices, with the umask's mode."""

import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastdynat.commands.main import main
from fastdynat.commands.report.report_files import ReportFiles
from fastdynat.errors import UserError
from fastdynat.runs import RunDir, check_output, check_writable, claim_name, release_name
from fastdynat.runs.atomic_files import replacing, saving, write_bytes, write_text

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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "far" / "real.json", tmp_path / "near" / "link.json"
    for path in (real, link):
        path.parent.mkdir()
    link.symlink_to("../far/real.json")
    for text in ("first", "second"):  # a target that is not there yet, and one that is
        check_writable(link)
        write_text(link, text)
        assert os.readlink(link) == "../far/real.json"
        assert real.read_text() == text
    with replacing(link) as new:
        assert new.parent == real.parent
        new.write_text("third")
    assert (real.read_text(), link.is_symlink()) == ("third", True)
    assert (names(tmp_path / "far"), names(tmp_path / "near")) == (["real.json"], ["link.json"])


def test_a_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), link):
        check_writable(path)
        write_text(path, "gone")
        with replacing(path) as new:
            new.write_text("gone")
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode)
    assert (before.st_ino, before.st_rdev) == (after.st_ino, after.st_rdev)
    assert link.is_symlink()


def test_a_pipe_waits_for_its_reader_and_the_check_waits_for_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)  # nobody reads
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "x" * 200_000)  # more than a pipe holds
    reader.join(20)
    assert read == ["x" * 200_000]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_a_pipe_that_nobody_reads_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdynat.runs.write_targets.READER_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "pipe", "text")


def test_standard_output_is_written_where_it_stands(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    code = (
        "from fastdynat.runs.atomic_files import *; print('before'); "
        "write_text(Path('/dev/stdout'), 'json\\n'); print('after')"
    )
    with out.open("w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert out.read_text() == "before\njson\nafter\n"


@pytest.mark.parametrize(
    "kind", ["folder", "missing folder", "loop", "long name", "file as folder", "null", "surrogate"]
)
def test_what_cannot_be_written_is_refused_by_the_check_and_by_writing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    paths = {
        "folder": tmp_path,
        "missing folder": tmp_path / "no" / "x.json",
        "loop": tmp_path / "loop",
        "long name": tmp_path / ("x" * 300),
        "file as folder": tmp_path / "file" / "x.json",
        "null": tmp_path / "a\0b",
        "surrogate": tmp_path / "\ud800",
    }
    before = names(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        check_writable(paths[kind])
    with pytest.raises(UserError, match="cannot write"):
        write_text(paths[kind], "text")
    assert names(tmp_path) == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_the_umask_s_mode_and_old_ones_keep_theirs(
    tmp_path: Path, umask: int, mode: int
) -> None:
    old = os.umask(umask)
    try:
        write_bytes(tmp_path / "a", b"")
        with replacing(tmp_path / "b") as new:
            new.unlink()
            new.write_text("")
            new.chmod(0o600)  # as safetensors does
        with saving(tmp_path / "c") as file:
            file.write(b"")
        run = tmp_path / "run"
        assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "1"]) == 0
    finally:
        os.umask(old)
    files = [tmp_path / name for name in "abc"] + [path for path in run.rglob("*") if path.is_file()]
    assert {"model.safetensors", "state.pt", "metrics.csv", "config.yaml"} <= {path.name for path in files}
    assert {str(path): stat.S_IMODE(path.stat().st_mode) for path in files} == {
        str(path): mode for path in files
    }
    (tmp_path / "a").chmod(0o640)
    write_text(tmp_path / "a", "new")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as new:
            new.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (path.read_text(), names(tmp_path)) == ("old", ["x.svg"])


def test_temporary_names_of_others_are_not_used(tmp_path: Path) -> None:
    """Neither the user's `.x.json.tmp` nor a link planted there."""
    (tmp_path / "precious").write_text("mine")
    for name in (".x.json.tmp", ".tmp-x.json"):
        (tmp_path / name).symlink_to("precious")
    write_text(tmp_path / "x.json", "text")
    with replacing(tmp_path / "x.json") as new:
        new.write_text("text")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / ".x.json.tmp").is_symlink()


def test_eval_writes_json_through_a_link_and_into_a_device(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "1"]) == 0
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    flags = ["--attacks", "clean", "--num-images", "20", "--checkpoints", "last"]
    assert main(["eval", str(run), *flags, "--json", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["complete"] is True
    assert main(["eval", str(run), *flags, "--json", "/dev/null"]) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_cache_that_cannot_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "1"]) == 0
    (run / "evaluations").write_text("a file, not a folder")
    capsys.readouterr()
    flags = ["--attacks", "clean,fgsm", "--num-images", "20", "--checkpoints", "last"]
    assert main(["eval", str(run), *flags]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("results are not kept") == 1
    assert "fgsm" in said


def test_a_cache_that_is_a_link_out_of_the_run_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "1"]) == 0
    outside.mkdir()
    (run / "evaluations").symlink_to(outside)
    capsys.readouterr()
    flags = ["--attacks", "clean", "--num-images", "20", "--checkpoints", "last"]
    assert main(["eval", str(run), *flags]) == 0
    assert "".join(capsys.readouterr()).count("is a symbolic link out of the run") == 1
    assert names(outside) == []
    assert main(["eval", str(run), *flags, "--cache", str(outside)]) == 0
    assert len(names(outside)) == 1


def test_processes_that_ask_at_once_get_a_name_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: claim_name("digits-madry", tmp_path / "runs"), range(24)))
    assert len(set(found)) == 24
    assert all(path.is_dir() for path in found)
    assert {path.name for path in found} == {"digits-madry", *(f"digits-madry-{n}" for n in range(2, 25))}
    (found[0] / "mine").touch()
    for path in found:
        release_name(path)
    assert names(tmp_path / "runs") == [found[0].name]


def test_a_report_replaces_and_removes_only_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "images-holiday.png").write_text("mine")
    (tmp_path / "images-7.png").write_text("mine")
    first = ReportFiles(tmp_path, "findings.json")
    for name in ("index.html", "images-1.png", "images-2.png"):
        first.write(name, b"one")
    first.drop_others()
    second = ReportFiles(tmp_path, "findings.json")
    second.write("index.html", b"two")
    (tmp_path / "images-2.png").write_text("retouched by hand")
    second.drop_others()
    visible = [name for name in names(tmp_path) if not name.startswith(".")]
    assert visible == ["images-2.png", "images-7.png", "images-holiday.png", "index.html"]
    (tmp_path / "index.html").write_text("written by hand")
    with pytest.raises(UserError, match="is not this report's"):
        ReportFiles(tmp_path, "findings.json").check(["index.html"])
    assert (tmp_path / "index.html").read_text() == "written by hand"


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.jsonl",
        "environment.json",
        ".lock",
        "last",
        "last/model.safetensors",
        "best/state.pt",
        "link",
    ],
)
def test_results_never_take_the_place_of_a_run_s_own_file(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    opened = RunDir.create(run, "method: madry\n", overwrite=False)
    opened.commit(lambda folder: (folder / "model.safetensors").write_text("weights"), best=True)  # type: ignore[func-returns-value]
    opened.close()
    (run / "last" / "state.pt").write_text("state")
    (run / "link").symlink_to("last/model.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"is a file of the run .*choose another place|Is a directory"):
        check_output(run / name)
    assert main(["eval", str(run), "--attacks", "clean", "--json", str(run / name)]) == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["eval.json", "evaluations/mine.json", "pictures/index.html", "config.json"])
def test_results_may_lie_beside_a_run_s_own_files(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    RunDir.create(run, "method: madry\n", overwrite=False).close()
    (run / name).parent.mkdir(exist_ok=True)
    check_output(run / name)


def test_a_missing_folder_is_named_and_a_path_of_too_many_parts_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"make the folder {tmp_path}/no/such first"):
        check_writable(tmp_path / "no" / "such" / "x.json")
    # Inductor raises the limit to 2000 for good; then the folder can be made, and pytest cannot remove it
    # again.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        assert main(["train", *TINY, "--epochs", "1", "--run-dir", str(tmp_path / ("x/" * 1900))]) == 2
    finally:
        sys.setrecursionlimit(limit)
    assert "too many parts" in capsys.readouterr().err.strip().splitlines()[-1]
    assert names(tmp_path) == []
