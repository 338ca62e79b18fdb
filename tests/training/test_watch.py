"""Early stopping and the collapse of robustness: by numbers, in whole runs, and across a pause."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdynat.commands.main import main
from fastdynat.config import RunConfig
from fastdynat.training import validation
from fastdynat.training.watch import Watch

TINY = [
    "--train-size",
    "60",
    "--val-size",
    "20",
    "--batch-size",
    "30",
    "--steps",
    "1",
    "--epochs",
    "8",
    "--quiet",
]
SCORE = "val_pgd10_acc"


def validated(watch: Watch, robust: float, trained: float | None = None) -> tuple[bool, str | None]:
    return watch.better({SCORE: robust}), watch.collapse(robust, trained)


@given(scores=st.lists(st.integers(0, 20), min_size=1, max_size=30), patience=st.integers(1, 5))
def test_patience_counts_validations_since_the_first_of_the_best(scores: list[int], patience: int) -> None:
    watch = Watch(RunConfig(patience=patience), SCORE)
    for n, score in enumerate(scores, 1):
        better, _ = validated(watch, score / 20)
        best = max(scores[:n])
        assert better == (best not in scores[: n - 1])
        assert (watch.ended() is not None) == (n - 1 - scores.index(best) >= patience)
        copy = Watch(RunConfig(patience=patience), SCORE)
        copy.load_state_dict(json.loads(json.dumps(watch.state_dict())))
        assert (copy.ended(), copy.state_dict()) == (watch.ended(), watch.state_dict())


# Validation PGD accuracy and training accuracy on attacked images, epoch by epoch, and where a collapse is
# said.
COURSES = {
    "fast training overfits": ([0.30, 0.42, 0.02, 0.01], [0.30, 0.40, 0.70, 0.95], [2]),
    "exactly 20 points are none": ([0.60, 0.40], [0.50, 0.60], []),
    "just more are one": ([0.60, 0.39], [0.50, 0.60], [1]),
    "both fall: divergence": ([0.60, 0.10], [0.50, 0.20], []),
    "training accuracy recovers later": ([0.60, 0.30, 0.30], [0.50, 0.40, 0.50], [2]),
    "slowly": ([0.60, 0.50, 0.41, 0.35], [0.5, 0.6, 0.7, 0.8], [3]),
    "twice": ([0.60, 0.10, 0.45, 0.10], [0.5, 0.9, 0.6, 0.9], [1, 3]),
    "no attack in training": ([0.60, 0.10], [None, None], []),
}


@pytest.mark.parametrize("name", COURSES)
def test_a_collapse_is_said_once_where_it_begins(name: str) -> None:
    robust, trained, expected = COURSES[name]
    watch = Watch(RunConfig(on_collapse="stop"), SCORE)
    said = []
    for n, (r, t) in enumerate(zip(robust, trained, strict=True)):
        _, text = validated(watch, r, t)
        assert (text is not None) <= (watch.ended() is not None)
        if text is not None:
            assert f"{100 * r:.1f} %" in text
            assert f"{100 * max(robust[: n + 1]):.1f} %" in text
            said.append(n)
    assert said == expected
    assert Watch(RunConfig(on_collapse="off"), SCORE).collapse(0.9, 0.1) is None


def test_a_run_of_an_earlier_version_keeps_its_references() -> None:
    watch = Watch(RunConfig(), SCORE)
    watch.collapse(0.15, 0.3)
    state = {key: value for key, value in watch.state_dict().items() if not key.startswith("near")}
    resumed = Watch(RunConfig(), SCORE)
    resumed.load_state_dict(state)
    assert resumed.collapse(0.0, 0.9) == watch.collapse(0.0, 0.9) is not None


@pytest.mark.parametrize("mode", ["off", "warn"])
def test_only_stop_stops_and_off_says_nothing(mode: Any) -> None:
    watch = Watch(RunConfig(on_collapse=mode), SCORE)
    found = [validated(watch, r, t)[1] for r, t in ((0.6, 0.5), (0.1, 0.9))]
    assert [text is not None for text in found] == [False, mode == "warn"]
    assert watch.ended() is None


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whole runs whose validations measure what a list says; the rest of them is real."""

    def script(clean: float, *robust: float) -> None:
        it = iter([value for r in robust for value in (clean, r)])

        class Measured:
            def __init__(self) -> None:
                self.accuracy = next(it)

        monkeypatch.setattr(validation, "measure", lambda *args, **kwargs: Measured())

    return script


def train(run: Path, *flags: str) -> list[dict[str, Any]]:
    where = (
        ["--resume", str(run), "--quiet"]
        if run.exists()
        else ["--run-dir", str(run), "--method", "madry", *TINY]
    )
    assert main(["train", *where, *flags]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_out_of_patience_ends_and_more_patience_goes_on(
    tmp_path: Path, scripted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    scripted(0.9, 0.2, 0.5, 0.4, 0.5, 0.3, 0.6, 0.1, 0.1)
    assert len(train(run, "--patience", "2", "--stop-after", "3")) == 3
    assert len(train(run)) == 4  # one of the two had gone before the pause
    assert (
        "ended after 4 epochs: --patience 2 ran out (no validation score above 0.5000)"
        in capsys.readouterr().err
    )
    assert len(train(run)) == 4
    assert (
        len(train(run, "--patience", "4")) == 8
    )  # 0.5 again, 0.3, then a better one, and two worse until the end
    assert json.loads((run / "best" / "model.json").read_text())["epoch"] == 6


def test_a_collapsed_run_stops_and_keeps_its_best(
    tmp_path: Path, scripted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # At this rate the two batches of the first epoch are learnt by the later ones: training accuracy rises.
    flags = ("--on-collapse", "stop", "--eps", "0.01", "--schedule", "constant", "--stop-after", "2")
    scripted(0.9, 0.2, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    rows = train(run, *flags)
    rows = train(run)
    collapsed = next(row["epoch"] for row in rows[2:] if row["train_adv_acc"] >= rows[1]["train_adv_acc"])
    said = capsys.readouterr().err
    assert len(rows) == collapsed < 8
    assert said.count("robustness has collapsed: validation PGD-10 accuracy is 0.0 %, it was 50.0 %") == 1
    assert f"ended after {collapsed} epochs: --on-collapse stop" in said
    assert json.loads((run / "best" / "model.json").read_text())["epoch"] == 2
    rows = train(run, "--on-collapse", "warn")
    assert len(rows) == 8
    assert "warning: robustness has collapsed" not in capsys.readouterr().err  # it has been said


def test_a_stop_at_collapses_needs_a_method_that_can_tell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "dyart", "--on-collapse", "stop"]) == 2
    assert "method dyart logs no accuracy on attacked training images" in capsys.readouterr().err
