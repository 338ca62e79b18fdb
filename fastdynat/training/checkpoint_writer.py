"""Checkpoints of a run: copied in the training thread, written to the disk in the background."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdynat.data import DatasetInfo
from fastdynat.runs import STATE, RunDir
from fastdynat.training.background_writer import BackgroundWriter
from fastdynat.training.metrics import MetricsLog
from fastdynat.training.networks import NetworkSet
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.training_state import snapshot, write_training_state
from fastdynat.training.weight_files import weights_now, write_weights


class RunWriter(BackgroundWriter):
    """A writer of what a run keeps: checkpoints, and the rows of finished epochs."""

    @abstractmethod
    def save(
        self,
        state: dict[str, Any],
        *,
        validated: Mapping[str, float],
        best: bool,
        row: dict[str, Any] | None,
    ) -> None:
        """Begin to write a checkpoint of this moment."""

    @abstractmethod
    def restore_metrics(self, epochs: int, row: dict[str, Any] | None) -> None:
        """Bring the rows in line with a checkpoint: `MetricsLog.restore`."""

    @abstractmethod
    def close(self) -> None:
        """Finish the files of a run that has ended."""


class Unwritten(RunWriter):
    """Of the processes that do not write the run: keeps nothing."""

    def save(self, state: dict[str, Any], **about: Any) -> None:
        """Do nothing."""

    def restore_metrics(self, epochs: int, row: dict[str, Any] | None) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class CheckpointWriter(RunWriter):
    """Adds checkpoints, and the rows of finished epochs, to a run directory."""

    def __init__(
        self, run: RunDir, networks: NetworkSet, config: ResolvedConfig[Any], info: DatasetInfo
    ) -> None:
        super().__init__()
        self._run, self._networks, self._config, self._info = run, networks, config, info
        self._metrics = MetricsLog(run.path, tensorboard=config.run.tensorboard)

    def restore_metrics(self, epochs: int, row: dict[str, Any] | None) -> None:
        self._metrics.restore(epochs, row)

    def close(self) -> None:
        self._metrics.close()

    def save(
        self,
        state: dict[str, Any],
        *,
        validated: Mapping[str, float],
        best: bool,
        row: dict[str, Any] | None,
    ) -> None:
        """Copy weights and `state` (`Trainer.state_dict`), and begin to write them as a checkpoint.

        Args:
            validated: scores of the deployed network with these very weights, or empty.
            best: this is the best checkpoint so far.
            row: the row of the epoch that has ended; None inside an epoch.

        Raises:
            WriteError: the checkpoint before could not be written.
        """
        self.wait()  # before the copies are made: a slow disk keeps one set of them in memory, not two
        epoch, epoch_step = state["epoch"], state["epoch_step"]
        weights = weights_now(self._networks, self._config, self._info, epoch=epoch, validated=validated)
        copied = snapshot(state)

        def write_files(folder: Path) -> None:
            write_weights(folder, weights)
            write_training_state(folder / STATE, copied)

        def write() -> None:
            self._run.commit(write_files, best=best, epoch=epoch, epoch_step=epoch_step)
            # After the checkpoint, which holds the row too: metrics that are ahead of every checkpoint mean
            # that one is missing.
            if row is not None:
                self._metrics.append(row)

        self.submit(write)
