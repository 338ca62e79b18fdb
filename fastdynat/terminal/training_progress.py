"""Progress of a training run: a bar on a terminal, one line per epoch anywhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastdynat.terminal.consoles import error_console
from fastdynat.terminal.progress import ProgressDisplay, ProgressTask

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
# Above this share of images with zero gradients the attack is weakened, so the line shows it.
ZERO_GRADS_SHOWN = 0.001


def summary(row: Mapping[str, Any]) -> list[str]:
    """The losses and accuracies of `row`, in words."""
    parts = [f"{short} {row[key]:.3f}" for key, short in LOSSES.items() if row.get(key) is not None]
    parts += [
        f"{short} {100 * row[key]:.1f}"
        for key, short in (SHARES | VALIDATION).items()
        if row.get(key) is not None
    ]
    if (row.get("zero_grad_share") or 0) > ZERO_GRADS_SHOWN:
        parts.append(f"zero gradients {100 * row['zero_grad_share']:.1f}")
    return parts


class TrainingProgress:
    """A bar over all epochs with images/s, remaining time, losses and accuracies; a line per epoch."""

    def __init__(self, display: ProgressDisplay, task: ProgressTask) -> None:
        self._display, self._task = display, task

    @classmethod
    @contextmanager
    def shown(cls, *, total_steps: int, done_steps: int, quiet: bool) -> Iterator["TrainingProgress"]:
        """The progress of a run on standard error; a quiet one shows nothing."""
        display = ProgressDisplay(error_console(), quiet=quiet)
        with display.task("starting", total_steps, completed=done_steps) as task:
            yield cls(display, task)

    def step(self, completed: int, title: str) -> None:
        """Move the bar to `completed` steps."""
        self._task.update(completed=completed, title=title)

    def note(self, means: dict[str, float], images_per_s: float) -> None:
        """Refresh the numbers behind the bar."""
        self._task.update(note="  ".join([f"{images_per_s:,.0f} img/s", *summary(means)]))

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Print the line of a finished epoch."""
        parts = [
            f"epoch {row['epoch']:>3}/{epochs}",
            f"lr {row['lr']:.4g}",
            *summary(row),
            f"{row['images_per_s']:,.0f} img/s",
        ]
        self._display.line("  ".join([*parts, "best"] if row.get("best") else parts))
