"""The training loop: epochs, validation, checkpoints, log, stopping and going on."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from fastdynat.attack_engine.steps import usual_step
from fastdynat.attacks import parse_attack
from fastdynat.data import DatasetInfo, ImageSet
from fastdynat.errors import UserError
from fastdynat.evaluation import KeptReplica, Stopped, measure
from fastdynat.models.finite import not_numbers
from fastdynat.runs import STATE, RunDir
from fastdynat.terminal.stop_request import StopRequest
from fastdynat.terminal.training_progress import TrainingProgress
from fastdynat.training.average_share import MOSTLY, average_note, first_share
from fastdynat.training.background_writer import BackgroundWriter
from fastdynat.training.epoch_checks import boundary_columns, fidelity_columns
from fastdynat.training.metrics import Averages, MetricsLog
from fastdynat.training.parts import RunParts
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.rng import rng_state, set_rng_state
from fastdynat.training.schedules import average_warmup, epochs_of_method
from fastdynat.training.state import identity, snapshot, write_state
from fastdynat.training.step import TrainStep
from fastdynat.training.watch import Watch
from fastdynat.training.weight_files import weights_now, write_weights

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0  # between looks at the device's running averages, each of which waits for it


class Diverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.fit` ended: all epochs done or `Watch.ended`, or stopped early by `signal` (None: by
    --stop-after).
    """

    finished: bool
    signal: Signals | None = None


