"""Early stopping and its warnings: best score, collapsed robustness, accuracy at chance."""

from math import sqrt
from typing import Any

from fastdynat.config import RunConfig

# Fall of PGD accuracy at which fast adversarial training (Wong et al. 2020) stops: catastrophic overfitting.
COLLAPSE = 0.20
# For a network that never had 20 points to lose: next to none are left, while it beats the training attack.
NONE_LEFT, RISE, APART = 0.02, 0.20, 0.30
PATIENCE_AT_CHANCE = 3  # validations


class Watch:
    """The best score, how long it has stood, and whether robustness has collapsed since its best.

    Robustness has collapsed where validation PGD accuracy is more than 20 points below its best while
    accuracy on attacked training images (the epoch's mean) is not below its value then: the network has
    learnt the attack, not robustness. It has also collapsed where PGD accuracy is at most 2 %, was higher,
    and accuracy on attacked training images has risen by 20 points to 30 points above it. A collapse ends
    where PGD accuracy is back. A method that logs no accuracy on attacked images never collapses."""

    def __init__(self, config: RunConfig, select_by: str) -> None:
        """select_by: the column of the score."""
        self._config, self._select_by = config, select_by
        self.best: float | None = None
        self.stale = 0  # validations since `best`
        self.robust = self.trained = -1.0  # the best PGD accuracy, and the training accuracy of its epoch
        self.near_robust = self.near_trained = -1.0  # the same of the comparable epochs
        self.collapsed = False
        self.guessing, self.guessing_said = 0, False  # validations in a row at chance

    def better(self, validation: dict[str, float]) -> bool:
        """Record the scores of one validation. Returns whether they are the best so far."""
        score = validation[self._select_by]
        found = self.best is None or score > self.best
        self.best, self.stale = (score, 0) if found else (self.best, self.stale + 1)
        return found

    def collapse(self, robust: float, trained: float | None, *, comparable: bool = True) -> str | None:
        """Record the PGD accuracy of one validation, and its epoch's accuracy on attacked training images.

        Returns the warning where a collapse begins, unless --on-collapse is off.

        Args:
            comparable: validation attacked at about the radius of training, not at a far larger one, which no
                network withstands.
        """
        if trained is None:
            return None
        if robust > self.robust:
            self.robust, self.trained = robust, trained
        if comparable and robust > self.near_robust:
            self.near_robust, self.near_trained = robust, trained
        low = self.robust - robust > COLLAPSE + 1e-9
        gone = comparable and robust <= NONE_LEFT and robust < self.near_robust
        fell = low and trained >= self.trained
        vanished = gone and trained >= self.near_trained + RISE and trained >= robust + APART
        before, self.collapsed = self.collapsed, (low or gone) if self.collapsed else (fell or vanished)
        if before or not self.collapsed or self._config.on_collapse == "off":
            return None
        best, its = (self.robust, self.trained) if fell else (self.near_robust, self.near_trained)
        return (
            f"robustness has collapsed: validation PGD-10 accuracy is {100 * robust:.1f} %, it was "
            f"{100 * best:.1f} %, while accuracy on attacked training images is {100 * trained:.1f} "
            f"%, it was {100 * its:.1f} % (catastrophic overfitting); the best checkpoint is from before"
        )

    def at_chance(self, clean: float, chance: float, images: int) -> str | None:
        """Record the clean accuracy of one validation.

        Returns the warning, once, where it has been no better than guessing for three validations in a row.

        Args:
            chance: share of the most frequent class.
            images: number of validation images.
        """
        self.guessing = self.guessing + 1 if clean <= chance + 2 * sqrt(chance * (1 - chance) / images) else 0
        if self.guessing != PATIENCE_AT_CHANCE or self.guessing_said:
            return None
        self.guessing_said = True
        return (
            f"clean validation accuracy is {100 * clean:.1f} %, no better than guessing "
            f"({100 * chance:.1f} %), for {PATIENCE_AT_CHANCE} validations: the network learns nothing. "
            "Common reasons: --eps too large for the data, --lr far too small or too large"
        )

    def ended(self) -> str | None:
        """The reason to end the run before its last epoch; None to go on."""
        c = self._config
        if c.stop_at is not None and self.best is not None and self.best >= c.stop_at:
            return f"--stop-at {c.stop_at:g} is reached (validation score {self.best:.4f})"
        if c.patience is not None and self.stale >= c.patience:
            return f"--patience {c.patience} ran out (no validation score above {self.best:.4f})"
        if c.on_collapse == "stop" and self.collapsed:
            return "--on-collapse stop (robustness has collapsed)"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # States of earlier versions do not tell comparable epochs from others.
        vars(self).update({"near_robust": state["robust"], "near_trained": state["trained"]} | state)
