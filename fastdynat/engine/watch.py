"""What the validations of a run have shown so far, and whether that ends it."""

from typing import Any

from fastdynat.config import RunConfig

# Fast adversarial training (Wong et al. 2020) stops where PGD accuracy falls by this much: catastrophic overfitting.
COLLAPSE = 0.20


class Watch:
    """The best score, how long it has stood, and whether robustness has collapsed since its best.

    A collapse is validation PGD accuracy more than 20 points below its best so far while the accuracy on the attacked training
    images, an epoch's mean, is not below what it was then: the network has learnt the attack, not robustness. It ends where PGD
    accuracy is back. Without a training accuracy (a method that does not attack) there is none.
    """

    def __init__(self, config: RunConfig, select_by: str) -> None:
        """`select_by`: the column that is the score."""
        self._config, self._select_by = config, select_by
        self.best: float | None = None
        self.stale = 0  # validations since `best`
        self.robust = self.trained = -1.0  # the best PGD accuracy, and the training accuracy of its epoch
        self.collapsed = False

    def better(self, validation: dict[str, float]) -> bool:
        """Take the scores of one validation; whether this is the best so far."""
        score = validation[self._select_by]
        found = self.best is None or score > self.best
        self.best, self.stale = (score, 0) if found else (self.best, self.stale + 1)
        return found

    def collapse(self, robust: float, trained: float | None) -> str | None:
        """Take the PGD accuracy of one validation and its epoch's training accuracy on attacked images.

        Returns what to say where a collapse begins here, unless nobody wants to know.
        """
        if trained is None:
            return None
        if robust > self.robust:
            self.robust, self.trained = robust, trained
        fallen, before = self.robust - robust > COLLAPSE + 1e-9, self.collapsed
        self.collapsed = fallen and (before or trained >= self.trained)
        if before or not self.collapsed or self._config.on_collapse == "off":
            return None
        return (
            f"warning: robustness has collapsed: validation PGD-10 accuracy is {100 * robust:.1f} %, it was "
            f"{100 * self.robust:.1f} %, while accuracy on attacked training images is {100 * trained:.1f} %, it was "
            f"{100 * self.trained:.1f} % (catastrophic overfitting); the best checkpoint is from before"
        )

    def ended(self) -> str | None:
        """Why the run is over before its last epoch; None where it is not."""
        c = self._config
        if c.stop_at is not None and self.best is not None and self.best >= c.stop_at:
            return f"--stop-at {c.stop_at:g} is reached (validation score {self.best:.4f})"
        if c.patience is not None and self.stale >= c.patience:
            return f"--patience {c.patience} is over (no validation score above {self.best:.4f} since)"
        if c.on_collapse == "stop" and self.collapsed:
            return "--on-collapse stop (robustness has collapsed)"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
