"""Unexpected files, names and shortages: refused at once in one line, and nothing is changed."""

import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastdynat.commands import main as cli
from fastdynat.commands.main import main
from fastdynat.commands.report import run_records as records
from fastdynat.commands.report.report_files import RECORD, ReportFiles
from fastdynat.documents.tensor_files import read_safetensors
from fastdynat.errors import UserError, one_line, shortage
from fastdynat.machine import free_memory as room
from fastdynat.models import build, build_model
from fastdynat.runs import RunDir, check_new, check_results, find_checkpoint, looks_like_run
from fastdynat.runs.atomic_files import write_text
from fastdynat.runs.find import identity_of
from fastdynat.runs.layout import BEST, LAST
from fastdynat.runs.manifest import check_manifest, sha256
from fastdynat.runs.metrics_rows import read_rows

OUTSIDE = {"pipe": os.mkfifo, "loop": lambda p: p.symlink_to(p.name), "other": lambda p: None}
FILES, FOLDERS = (
    ("environment.json", "metrics.jsonl", "metrics.csv"),
    ("boundary", "tensorboard", "checkpoints"),
)


def new_run(path: Path, checkpoints: int = 0) -> Path:
    """A run with checkpoints, all but the last the best when they were written."""
    run = RunDir.create(path, "method: natural\n", overwrite=False)
    for number in range(checkpoints):
        run.commit(
            lambda folder, n=number: (folder / "state.pt").write_text(str(n)) and None,
            best=number < checkpoints - 1,
        )  # type: ignore[misc]
    run.close()
    return path


def spoil(path: Path, how: str, *, is_folder: bool) -> None:
    """Put something at `path` that is neither file nor folder; "other": a folder for a file, or reverse."""
    if how != "other":
        OUTSIDE[how](path)
    elif is_folder:
        path.write_text("mine")
    else:
        path.mkdir()


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_what_training_could_not_write_is_refused_before_it_begins(
    name: str, how: str, tmp_path: Path
) -> None:
    run = new_run(tmp_path / "run")
    spoil(run / name, how, is_folder=name in FOLDERS)
    before = sorted((p.name, p.lstat().st_mode) for p in run.iterdir())
    with pytest.raises(UserError, match=rf"{name} is not a (file|folder), as a run has there; move it away$"):
        RunDir.open(run)
    if how == "other":
        with pytest.raises(UserError, match=rf"{name} is not a (file|folder)"):
            check_new(run, overwrite=True)
    assert sorted((p.name, p.lstat().st_mode) for p in run.iterdir()) == before


def test_a_pipe_for_a_configuration_is_no_run_and_nothing_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "config.yaml")
    begin = time.monotonic()
    assert not looks_like_run(tmp_path / "run")
    for command in ("eval", "report", "export", "boundary"):
        assert (
            main([command, str(tmp_path / "run"), *(["--out", "x.pt"] if command == "export" else [])]) == 2
        )
        assert "is not a run directory" in capsys.readouterr().err
    assert time.monotonic() - begin < 20


def test_a_stray_truncate_is_seen_before_the_file_is_read(tmp_path: Path) -> None:
    folder = find_checkpoint(new_run(tmp_path / "run", 1), LAST)
    assert folder is not None
    os.truncate(folder / "state.pt", 1 << 40)
    with pytest.raises(
        UserError, match=r"state.pt is damaged: 1,099,511,627,776 bytes, nearly all of which were never"
    ):
        check_manifest(folder)
    (tmp_path / "small").write_bytes(b"abc")
    assert sha256(tmp_path / "small") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_best_and_last_without_links_and_without_the_id(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", 3)
    best, last, identity = find_checkpoint(run, BEST), find_checkpoint(run, LAST), identity_of(run)
    assert best is not None
    assert best != last
    (run / BEST).unlink()
    (run / LAST).unlink()
    config = run / "config.yaml"
    config.write_text(
        "".join(line for line in config.read_text().splitlines(keepends=True) if not line.startswith("# id:"))
    )
    assert (find_checkpoint(run, BEST), find_checkpoint(run, LAST), identity_of(run)) == (
        best,
        last,
        identity,
    )
    opened = RunDir.open(run)  # and a resume goes on under the same id
    opened.rewrite_config("method: natural\n")
    opened.close()
    assert identity_of(run) == identity
    assert f"# id: {identity}" in config.read_text()


@pytest.mark.parametrize("epochs", [(1, 2, 1, 2), (1, 1), (2, 1)])
def test_rows_that_are_twice_or_out_of_order(epochs: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"epoch": epoch, "train_seconds": 1.0}) + "\n" for epoch in epochs))
    with pytest.raises(UserError, match=r"line \d: epoch 1 follows epoch \d: .*move it away"):
        read_rows(path)
    path.write_text("".join(json.dumps({"epoch": epoch, "train_seconds": 1.0}) + "\n" for epoch in (1, 2, 4)))
    assert [row["epoch"] for row in read_rows(path)] == [1, 2, 4]


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_report_does_not_wait_for_its_record(how: str, tmp_path: Path) -> None:
    spoil(tmp_path / RECORD, how, is_folder=False)
    with pytest.raises(UserError, match="is not a file, as a report's record must be"):
        ReportFiles(tmp_path, "findings.json").check(["index.html"])


