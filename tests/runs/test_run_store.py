"""Files that a run directory keeps and removes: only its own, found by manifests, with or without links."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.runs import BEST, LAST, RunDir, find_checkpoint, newest_checkpoint
from fastdynat.runs.find import own_checkpoints
from fastdynat.runs.layout import OWNED
from fastdynat.runs.manifest import check_manifest, read_manifest

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


def fill(text: str) -> Any:
    """A checkpoint's files with `text` in them."""

    def write(folder: Path) -> None:
        for name in ("model.safetensors", "model.json", "state.pt"):
            (folder / name).write_text(f"{name} {text}")

    return write


@contextlib.contextmanager
def opened(path: Path) -> Iterator[RunDir]:
    run = (
        RunDir.open(path)
        if (path / "config.yaml").exists()
        else RunDir.create(path, "method: madry\n", overwrite=False)
    )
    try:
        yield run
    finally:
        run.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints were made, of which the first is the best and the third the newest."""
    path = tmp_path / "run"
    with opened(path) as run:
        for epoch in (1, 2, 3):
            run.commit(fill(str(epoch)), best=epoch == 1, epoch=epoch)
    return path


def tree(path: Path) -> dict[str, Any]:
    """Every file under `path` with its content, and every link with its target; links are not followed."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(path):
        for name in [*folders, *files]:
            place = Path(folder, name)
            key = str(place.relative_to(path))
            if place.is_symlink():
                found[key] = ("link", os.readlink(place))
            elif place.is_file():
                found[key] = place.read_bytes()
            else:
                found[key] = "folder"
    return found


def without_links(path: Path) -> Path:
    for name in (LAST, BEST):
        (path / name).unlink()
    return path


def text_of(folder: Path | None) -> str | None:
    return None if folder is None else (folder / "model.safetensors").read_text()


def test_newest_and_best_are_kept_and_the_state_only_of_the_newest(run: Path) -> None:
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["000001", "000003"]
    assert (os.readlink(run / "last"), os.readlink(run / "best")) == (
        "checkpoints/000003",
        "checkpoints/000001",
    )
    assert (run / "last" / "state.pt").exists()
    assert not (run / "best" / "state.pt").exists()
    origin = read_manifest(run / "checkpoints" / "000003").origin
    assert origin is not None
    assert (origin.folder, origin.order, origin.best, origin.epoch) == ("000003", 3, False, 3)


def strange_things(run: Path, outside: Path) -> None:
    """Foreign files in RUN/checkpoints."""
    store = run / "checkpoints"
    (store / "mine").mkdir()
    (store / "mine" / "thesis.txt").write_text("mine")
    (store / "000777").mkdir()
    (store / "000777" / "weights.bin").write_text("mine")
    (store / "notes.txt").write_text("mine")
    (store / "\u00b2").mkdir()  # a digit to str.isdigit, no number to int
    (store / "\u0663").mkdir()  # an Arabic digit
    (store / ".partial").mkdir()
    (store / ".partial" / "model.py").write_text("mine")
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (store / "000500").symlink_to(outside)
    (store / "elsewhere").symlink_to(outside)
    (store / "dangling").symlink_to(outside / "nothing")
    shutil.copytree(store / "000003", store / "keep")  # the user's own copy of a checkpoint of the run
    shutil.copytree(store / "000003", store / "000600")
    (store / "000003" / "remark.txt").write_text("mine")


