"""Progress bars and lines."""

import io

import pytest
from rich.console import Console

from fastdynat.terminal import progress
from fastdynat.terminal.consoles import error_console
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.terminal.training_progress import summary


def test_a_dynat_epoch_on_one_line_of_a_terminal() -> None:
    row = {
        "loss": 2.5129,
        "guide_loss": 1.0289,
        "train_adv_acc": 0.121,
        "guide_acc": 0.838,
        "label_agreement": 0.838,
    }
    row |= {"zero_grad_share": 0.0, "val_clean_acc": 0.403, "val_pgd10_acc": 0.25}
    expected = (
        "loss 2.513  guide loss 1.029  adv acc 12.1  guide acc 83.8  agree 83.8  val "
        "clean 40.3  val pgd10 25.0"
    )
    assert "  ".join(summary(row)) == expected


def test_images_without_a_gradient_are_said() -> None:
    assert "zero gradients 4.5" in summary({"loss": 1.0, "zero_grad_share": 0.045})
    assert summary({"loss": 1.0, "train_acc": 0.5, "val_clean_acc": None}) == ["loss 1.000", "acc 50.0"]


def test_lines_tell_the_remaining_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with ProgressDisplay(error_console()).task("run last pgd20", 1000, unit="images") as task:
        for seconds, images in ((10, 50.0), (25, 50.0), (10, 0.5), (60, 149.5), (500, 750.0)):
            clock[0] += seconds
            task.advance(images)
    # 100 images in 35 s, then 250 in 105 s; the last images need no line.
    assert capsys.readouterr().err.splitlines() == [
        "run last pgd20: 100 of 1,000 images, about 5 min left",
        "run last pgd20: 250 of 1,000 images, about 5 min left",
    ]
    assert [progress.duration(s) for s in (5.2, 60, 7500)] == ["5 s", "1 min", "2 h 05 min"]


def test_a_bar_follows_the_images_of_one_attack() -> None:
    display = ProgressDisplay(Console(file=io.StringIO(), force_terminal=True, width=100))
    with display.task("pgd20", 10) as task:
        task.advance(2.5)
        (bar,) = display._bars.tasks
        assert (bar.description, bar.completed, bar.total) == ("pgd20", 2.5, 10)
        task.update(completed=4, title="validation", note="5 img/s")
        assert (bar.description, bar.completed, bar.fields["note"]) == ("validation", 4, "5 img/s")
        display.line("above the bar")
    assert display._bars.tasks == []
    assert "above the bar" in display.console.file.getvalue()  # type: ignore[attr-defined]


def test_quiet_progress_shows_nothing() -> None:
    display = ProgressDisplay(Console(file=io.StringIO(), force_terminal=True, width=100), quiet=True)
    with display.task("pgd20", 10, unit="images") as task:
        task.advance(5)
        display.line("half")
    assert display.console.file.getvalue() == ""  # type: ignore[attr-defined]