class Trainer:
    """One run in one run directory. `config` is resolved."""

    def __init__(
        self,
        config: ResolvedConfig[Any],
        info: DatasetInfo,
        val: ImageSet,
        parts: RunParts,
        run: RunDir,
        burn_in: TrainStep | None = None,
    ) -> None:
        """`burn_in`: the step of the first epochs, before that of `parts`."""
        self.config, self.info, self.val, self.run = config, info, val, run
        self.networks, step, self.loader = parts
        self.step, self._method_step = burn_in or step, step
        self.device = torch.device(config.engine.device)
        self.metrics = MetricsLog(run.path, tensorboard=config.run.tensorboard)
        self._restart_average()
        self.epoch, self.epoch_step = 0, 0  # epochs completed, steps done in the one at hand
        self.averages, self.seconds = Averages(), 0.0
        near = config.attack.eval_eps <= 1.5 * config.attack.eps
        self.watch = Watch(config.run, step.method.select_by, comparable=near)
        self._writer, self._validated = BackgroundWriter(), KeptReplica()
        self.last_validation: dict[str, float] = {}
        self.row: dict[str, Any] | None = None  # of the last finished epoch

    def finished(self) -> bool:
        """Whether all epochs are done, or `Watch.ended`."""
        epochs = self.config.optim.epochs
        return self.epoch >= epochs or self.watch.ended() is not None

    def fit(self) -> Outcome:
        """Train until the last epoch, `Watch.ended`, --stop-after, or a signal; everything is saved when it
        returns.

        Raises:
            Diverged: the loss is not finite; the last checkpoint is from before.
            WriteError: a checkpoint or the metrics could not be written; the checkpoints before are
                untouched.
        """
        epochs = self.config.optim.epochs
        until = min(epochs, self.config.run.stop_after or epochs)
        spe = self.loader.steps_per_epoch
        done = self.epoch * spe + self.epoch_step
        with (
            StopRequest() as stop,
            TrainingProgress.shown(
                total_steps=until * spe, done_steps=done, quiet=self.config.run.quiet
            ) as progress,
            self._writer,
        ):
            self._log_average()
            while self.epoch < until and not self.watch.ended():
                try:
                    self._train_epoch(stop, progress)
                    self._finish_epoch(stop, progress, epochs)
                except Stopped:
                    self._save(best=False)
                    return Outcome(False, stop.signal)
        self.metrics.close()
        return Outcome(self.finished(), stop.signal)

    def _burning_in(self) -> bool:
        return self.step is not self._method_step

    def _restart_average(self) -> None:
        optim = self.config.optim
        if self.networks.ema is not None:
            epochs = optim.burn_in if self._burning_in() else epochs_of_method(optim)
            self.networks.ema.restart(warmup=average_warmup(optim, epochs, self.loader.steps_per_epoch))

    def _log_average(self) -> None:
        """Before the first step, warn of a weight average that will still be mostly the initial weights."""
        if self.networks.ema is None or self.step.global_step > 0:
            return
        optim, spe = self.config.optim, self.loader.steps_per_epoch
        epochs = epochs_of_method(optim)
        warmup = average_warmup(optim, epochs, spe)
        note = average_note(self.networks.ema.decay, warmup=warmup, epochs=epochs, steps_per_epoch=spe)
        if note is not None:
            logger.warning(note)

    def _begin_method(self) -> None:
        """Go from the burn-in to the method, which has an optimiser and a weight average of its own."""
        self._method_step.global_step = self.step.global_step
        self.step = self._method_step
        self._restart_average()

    def _end_burn_in(self) -> None:
        """Let the method start, if this is where, from the weight average of the burn-in."""
        if not self._burning_in() or self.epoch < self.config.optim.burn_in:
            return
        averaged = self.networks.ema is not None
        if averaged:  # in place: captured steps and the attack's replica read the same memory
            self.networks.raw["model"].load_state_dict(self.networks.deployed().state_dict())
        self._begin_method()
        begun = f"{self.step.method.name} starts from its {'weight average' if averaged else 'weights'}, with a fresh optimiser"
        logger.info("burn-in is over after %d epochs: %s", self.epoch, begun)

    def _train_epoch(self, stop: StopRequest, progress: TrainingProgress) -> None:
        if self.config.data.loader == "torch":
            self._writer.wait()  # its workers are forked, which another thread had better not be in the middle of
        saved = refreshed = begin = time.perf_counter()
        seconds_before, images = self.seconds, 0
        self.step.start_epoch(max(0, self.epoch - self.config.optim.burn_in))
        for batch in self.loader.epoch(self.epoch, self.epoch_step):
            self.averages.add(self.step(batch), len(batch.labels))
            images += len(batch.labels)
            self.epoch_step += 1
            now = time.perf_counter()
            progress.step(
                self.epoch * self.loader.steps_per_epoch + self.epoch_step, f"epoch {self.epoch + 1}"
            )
            if now - refreshed > REFRESH_SECONDS:
                refreshed = now
                rate = images / (now - begin)
                progress.note(self._finite_means(), rate)
            self.seconds = seconds_before + now - begin
            self._writer.check()
            if stop.requested():
                raise Stopped
            if (
                now - saved > 60 * self.config.run.save_every
                and self.epoch_step < self.loader.steps_per_epoch
            ):
                self._save(best=False)
                saved = time.perf_counter()
        self._finite_means()  # waits for the device, so that the clock stops after the work
        self.seconds = seconds_before + time.perf_counter() - begin

    def _last_lr(self) -> float:
        return self.step.learning_rate(max(self.step.global_step - 1, 0))

    def _finite_means(self) -> dict[str, float]:
        means = self.averages.means()
        bad = [key for key, value in means.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"{bad[0]} is {means[bad[0]]} in epoch {self.epoch + 1} (lr {self._last_lr():g})")
        return means

    def _finish_epoch(self, stop: StopRequest, progress: TrainingProgress, epochs: int) -> None:
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "global_step": self.step.global_step,
            "lr": self._last_lr(),
        }
        row |= self._finite_means()
        row |= {
            "train_seconds": round(self.seconds, 3),
            "images_per_s": round(self.averages.images / self.seconds, 1),
        }
        due = (self.epoch + 1) % self.config.run.val_every == 0 or self.epoch + 1 == epochs
        row |= self._validate(stop, progress, due=due, trained=row.get("train_adv_acc"))
        row |= self._more_columns() if due else {}
        self.epoch, self.epoch_step = self.epoch + 1, 0
        self.averages, self.seconds = Averages(), 0.0
        self.row = row
        progress.epoch(row, epochs)
        # Until the method has weights to choose from, best follows last: naturally trained ones are never
        # chosen by a score.
        follows = self._burning_in()
        self._end_burn_in()
        self._save(best=row["best"] or follows, row=dict(row))

    def _validate(
        self, stop: StopRequest, progress: TrainingProgress, *, due: bool, trained: float | None
    ) -> dict[str, Any]:
        """Validation columns of the epoch's row. `trained`: the epoch's accuracy on attacked training images,
        if it has one.
        """
        if len(self.val) == 0:
            return {"best": True}  # nothing to select by, so best follows last
        if not due:
            self.last_validation = {}
            return {"val_clean_acc": None, "val_pgd10_acc": None, "best": False}
        accuracies = {}
        attack, eps = self.config.attack, self.config.attack.eval_eps
        for name in ("clean", "pgd10"):
            progress.step(self.epoch * self.loader.steps_per_epoch + self.epoch_step, f"validating {name}")
            accuracies[name] = measure(
                self.networks.deployed(),
                self.val,
                parse_attack(name, eps=eps, step_size=usual_step(attack.norm, eps), norm=attack.norm),
                device=self.device,
                batch_size=self.config.data.eval_batch_size,
                seed=self.config.engine.seed,
                channels_last=self.config.engine.channels_last == "on",
                winograd=self.config.engine.winograd != "off",
                kept=self._validated,
                should_stop=stop.requested,
            ).accuracy
        self.last_validation = {"val_clean_acc": accuracies["clean"], "val_pgd10_acc": accuracies["pgd10"]}
        if self._burning_in():
            return {**self.last_validation, "best": False}
        collapse = self.watch.collapse(accuracies["pgd10"], trained)
        for text in (collapse, self._at_chance(accuracies["clean"])):
            if text is not None:
                logger.warning(text)
        return {**self.last_validation, "best": self.watch.better(self.last_validation)}

    def _at_chance(self, clean: float) -> str | None:
        """What to say of a clean accuracy like that of guessing, unless it is that of an average which has
        hardly begun.
        """
        ema = self.networks.ema
        if ema is not None and first_share(ema.decay, warmup=ema.warmup, updates=ema.updates) > MOSTLY:
            return None
        most = int(torch.bincount(self.val.labels).max())
        return self.watch.at_chance(clean, most / len(self.val), len(self.val))

    def _more_columns(self) -> dict[str, float | bool | None]:
        fidelity = fidelity_columns(self.config, self.networks, self.step.spec, self.val)
        return {
            **fidelity,
            **boundary_columns(self.config, self.step, self.val, self.run.path, self.epoch + 1),
        }

    def _save(self, *, best: bool, row: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of this moment, and the `row` of the epoch that has ended, beside the training
        that goes on.
        """
        self._finite_means()  # a checkpoint never holds weights that are no longer numbers
        for module in self.networks.raw.values():
            if problem := not_numbers(module):  # the last update may have made them so, after its loss
                raise Diverged(f"{problem} after epoch {self.epoch}")
        self._writer.wait()  # before the copies are made: a slow disk holds one set of them in memory, not two
        # Inside an epoch the weights are no longer those that were validated.
        validated = self.last_validation if self.epoch_step == 0 else {}
        weights = weights_now(self.networks, self.config, self.info, epoch=self.epoch, validated=validated)
        state, epoch, epoch_step = snapshot(self.state_dict()), self.epoch, self.epoch_step

        def write_checkpoint(folder: Path) -> None:
            write_weights(folder, weights)
            write_state(folder / STATE, state)

        def write() -> None:
            self.run.commit(write_checkpoint, best=best, epoch=epoch, epoch_step=epoch_step)
            # After the checkpoint, which holds the row too: metrics that are ahead of all checkpoints mean
            # that one is missing.
            if row is not None:
                self.metrics.append(row)

        self._writer.submit(write)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed beside the weights to go on bit for bit; tensors and plain values only."""
        ema = self.networks.ema
        return {
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "global_step": self.step.global_step,
            "optimizers": [optimizer.state_dict() for optimizer in self.step.optimizers],
            "scaler": self.step.precision.scaler.state_dict(),
            "ema_updates": None if ema is None else ema.updates,
            "rng": rng_state(),
            "loader": self.loader.state_dict(),
            "averages": self.averages.state_dict(),
            "method": self.step.method.buffers,
            "seconds": self.seconds,
            "watch": self.watch.state_dict(),
            "last_validation": self.last_validation,
            "row": self.row,
            "config": identity(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back `state_dict`; the weights are loaded separately.

        Raises:
            UserError: the state is another run's, or the training images are not this run's.
        """
        for key, value in identity(self.config).items():
            # A state from before there was such an option knows nothing of it; the run's config.yaml was
            # checked already.
            if state["config"].get(key, value) != value:
                raise UserError(
                    f"the training state is another run's: {key} is {state['config'][key]!r}, here {value!r}"
                )
        self.loader.load_state_dict(state["loader"])
        self.epoch, self.epoch_step = state["epoch"], state["epoch_step"]
        if self.epoch >= self.config.optim.burn_in:
            self._begin_method()
        self.step.global_step = state["global_step"]
        for optimizer, saved in zip(self.step.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step.precision.scaler.load_state_dict(state["scaler"])
        if self.networks.ema is not None:
            self.networks.ema.updates = state["ema_updates"]
        for name, tensor in self.step.method.buffers.items():
            tensor.copy_(state["method"][name])
        self.averages.load_state_dict(state["averages"], self.device)
        self.seconds, self.last_validation = state["seconds"], state["last_validation"]
        self.watch.load_state_dict(state["watch"])
        set_rng_state(state["rng"])
        self.row = state.get("row")
        self.metrics.restore(self.epoch, self.row)
