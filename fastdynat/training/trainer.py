"""The training loop: epochs, validation, checkpoints and stopping."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastdynat.data import DatasetInfo, Images
from fastdynat.distributed import apart, world
from fastdynat.errors import UserError
from fastdynat.evaluation import Stopped
from fastdynat.models.finite import not_numbers
from fastdynat.runs import RunDir, SeenRun
from fastdynat.terminal.stop_request import StopRequest, request_stop
from fastdynat.terminal.training_progress import TrainingProgress
from fastdynat.training.average_share import run_average_note
from fastdynat.training.checkpoint_writer import CheckpointWriter, RunWriter, Unwritten
from fastdynat.training.epoch_checks import boundary_columns, fidelity_columns
from fastdynat.training.fit_outcome import Diverged, Outcome
from fastdynat.training.method_buffers import load_buffers, rows_per_image, whole_buffers
from fastdynat.training.metrics import Averages
from fastdynat.training.optimizers import load_optimizer_state, optimizer_state
from fastdynat.training.parts import RunParts
from fastdynat.training.rank_weights import require_equal_weights
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.rng import rng_state, set_rng_state
from fastdynat.training.run_average import RunAverage
from fastdynat.training.step import TrainStep
from fastdynat.training.step_agreement import StepAgreement, stop_of_any_rank
from fastdynat.training.training_state import fixed_settings
from fastdynat.training.validation import Validation
from fastdynat.training.watch import Watch

logger = logging.getLogger(__name__)
LONG = 10.0  # seconds of a first update from which they are logged


class Trainer:
    """One run in one run directory.

    Several processes train it together: all of them make every decision alike, and the first one writes.

    Attributes:
        world: the processes.
        epoch: completed epochs.
        epoch_step: updates done in the epoch after them.
        averages, seconds: means over this process's part of that epoch so far, and the time it took.
        first_update_seconds: from the start of this process's first epoch to the end of the first update,
            which compiles and captures; None before.
        row: the metrics of the last completed epoch.
        last_validation: the deployed network's scores after the last epoch; empty if not validated.
    """

    def __init__(
        self,
        config: ResolvedConfig[Any],
        info: DatasetInfo,
        val: Images,
        parts: RunParts,
        run: RunDir | SeenRun,
        burn_in: TrainStep | None = None,
    ) -> None:
        """
        Args:
            run: a `RunDir` in the process that writes it.
            burn_in: the step of the first epochs, before that of `parts`.
        """
        self.world = world()
        self.config, self.info, self.val, self.run = config, info, val, run
        self.networks, step, self.loader = parts
        self.step, self._method_step = burn_in or step, step
        self.device = torch.device(config.engine.device)
        self._average = RunAverage(config.optim, self.networks, self.loader)
        self._average.restart(burning_in=self._burning_in())
        self.epoch, self.epoch_step = 0, 0
        self.averages, self.seconds = Averages(), 0.0
        self.first_update_seconds: float | None = None
        self.watch = Watch(config.run, step.method.select_by)
        self._validation = Validation(config, self.networks, val)
        self._writer: RunWriter = Unwritten()
        if isinstance(run, RunDir):
            self._writer = CheckpointWriter(run, self.networks, config, info)
        self._together = StepAgreement(self.world)
        self._per_image = rows_per_image(step.method, info.image_shape)
        self.last_validation: dict[str, float] = {}
        self.row: dict[str, Any] | None = None

    def finished(self) -> bool:
        """True if all epochs are done, or `Watch.ended`."""
        return self.epoch >= self.config.optim.epochs or self.watch.ended() is not None

    def fit(self) -> Outcome:
        """Train until the last epoch, `Watch.ended`, --stop-after, or a signal, and save everything.

        Raises:
            Diverged: the loss is not finite; the last checkpoint is from before.
            WriteError: a checkpoint or the metrics could not be written; earlier checkpoints are untouched.
        """
        epochs = self.config.optim.epochs
        until = min(epochs, self.config.run.stop_after or epochs)
        steps = {"total_steps": until * self.loader.steps_per_epoch, "done_steps": self._steps_done()}
        quiet = self.config.run.quiet or not self.world.first
        shown = TrainingProgress.shown(**steps, quiet=quiet)
        with StopRequest() as stop, shown as progress, self._writer, self._graphs():
            self._warn_of_average()
            while self.epoch < until and not self.watch.ended():
                try:
                    self._train_epoch(stop, progress)
                    self._finish_epoch(stop, progress, epochs)
                except Stopped:
                    self._save(best=False)
                    return Outcome(False, stop.signal)
        self._writer.close()
        early = self.watch.ended() if self.epoch < epochs else None
        return Outcome(self.finished(), stop.signal, early)

    @contextmanager
    def _graphs(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.step.release()

    def _steps_done(self) -> int:
        """Updates since the start of the run."""
        return self.epoch * self.loader.steps_per_epoch + self.epoch_step

    def _burning_in(self) -> bool:
        return self.step is not self._method_step

    def _warn_of_average(self) -> None:
        """Before the first step, warn of a weight average that will still be mostly the initial weights."""
        if self.networks.ema is None or self.step.global_step > 0:
            return
        note = run_average_note(self.config.optim, self.loader.steps_per_epoch)
        if note is not None:
            logger.warning(note)

    def _begin_method(self) -> None:
        """Switch from the burn-in to the method, with a new optimiser and weight average."""
        self.step.release()
        self._method_step.global_step = self.step.global_step
        self.step = self._method_step
        self._average.restart(burning_in=False)

    def _end_burn_in(self) -> None:
        """Start the method after the last epoch of the burn-in, from the burn-in's weight average."""
        if not self._burning_in() or self.epoch < self.config.optim.burn_in:
            return
        averaged = self.networks.ema is not None
        if averaged:  # in place: captured steps and the attack's replica read the same memory
            self.networks.raw["model"].load_state_dict(self.networks.deployed().state_dict())
        self._begin_method()
        logger.info(
            "burn-in is over after %d epochs: %s starts from its %s, with a fresh optimiser",
            self.epoch,
            self.step.method.name,
            "weight average" if averaged else "weights",
        )

    def _train_epoch(self, stop: StopRequest, progress: TrainingProgress) -> None:
        if self.config.data.loader == "torch":
            self._writer.wait()  # its workers are forked, which is not safe while another thread writes
        saved = begin = time.perf_counter()
        seconds_before, images = self.seconds, 0
        self.step.start_epoch(max(0, self.epoch - self.config.optim.burn_in), self.epoch_step)
        for batch in self.loader.epoch(self.epoch, self.epoch_step):
            self.averages.add(self.step(batch), batch.share.images / batch.share.copies)
            images += batch.share.total
            self.epoch_step += 1
            progress.step(self._steps_done(), f"epoch {self.epoch + 1}")
            decided = self._together.after_step(stop.signal, self._save_is_due(saved))
            now = time.perf_counter()
            if self.first_update_seconds is None:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self.first_update_seconds = time.perf_counter() - begin
                if self.first_update_seconds > LONG and self.config.engine.compile != "off":
                    logger.info(
                        "the first update took %.0f s, compilation and its checks included",
                        self.first_update_seconds,
                    )
            if decided.look:
                progress.note(self._finite_means(), images / (now - begin))
            self.seconds = seconds_before + now - begin
            self._writer.check()
            if decided.stop is not None:
                request_stop(decided.stop)  # on the ranks that have not received the signal
                raise Stopped
            if decided.save and self.epoch_step < self.loader.steps_per_epoch:
                self._save(best=False)
                saved = now
        self._finite_means()  # waits for the device, so that the clock stops after the work
        self.seconds = seconds_before + time.perf_counter() - begin

    def _save_is_due(self, saved: float) -> bool:
        return time.perf_counter() - saved > 60 * self.config.run.save_every

    def _last_lr(self) -> float:
        return self.step.learning_rate(max(self.step.global_step - 1, 0))

    def _last_sizes(self) -> dict[str, float]:
        """Radius and step size of the epoch's last attack, where they are ramped."""
        if self.step.sizes is None or self._burning_in():
            return {}
        eps, step_size = self.step.sizes(max(self.step.global_step - 1, 0))
        return {"eps": eps, "step_size": step_size}

    def _finite_means(self) -> dict[str, float]:
        means = self.averages.of_all(self.world).means()
        bad = [key for key, value in means.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"{bad[0]} is {means[bad[0]]} in epoch {self.epoch + 1} (lr {self._last_lr():g})")
        return means

    def _finish_epoch(self, stop: StopRequest, progress: TrainingProgress, epochs: int) -> None:
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "global_step": self.step.global_step,
            "lr": self._last_lr(),
            **self._last_sizes(),
        }
        row |= self._finite_means()
        self.networks.check_state()
        row |= {
            "train_seconds": round(self.seconds, 3),
            "images_per_s": round(self.averages.of_all(self.world).images / self.seconds, 1),
        }
        self._bring_up_average(stop, progress)
        due = (self.epoch + 1) % self.config.run.val_every == 0 or self.epoch + 1 == epochs
        row |= self._validate(stop, progress, due=due, trained=row.get("train_adv_acc"))
        row |= self._measured_columns() if due else {}
        self.epoch, self.epoch_step = self.epoch + 1, 0
        self.averages, self.seconds = Averages(), 0.0
        self.row = row
        progress.epoch(row, epochs)
        # In the burn-in best follows last: naturally trained weights are never chosen by a score.
        follows = self._burning_in()
        self._end_burn_in()
        self._save(best=row["best"] or follows, row=dict(row))

    def _bring_up_average(self, stop: StopRequest, progress: TrainingProgress) -> None:
        if self.config.optim.ema_buffers == "recompute":
            progress.step(self._steps_done(), "running statistics of the average")
            if self.config.data.loader == "torch":
                self._writer.wait()  # as before an epoch
        self._average.end_epoch(self.epoch, stop_of_any_rank(stop.requested))

    def _validate(
        self, stop: StopRequest, progress: TrainingProgress, *, due: bool, trained: float | None
    ) -> dict[str, Any]:
        """Validation columns of the epoch's row.

        trained: the epoch's accuracy on attacked training images, if the method logs one.
        """
        if len(self.val) == 0:
            return {"best": True}  # nothing to select by, so best follows last
        if not due:
            self.last_validation = {}
            return {"val_clean_acc": None, "val_pgd10_acc": None, "best": False}
        found = self._validation.accuracies(
            lambda name: progress.step(self._steps_done(), f"validating {name}"),
            stop_of_any_rank(stop.requested),
        )
        self.last_validation = found
        if self._burning_in():
            return {**found, "best": False}
        eps = self._last_sizes().get("eps", self.config.attack.eps)
        near = self.config.attack.eval_eps <= 1.5 * eps
        warnings = [self.watch.collapse(found["val_pgd10_acc"], trained, comparable=near)]
        if not self._validation.sees_initial_weights():
            chance = self._validation.chance()
            warnings.append(self.watch.at_chance(found["val_clean_acc"], chance, len(self.val)))
        for text in filter(None, warnings):
            logger.warning(text)
        return {**found, "best": self.watch.better(found)}

    def _measured_columns(self) -> dict[str, float | bool | None]:
        """Columns of --check-fidelity and --boundary-speed, which the writing process measures."""
        if not self.world.first:
            return {}
        with apart():
            fidelity = fidelity_columns(self.config, self.networks, self.step.spec, self.val)
            folder, epoch = self.run.path, self.epoch + 1
            return {**fidelity, **boundary_columns(self.config, self.step, self.val, folder, epoch)}

    def _save(self, *, best: bool, row: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of this moment, and the `row` of the epoch that has ended, in the background."""
        self._finite_means()  # a checkpoint never holds weights that are no longer numbers
        require_equal_weights(self.networks, f"by update {self.step.global_step}")
        for module in self.networks.raw.values():
            if problem := not_numbers(module):  # the last update may have made them so, after its loss
                raise Diverged(f"{problem} after epoch {self.epoch}")
        # Inside an epoch the weights are no longer those that were validated.
        validated = self.last_validation if self.epoch_step == 0 else {}
        self._writer.save(self.state_dict(), validated=validated, best=best, row=row)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the weights that resuming bit for bit needs; tensors and plain values only.

        That of one process, whatever their number; every rank must call it.
        """
        ema = self.networks.ema
        return {
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "global_step": self.step.global_step,
            "optimizers": [optimizer_state(optimizer) for optimizer in self.step.optimizers],
            "scaler": self.step.precision.scaler.state_dict(),
            "ema_updates": None if ema is None else ema.updates,
            "rng": rng_state(self.device),
            "loader": self.loader.state_dict(),
            "averages": self.averages.of_all(self.world).state_dict(),
            "method": whole_buffers(self.step.method.buffers, self._per_image, self.world),
            "seconds": self.seconds,
            "watch": self.watch.state_dict(),
            "last_validation": self.last_validation,
            "row": self.row,
            "config": fixed_settings(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the weights are loaded separately.

        Raises:
            UserError: the state is another run's, or the training images are not this run's.
        """
        for key, value in fixed_settings(self.config).items():
            # The state of an earlier version lacks newer options; the run's config.yaml was checked already.
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
            load_optimizer_state(optimizer, saved)
        self.step.precision.scaler.load_state_dict(state["scaler"])
        if self.networks.ema is not None:
            self.networks.ema.updates = state["ema_updates"]
        load_buffers(self.step.method.buffers, state["method"], self._per_image, self.world)
        if self.world.first:  # the others' are part of its sums
            self.averages.load_state_dict(state["averages"], self.device)
        self.seconds, self.last_validation = state["seconds"], state["last_validation"]
        self.watch.load_state_dict(state["watch"])
        set_rng_state(state["rng"], self.device)
        self.row = state.get("row")
        self.restore_metrics(self.epoch, self.row)

    def restore_metrics(self, epochs: int, row: dict[str, Any] | None) -> None:
        """Bring the metrics in line with a checkpoint after `epochs` epochs, whose last row is `row`."""
        self._writer.restore_metrics(epochs, row)