def test_a_file_that_no_report_wrote_is_not_read_whole(tmp_path: Path) -> None:
    files = ReportFiles(tmp_path, "findings.json")
    files.write("index.html", b"page")
    os.truncate(tmp_path / "index.html", 1 << 40)
    with pytest.raises(UserError, match="is not this report's"):
        ReportFiles(tmp_path, "findings.json").check(["index.html"])


def test_a_pipe_without_a_reader_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("fastdynat.runs.write_targets.READER_SECONDS", 1.0)
    os.mkfifo(tmp_path / "p")
    with pytest.raises(UserError, match="nothing reads this pipe; start its reader first"):
        write_text(tmp_path / "p", "x")
    assert "is a pipe that nothing reads; waiting 1 s" in capsys.readouterr().err
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "p").read_text()))
    reader.start()
    write_text(tmp_path / "p", "x")
    reader.join(20)
    assert found == ["x"]


@pytest.mark.parametrize(
    "name", ["wrn-100000-1000", "wrn-1000000-1", "wrn-10-99999999", "wrn-994-100", "wrn-99999999999994-1"]
)
def test_wide_networks_that_no_memory_holds(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"{name}: (depth must be at most 1000|choose a smaller one; its weights alone take)"
    ):
        build_model(name, num_classes=10, image_shape=(3, 32, 32))


def test_the_weights_of_a_wide_network_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("wrn-16-4", num_classes=10, image_shape=(3, 32, 32))
    held = sum(p.nbytes for p in model.parameters())
    for share, fits in ((0.9, False), (1.1, True)):
        monkeypatch.setattr(room, "available_memory", lambda share=share: int(share * held))
        if fits:
            build_model("wrn-16-4", num_classes=10, image_shape=(3, 32, 32))
        else:
            with pytest.raises(UserError, match="its weights alone take"):
                build_model("wrn-16-4", num_classes=10, image_shape=(3, 32, 32))


