"""The training loop: epochs, validation, checkpoints, log, stopping and going on."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from fastdynat.attacks import check_fidelity, parse_attack
from fastdynat.config import TrainConfig
from fastdynat.data import DatasetInfo, ImageSet, TrainLoader, eval_batches
from fastdynat.engine.metrics import Averages, MetricsLog
from fastdynat.engine.networks import NetworkSet
from fastdynat.engine.progress import Display
from fastdynat.engine.rng import rng_state, set_rng_state
from fastdynat.engine.state import identity, write_state
from fastdynat.engine.step import TrainStep
from fastdynat.engine.stopping import StopRequest
from fastdynat.errors import UserError
from fastdynat.evaluation import Stopped, measure
from fastdynat.runs import STATE, RunDir, Sidecar, save_weights

REFRESH_SECONDS = 1.0  # between looks at the device's running averages, each of which waits for it


class Diverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.fit` ended: all epochs done or --stop-at reached, or stopped early by `signal` (None: by --stop-after)."""

    finished: bool
    signal: Signals | None = None


class Trainer:
    """One run in one run directory. `config` is resolved."""

    def __init__(
        self,
        config: TrainConfig[Any],
        info: DatasetInfo,
        val: ImageSet,
        networks: NetworkSet,
        step: TrainStep,
        loader: TrainLoader,
        run: RunDir,
    ) -> None:
        self.config, self.info, self.val, self.networks = config, info, val, networks
        self.step, self.loader, self.run = step, loader, run
        self.device = torch.device(config.engine.device)
        self.metrics = MetricsLog(run.path, tensorboard=config.run.tensorboard)
        self.epoch, self.epoch_step = 0, 0  # epochs completed, steps done in the one at hand
        self.averages, self.seconds = Averages(), 0.0
        self.best: float | None = None  # the highest validation accuracy of the kind the method is selected by
        self.last_validation: dict[str, float] = {}

    def fit(self) -> Outcome:
        """Train until the last epoch, --stop-at, --stop-after, or a signal; everything is saved when it returns.

        Raises:
            Diverged: the loss is not finite; the last checkpoint is from before.
        """
        epochs = self.config.optim.epochs
        assert epochs is not None
        until = min(epochs, self.config.run.stop_after or epochs)
        spe = self.loader.steps_per_epoch
        done = self.epoch * spe + self.epoch_step
        with (
            StopRequest() as stop,
            Display(total_steps=until * spe, done_steps=done, quiet=self.config.run.quiet) as display,
        ):
            while self.epoch < until and not self.reached():
                try:
                    self._train_epoch(stop, display)
                    self._finish_epoch(stop, display, epochs)
                except Stopped:
                    self._save(best=False)
                    return Outcome(False, stop.signal)
        self.metrics.close()
        return Outcome(self.epoch >= epochs or self.reached(), stop.signal)

    def reached(self) -> bool:
        """Whether the best validation score so far is what --stop-at asks for."""
        target = self.config.run.stop_at
        return target is not None and self.best is not None and self.best >= target

    def _train_epoch(self, stop: StopRequest, display: Display) -> None:
        saved = refreshed = begin = time.perf_counter()
        seconds_before, images = self.seconds, 0
        self.step.start_epoch(self.epoch)
        for batch in self.loader.epoch(self.epoch, self.epoch_step):
            self.averages.add(self.step(batch), len(batch.labels))
            images += len(batch.labels)
            self.epoch_step += 1
            now = time.perf_counter()
            display.step(self.epoch * self.loader.steps_per_epoch + self.epoch_step, f"epoch {self.epoch + 1}")
            if now - refreshed > REFRESH_SECONDS:
                refreshed = now
                rate = images / (now - begin)
                display.note(self._finite_means(), rate)
            self.seconds = seconds_before + now - begin
            if stop.requested():
                raise Stopped
            if now - saved > 60 * self.config.run.save_every and self.epoch_step < self.loader.steps_per_epoch:
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

    def _finish_epoch(self, stop: StopRequest, display: Display, epochs: int) -> None:
        row: dict[str, Any] = {"epoch": self.epoch + 1, "global_step": self.step.global_step, "lr": self._last_lr()}
        row |= self._finite_means()
        row |= {"train_seconds": round(self.seconds, 3), "images_per_s": round(self.averages.images / self.seconds, 1)}
        due = (self.epoch + 1) % self.config.run.val_every == 0 or self.epoch + 1 == epochs
        row |= self._validate(stop, display, due=due)
        row |= self._check_fidelity(display) if due else {}
        self.epoch, self.epoch_step = self.epoch + 1, 0
        self.averages, self.seconds = Averages(), 0.0
        self.metrics.append(row)
        display.epoch(row, epochs)
        self._save(best=row["best"])

    def _validate(self, stop: StopRequest, display: Display, *, due: bool) -> dict[str, Any]:
        """Validation columns of the epoch's row; keeps the best score."""
        if len(self.val) == 0:
            return {"best": True}  # nothing to select by, so best follows last
        if not due:
            self.last_validation = {}
            return {"val_clean_acc": None, "val_pgd10_acc": None, "best": False}
        accuracies = {}
        attack, eps = self.config.attack, float(self.config.attack.eval_eps)
        for name in ("clean", "pgd10"):
            display.step(self.epoch * self.loader.steps_per_epoch + self.epoch_step, f"validating {name}")
            accuracies[name] = measure(
                self.networks.deployed(),
                self.val,
                parse_attack(name, eps=eps, step_size=eps / 4, norm=attack.norm),
                device=self.device,
                batch_size=self.config.data.eval_batch_size,
                seed=self.config.engine.seed,
                channels_last=self.config.engine.channels_last == "on",
                should_stop=stop.requested,
            ).accuracy
        self.last_validation = {"val_clean_acc": accuracies["clean"], "val_pgd10_acc": accuracies["pgd10"]}
        score = self.last_validation[self.step.method.select_by]
        better = self.best is None or score > self.best
        self.best = score if better else self.best
        return {**self.last_validation, "best": better}

    def _check_fidelity(self, display: Display) -> dict[str, float | bool]:
        """Columns that say whether the attack as it is computed is as strong as the reference; nothing of the run changes."""
        count = self.config.engine.check_fidelity
        if count == 0:
            return {}
        spread = torch.arange(count) * len(self.val) // count  # a folder's images may be in the order of their classes
        assert self.config.data.batch_size is not None
        batches = eval_batches(
            ImageSet(self.val.images[spread], self.val.labels[spread]),
            batch_size=self.config.data.batch_size,  # the shape that is compiled
            device=self.device,
            channels_last=self.config.engine.channels_last == "on",
        )
        found = check_fidelity(
            self.networks.attack,
            self.networks.raw["model"],
            ((batch.x, batch.labels) for batch in batches),
            self.step.spec,
            bn=self.config.attack.attack_bn,
            seed=self.config.engine.seed,
        )
        if found.weaker:
            display.say(
                f"warning: the attack is weaker than the eager float32 one: loss {found.loss_fast:.4g} against "
                f"{found.loss_reference:.4g}, accuracy {100 * found.acc_fast:.1f} against {100 * found.acc_reference:.1f} %; "
                f"it is computed as {self.networks.attack.path}"
            )
        return found.columns()

    def _save(self, *, best: bool) -> None:
        self._finite_means()  # a checkpoint never holds weights that are no longer numbers
        self.run.commit(self._write_checkpoint, best=best)

    def _write_checkpoint(self, folder: Path) -> None:
        config = self.config
        save_weights(
            folder / "model.safetensors",
            self.networks.deployed().state_dict(),
            self._sidecar("model", config.model.model),
        )
        if self.networks.ema is not None:
            raw = self.networks.raw["model"].state_dict()
            save_weights(folder / "model_raw.safetensors", raw, self._sidecar("model", config.model.model))
        if "guide" in self.networks.raw:
            guide = self.networks.raw["guide"].state_dict()
            save_weights(folder / "guide.safetensors", guide, self._sidecar("guide", config.model.guide))
        write_state(folder / STATE, self.state_dict())

    def _sidecar(self, role: str, architecture: str) -> Sidecar:
        info, attack = self.info, self.config.attack
        dataset_norm = self.config.model.normalize == "dataset"
        # Inside an epoch the weights are no longer those that were validated.
        validated = self.last_validation if role == "model" and self.epoch_step == 0 else {}
        return Sidecar(
            architecture=architecture,
            num_classes=info.num_classes,
            image_shape=info.image_shape,
            mean=info.mean if dataset_norm else None,
            std=info.std if dataset_norm else None,
            dataset=info.name,
            class_names=info.class_names,
            role=role,
            method=self.config.method,
            norm=attack.norm,
            eps=float(attack.eps),
            eval_eps=float(attack.eval_eps),
            epoch=self.epoch,
            val_clean_acc=validated.get("val_clean_acc"),
            val_pgd10_acc=validated.get("val_pgd10_acc"),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that is needed beside the weights to go on bit for bit; tensors and plain values only."""
        ema = self.networks.ema
        return {
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "global_step": self.step.global_step,
            "optimizers": [optimizer.state_dict() for optimizer in self.step.optimizers],
            "scaler": self.step.precision.scaler.state_dict(),
            "ema_updates": None if ema is None else int(ema.n_averaged),
            "rng": rng_state(),
            "loader": self.loader.state_dict(),
            "averages": self.averages.state_dict(),
            "method": self.step.method.buffers,
            "seconds": self.seconds,
            "best": self.best,
            "last_validation": self.last_validation,
            "config": identity(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back `state_dict`; the weights are loaded separately.

        Raises:
            UserError: the state is another run's, or the training images are not this run's.
        """
        for key, value in identity(self.config).items():
            # A state from before there was such an option knows nothing of it; the run's config.yaml was checked already.
            if state["config"].get(key, value) != value:
                raise UserError(f"the training state is another run's: {key} is {state['config'][key]!r}, here {value!r}")
        self.loader.load_state_dict(state["loader"])
        self.epoch, self.epoch_step = state["epoch"], state["epoch_step"]
        self.step.global_step = state["global_step"]
        for optimizer, saved in zip(self.step.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step.precision.scaler.load_state_dict(state["scaler"])
        if self.networks.ema is not None:
            self.networks.ema.n_averaged.fill_(state["ema_updates"])
        for name, tensor in self.step.method.buffers.items():
            tensor.copy_(state["method"][name])
        self.averages.load_state_dict(state["averages"], self.device)
        self.seconds, self.best, self.last_validation = state["seconds"], state["best"], state["last_validation"]
        set_rng_state(state["rng"])
        self.metrics.keep_until(self.epoch)
