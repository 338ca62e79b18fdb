"""What a person sees while a run goes on: a bar on a terminal, one line per epoch anywhere."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

SHOWN = ("loss", "guide_loss", "train_acc", "train_adv_acc", "guide_acc", "label_agreement")


def error_console() -> Console:
    """Standard error, so that standard output stays for results; wide enough for whole lines when it is not a terminal."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=240)


class Display:
    """Progress over all epochs with images/s, remaining time, losses and accuracies."""

    def __init__(self, *, total_steps: int, done_steps: int, quiet: bool) -> None:
        self.console, self._quiet = error_console(), quiet
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=total_steps, completed=done_steps, note="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def step(self, completed: int, title: str) -> None:
        """Move the bar to `completed` steps."""
        self._bar.update(self._task, completed=completed, description=title)

    def note(self, means: dict[str, float], images_per_s: float) -> None:
        """Refresh the numbers beside the bar."""
        numbers = "  ".join(f"{key.removeprefix('train_')} {means[key]:.3f}" for key in SHOWN if key in means)
        self._bar.update(self._task, note=f"{images_per_s:,.0f} img/s  {numbers}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """One line for a finished epoch, unless quiet."""
        if self._quiet:
            return
        parts = [f"epoch {row['epoch']:>3}/{epochs}", f"lr {row['lr']:.4g}"]
        parts += [f"{key.removeprefix('train_')} {row[key]:.3f}" for key in SHOWN if row.get(key) is not None]
        if row.get("val_clean_acc") is not None:
            parts.append(f"val clean {row['val_clean_acc']:.3f} pgd10 {row['val_pgd10_acc']:.3f}")
        parts.append(f"{row['images_per_s']:,.0f} img/s")
        if row.get("best"):
            parts.append("best")
        self.say("  ".join(parts))
