"""What a person sees while a run goes on: a bar on a terminal, one line per epoch anywhere."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TimeRemainingColumn

from fastdynat.terminal.consoles import error_console, plain_column

# Columns of metrics.jsonl by their short names on screen; accuracies in %.
LOSSES = {"loss": "loss", "guide_loss": "guide loss"}
SHARES = {
    "train_acc": "acc",
    "train_adv_acc": "adv acc",
    "train_mixed_acc": "mixed acc",
    "guide_acc": "guide acc",
    "label_agreement": "agree",
}
VALIDATION = {"val_clean_acc": "val clean", "val_pgd10_acc": "val pgd10"}
# Above this share of images without any gradient an attack is no longer one, so it is said.
ZERO_GRADS_SAID = 0.001


def summary(row: Mapping[str, Any]) -> list[str]:
    """The numbers of `row` that a person follows."""
    parts = [f"{short} {row[key]:.3f}" for key, short in LOSSES.items() if row.get(key) is not None]
    parts += [
        f"{short} {100 * row[key]:.1f}"
        for key, short in (SHARES | VALIDATION).items()
        if row.get(key) is not None
    ]
    if (row.get("zero_grad_share") or 0) > ZERO_GRADS_SAID:
        parts.append(f"zero gradients {100 * row['zero_grad_share']:.1f}")
    return parts


class Display:
    """Progress over all epochs with images/s, remaining time, losses and accuracies."""

    def __init__(self, *, total_steps: int, done_steps: int, quiet: bool) -> None:
        self.console, self._quiet = error_console(), quiet
        self._bar = Progress(
            SpinnerColumn(),
            plain_column("{task.description}"),
            BarColumn(bar_width=24),
            plain_column("{task.percentage:>3.0f}%"),
            plain_column("eta"),
            TimeRemainingColumn(),
            plain_column("{task.fields[note]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=total_steps, completed=done_steps, note="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, completed: int, title: str) -> None:
        """Move the bar to `completed` steps."""
        self._bar.update(self._task, completed=completed, description=title)

    def note(self, means: dict[str, float], images_per_s: float) -> None:
        """Refresh the numbers beside the bar."""
        self._bar.update(self._task, note="  ".join([f"{images_per_s:,.0f} img/s", *summary(means)]))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """One line for a finished epoch, unless quiet."""
        if self._quiet:
            return
        parts = [
            f"epoch {row['epoch']:>3}/{epochs}",
            f"lr {row['lr']:.4g}",
            *summary(row),
            f"{row['images_per_s']:,.0f} img/s",
        ]
        self.say("  ".join([*parts, "best"] if row.get("best") else parts))