def test_nothing_that_is_not_the_runs_own_is_touched(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    strange_things(run, outside)
    before, far = tree(run / "checkpoints"), tree(outside)
    with opened(run) as open_run:
        open_run.adopt()
        for epoch in (4, 5):
            open_run.commit(fill(str(epoch)), best=True, epoch=epoch)
    after = tree(run / "checkpoints")
    assert tree(outside) == far
    own = {key for key in before if key.split("/")[0] in ("000001", "000003")} - {
        "000003",
        "000003/remark.txt",
    }
    assert {key: value for key, value in before.items() if key not in own} == {
        key: value for key, value in after.items() if key in before and key not in own
    }
    assert own & after.keys() <= {"000003/checkpoint.json"}
    assert text_of(find_checkpoint(run, LAST)) == "model.safetensors 5"
    assert [c.folder.name for c in own_checkpoints(run)][-1] == "000779"


def test_overwriting_keeps_what_is_not_the_runs_own(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    strange_things(run, outside)
    (run / "evaluations").symlink_to(outside)
    (run / "boundary").mkdir()
    (run / "boundary" / "epoch-0001.npz").write_text("the run's")
    (run / "boundary" / "plot.svg").write_text("mine")
    (run / "my.txt").write_text("mine")
    before, far = tree(run), tree(outside)
    new = RunDir.create(run, "method: madry\n", overwrite=True)
    new.close()
    after = tree(run)
    assert tree(outside) == far
    assert not (run / "evaluations").is_symlink()
    mine = {key for key, value in before.items() if value in (b"mine", ("link", str(outside)))} - {
        "evaluations"
    }
    assert mine <= after.keys()
    assert {"checkpoints/000001", "boundary/epoch-0001.npz", "last", "best"}.isdisjoint(after)
    kept = {str(path.relative_to(run)) for path in new.kept}
    assert {"checkpoints/mine", "checkpoints/keep", "checkpoints/notes.txt", "boundary/plot.svg"} <= kept
    assert newest_checkpoint(run) is None
    with opened(run) as open_run:
        open_run.commit(fill("new"), best=True, epoch=1)
    assert text_of(find_checkpoint(run, BEST)) == "model.safetensors new"


@pytest.mark.parametrize("name", [n for n in OWNED if n not in (LAST, BEST, "evaluations")])
def test_a_link_out_of_the_run_is_neither_followed_nor_removed(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if "." in name:
        outside.write_text("precious")
    else:
        outside.mkdir()
        (outside / "000001").mkdir()
        (outside / "000001" / "precious").write_text("mine")
    if name == "checkpoints":
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"{name} is a symbolic link out of the run"):
        RunDir.open(run)
    assert tree(tmp_path) == before
    RunDir.create(run, "method: madry\n", overwrite=True).close()
    assert not (run / name).is_symlink()
    assert (
        outside.read_text() == "precious" if outside.is_file() else (outside / "000001" / "precious").exists()
    )


@pytest.mark.parametrize("name", [LAST, BEST])
def test_a_user_s_link_or_folder_in_the_place_of_ours_stays(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / name).unlink()
    (run / name).symlink_to(outside)
    with opened(run) as open_run:
        open_run.adopt()
        open_run.commit(fill("4"), best=True, epoch=4)
    assert os.readlink(run / name) == str(outside)
    assert list(outside.iterdir()) == []
    assert text_of(find_checkpoint(run, name)) == "model.safetensors 4"
    (run / name).unlink()
    (run / name).mkdir()
    (run / name / "mine").write_text("mine")
    with opened(run) as open_run:
        open_run.adopt()
        open_run.commit(fill("5"), best=True, epoch=5)
    assert (run / name / "mine").read_text() == "mine"


def test_the_lock_and_the_probe_write_through_nothing(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match="not the lock file"):
        RunDir.open(run)
    (run / ".lock").unlink()
    (run / ".probe").write_text("mine")
    from fastdynat.runs import check_new

    check_new(run, overwrite=True)
    assert (precious.read_text(), (run / ".probe").read_text()) == ("mine", "mine")


def test_a_manifest_that_names_files_outside_removes_nothing(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "run" / "checkpoints" / "precious"
    precious.write_text("mine")
    manifest = run / "checkpoints" / "000001" / "checkpoint.json"
    document = json.loads(manifest.read_text())
    document["sha256"]["../precious"] = "0" * 64
    manifest.write_text(json.dumps(document))
    with opened(run) as open_run:
        open_run.commit(fill("4"), best=True, epoch=4)
    assert precious.exists()


def test_a_file_that_was_changed_is_not_removed_with_its_checkpoint(run: Path) -> None:
    changed = run / "checkpoints" / "000001" / "model.safetensors"
    changed.write_text("fine-tuned by hand")
    os.utime(changed, (4e9, 4e9))
    with opened(run) as open_run:
        open_run.commit(fill("4"), best=True, epoch=4)
    assert changed.read_text() == "fine-tuned by hand"
    assert not (changed.parent / "model.json").exists()


def test_what_a_kill_left_half_written_is_removed(run: Path) -> None:
    with opened(run) as open_run:
        partial = open_run.checkpoints._partial
    partial.mkdir()
    (partial / "model.safetensors").write_text("hal")
    leftover, fresh, foreign = (
        run / name for name in (".fastdynat-0123456789ab.csv", ".fastdynat-0123456789ac", ".fastdynat-x")
    )
    for path in (leftover, fresh, foreign):
        path.write_text("half")
    os.utime(leftover, (1e9, 1e9))
    os.utime(foreign, (1e9, 1e9))
    with opened(run):
        assert not partial.exists()
    assert (leftover.exists(), fresh.exists(), foreign.exists()) == (False, True, True)


def test_a_write_that_fails_leaves_the_checkpoints_before(run: Path) -> None:
    before = tree(run)

    def fails(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with opened(run) as open_run:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                open_run.commit(fails, best=True, epoch=4)
    assert tree(run) == before


@pytest.mark.parametrize("how", ["gone", "text", "empty", "copied", "only the copies"])
def test_newest_and_best_do_not_need_links(run: Path, how: str) -> None:
    targets = {name: os.readlink(run / name) for name in (LAST, BEST)}
    without_links(run)
    for name, target in targets.items():
        if how in ("text", "empty"):
            (run / name).write_text(target if how == "text" else "")
        if how in ("copied", "only the copies"):
            shutil.copytree(run / target, run / name)
    if how == "only the copies":
        shutil.rmtree(run / "checkpoints")
    for _ in range(2):  # before it is opened, and after
        assert text_of(find_checkpoint(run, LAST)) == "model.safetensors 3"
        assert text_of(find_checkpoint(run, BEST)) == "model.safetensors 1"
        newest = newest_checkpoint(run)
        assert newest is not None
        check_manifest(newest)
        with opened(run) as open_run:
            open_run.adopt()
            open_run.checkpoints.link()
    assert (run / "last").is_symlink()
    assert (run / "best").is_symlink()
    with opened(run) as open_run:
        open_run.commit(fill("4"), best=True, epoch=4)
    assert text_of(run / "best") == "model.safetensors 4"
    assert len(own_checkpoints(run)) == 1


def test_links_that_cannot_be_made_are_done_without(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(run)

    def refused(self: Path, target: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    with opened(run) as open_run:
        open_run.commit(fill("4"), best=False, epoch=4)
    assert not (run / "last").exists()
    assert text_of(find_checkpoint(run, LAST)) == "model.safetensors 4"
    assert text_of(find_checkpoint(run, BEST)) == "model.safetensors 1"


def as_before(run: Path) -> Path:
    """The run as an earlier version left it: manifests and configuration without the run's id."""
    for checkpoint in own_checkpoints(run):
        manifest = checkpoint.folder / "checkpoint.json"
        document = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({key: document[key] for key in ("format", "sha256")}))
    config = run / "config.yaml"
    config.write_text(
        "".join(line for line in config.read_text().splitlines(keepends=True) if not line.startswith("# id"))
    )
    return run


@pytest.mark.parametrize("links", [True, False])
def test_a_run_of_an_earlier_version_goes_on(run: Path, links: bool) -> None:
    as_before(run)
    if not links:
        without_links(run)
    (run / "checkpoints" / "mine").mkdir()
    assert text_of(find_checkpoint(run, LAST)) == "model.safetensors 3"
    assert text_of(find_checkpoint(run, BEST)) == "model.safetensors 1"
    with opened(run) as open_run:
        open_run.adopt()
        open_run.rewrite_config("method: madry\n")
        open_run.commit(fill("4"), best=False, epoch=4)
    assert (text_of(run / "last"), text_of(run / "best")) == ("model.safetensors 4", "model.safetensors 1")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["000001", "000004", "mine"]


def test_a_damaged_newer_checkpoint_is_not_passed_over(run: Path) -> None:
    without_links(run)
    (run / "checkpoints" / "000003" / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match=r"000003/checkpoint\.json is not JSON"):
        newest_checkpoint(run)
    shutil.rmtree(run / "checkpoints" / "000003")
    assert text_of(newest_checkpoint(run)) == "model.safetensors 1"  # its state is gone, which resuming says


def rows(run: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after two of four epochs."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--run-dir", str(path), *TINY, "--epochs", "4", "--stop-after", "2"]) == 0
    return path


@pytest.fixture
def paused(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "paused", symlinks=True))


def test_a_run_without_links_resumes_exactly_and_is_evaluated(paused: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(paused, tmp_path / "other", symlinks=True))
    without_links(paused)
    (paused / "checkpoints" / "mine").mkdir()
    assert main(["eval", str(paused), "--attacks", "clean", "--num-images", "20", "--cache", "off"]) == 0
    assert main(["export", str(paused), "--out", str(tmp_path / "net.pt2"), "--format", "torch"]) == 0
    for run in (paused, other):
        assert main(["train", "--resume", str(run), "--quiet"]) == 0
        assert rows(run) == [1, 2, 3, 4]
    left, right = (load_file(run / "last" / "model.safetensors") for run in (paused, other))
    assert all(bool((left[key] == right[key]).all()) for key in left)
    assert (paused / "checkpoints" / "mine").is_dir()


def test_rows_without_their_checkpoint_are_refused_and_kept(
    paused: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_links(paused)
    shutil.move(paused / "checkpoints", paused.parent / "checkpoints")
    before = tree(paused)
    assert main(["train", "--resume", str(paused)]) == 2
    assert "has rows up to epoch 2, but there is no complete checkpoint" in capsys.readouterr().err
    assert {k: v for k, v in tree(paused).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_an_older_checkpoint_than_the_rows_is_refused(
    paused: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (paused / "metrics.jsonl").read_text().splitlines(keepends=True)
    (paused / "metrics.jsonl").write_text("".join([*lines, lines[-1].replace('"epoch": 2', '"epoch": 3')]))
    assert main(["train", "--resume", str(paused)]) == 2
    assert (
        "has rows up to epoch 3, but the newest complete checkpoint is of epoch 2" in capsys.readouterr().err
    )
    assert len(rows(paused)) == 3


def test_a_row_that_a_kill_kept_from_the_metrics_comes_from_the_checkpoint(paused: Path) -> None:
    lines = (paused / "metrics.jsonl").read_text().splitlines(keepends=True)
    (paused / "metrics.jsonl").write_text(lines[0])
    assert main(["train", "--resume", str(paused), "--quiet", "--stop-after", "3"]) == 0
    assert rows(paused) == [1, 2, 3]
    assert (paused / "metrics.jsonl").read_text().splitlines(keepends=True)[:2] == lines


def test_fewer_epochs_than_were_trained_are_refused(paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (paused / "config.yaml").read_bytes(), (paused / "environment.json").read_bytes()
    for epochs in ("1", "2"):
        assert main(["train", "--resume", str(paused), "--epochs", epochs]) == 2
        assert "has already trained 2 epochs: --epochs must be >= 3 to go on" in capsys.readouterr().err
    assert ((paused / "config.yaml").read_bytes(), (paused / "environment.json").read_bytes()) == before


@pytest.mark.parametrize(
    ("schedule", "said"), [("constant", "with --epochs 2 or more"), ("cosine", "start a new run")]
)
def test_a_finished_run_says_so_and_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: str, said: str
) -> None:
    path = tmp_path / "run"
    assert main(["train", "--run-dir", str(path), *TINY, "--epochs", "1", "--schedule", schedule]) == 0
    before = tree(path)
    capsys.readouterr()
    assert main(["train", "--resume", str(path)]) == 0
    spoken = capsys.readouterr().err
    assert "is finished after 1 epochs" in spoken
    assert said in spoken
    assert "resuming" not in spoken
    assert tree(path) == before


@pytest.mark.parametrize("link", [LAST, "checkpoints/000003"])
def test_a_checkpoint_that_the_user_moved_and_linked_stays_where_it_is(run: Path, link: str) -> None:
    (run / "checkpoints" / "000003").rename(run / "keep")
    if link == LAST:
        (run / LAST).unlink()
        (run / LAST).symlink_to("keep")
    else:
        (run / link).symlink_to("../keep")
    before = tree(run / "keep")
    with opened(run) as open_run:
        open_run.adopt()
        assert text_of(find_checkpoint(run, LAST)) == "model.safetensors 3"
        check_manifest(find_checkpoint(run, LAST) or run)
        for epoch in (4, 5):
            open_run.commit(fill(str(epoch)), best=True, epoch=epoch)
    assert tree(run / "keep") == before
    assert text_of(find_checkpoint(run, LAST)) == "model.safetensors 5"


def test_other_data_is_refused_before_it_is_looked_for(
    paused: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(paused), "--data", "cifar10", "--data-dir", "/nowhere"]) == 2
    assert "data is digits in this run, not cifar10" in capsys.readouterr().err