@pytest.mark.parametrize(
    ("name", "fits"), [("small", True), ("resnet18", False), ("torchvision:resnet18", False)]
)
def test_large_images_are_counted_not_computed(
    name: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 4 << 30)
    begin = time.process_time()
    if fits:
        build_model(name, num_classes=10, image_shape=(3, 1024, 1024))
    else:
        with pytest.raises(
            UserError, match=r"at 3x4096x4096 images: choose a smaller --image-size; two take [\d.]+ GiB"
        ):
            build_model(name, num_classes=10, image_shape=(3, 4096, 4096))
    assert time.process_time() - begin < 15
    assert not isinstance(
        build.look(build_model("small", num_classes=2, image_shape=(1, 8, 8)), torch.zeros(1, 1, 8, 8)), str
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--run-dir", "a\0b"], "--run-dir has a NUL character: 'a\\x00b'"),
        (["train", "--data-dir=a\0b"], "--data-dir has a NUL character: '--data-dir=a\\x00b'"),
        (["eval", "\ud800"], "an argument is not valid text: '\\ud800'"),
        (["\0"], "an argument has a NUL character: '\\x00'"),
        (["eval", "no\nrun"], "no run at no\\nrun"),
        (["report", "a\x1b[31m\u2028b"], "no run at a\\x1b[31m\\u2028b"),
        (["export", "caf\udce9", "--out", "x.pt"], "no run at caf\\udce9"),
    ],
)
def test_words_of_a_command(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == f"fastdynat: error: {message}\n"


def test_one_line_keeps_other_text() -> None:
    assert one_line("é 日本 😀 'a' \\n") == "é 日本 😀 'a' \\n"


def _allocate() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


SHORTAGES: list[tuple[Callable[[], Any], str]] = [
    (
        _allocate,
        r"out of memory \(1125899906842624 bytes more were asked for\): in train, add --grad-accum-steps 2",
    ),
    (lambda: bytearray(1 << 62), "out of memory: in train, add"),
    (lambda: _throw(RuntimeError("can't start new thread")), "no more threads"),
    (
        lambda: _throw(TimeoutError("Lock error:\n  remove this file:\n /x.lock")),
        "Lock error: remove this file: /x.lock",
    ),
    (
        lambda: _throw(OSError("Matplotlib requires access to a writable cache directory")),
        "Matplotlib requires access",
    ),
    (lambda: _throw(OSError(28, "No space left on device", "/x")), "/x: No space left on device"),
]


def _throw(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(("fail", "message"), SHORTAGES)
def test_shortages_are_one_line(
    fail: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda argv: fail())
    assert main(["report"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", lambda argv: _throw(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["report"])
    assert shortage(RuntimeError("a defect")) is None


TEXTS = {"new.json": None, "old.json": '{"format": "x"}', "old.txt": "old", "empty.png": ""}
NO_TEXTS = {
    "w.pt": b"PK\3\4\0",
    "net.py": "import torch",
    "c.yaml": "lr: 0.1",
    "a.png": b"\x89PNG\r\n",
    "b.json": b"%PDF-1.4",
}
PICTURES = {
    "new.svg": None,
    "old.svg": "<svg/>",
    "old.png": b"\x89PNG\r\n",
    "old.pdf": b"%PDF-1.4",
    "empty.png": "",
    "p.json": "{}",
}
NO_PICTURES = {"a.png": "text", "b.svg": b"\x89PNG\r\n", "c.pdf": "x", "d.svg": b"a\0b"}
EXISTING = [
    *((name, content, "texts", True) for name, content in TEXTS.items()),
    *((name, content, "texts", False) for name, content in NO_TEXTS.items()),
    *((name, content, "pictures", True) for name, content in PICTURES.items()),
    *((name, content, "pictures", False) for name, content in NO_PICTURES.items()),
]


@pytest.mark.parametrize(("name", "content", "kind", "good"), EXISTING)
def test_what_results_may_replace(
    name: str, content: str | bytes | None, kind: str, good: bool, tmp_path: Path
) -> None:
    path, given = tmp_path / name, {kind: (None, str(tmp_path / name))}
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    if good:
        check_results(**given)
    else:
        with pytest.raises(UserError, match="exists and does not hold results: choose another place"):
            check_results(**given)
    assert not path.exists() if content is None else path.read_bytes() in (content, str(content).encode())


def test_results_that_would_replace_what_is_read_or_each_other(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("weights")
    (tmp_path / "link").symlink_to("w")
    with pytest.raises(UserError, match="link is an input of this command, which would overwrite it"):
        check_results((str(tmp_path / "link"),), inputs=(None, tmp_path / "w"))
    with pytest.raises(UserError, match="is given for two results"):
        check_results((str(tmp_path / "a.json"), None, f"{tmp_path}/./a.json"))
    check_results(("/dev/null", "/dev/null"), inputs=("/dev/null",))


def test_measurements_are_files_of_the_run(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    (run / "evaluations").mkdir()
    with pytest.raises(UserError, match="is a file of the run"):
        check_results((str(run / "evaluations" / "clean-0123456789abcdef.json"),))
    check_results((str(run / "evaluations" / "mine.json"),))


def test_a_report_on_a_run_that_trains_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path / "run", 1)
    asked: list[Path] = []

    def read(path: Path) -> tuple[str, str]:
        asked.append(path.parent)
        if len(asked) == 1:  # a newer checkpoint takes its place
            again = RunDir.open(run)
            again.commit(lambda folder: (folder / "state.pt").write_text("new") and None, best=True)  # type: ignore[misc]
            again.close()
            raise UserError("gone")
        return "sidecar", "sha256"

    monkeypatch.setattr(records, "read_sidecar", read)
    assert [(folder.name, links) for folder, links, *_ in records._sidecars(run)] == [
        ("000002", ["best", "last"])
    ]
    monkeypatch.setattr(records, "read_sidecar", lambda path: _throw(UserError("damaged")))
    with pytest.raises(UserError, match="damaged"):
        records._sidecars(run)


def test_weights_under_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    save_file({"a": torch.arange(3.0)}, folder / "w.safetensors")
    assert read_safetensors(folder / "w.safetensors")["a"].tolist() == [0, 1, 2]
