"""`fastdynat.train`: train a network in Python; the run directory is that of the command line."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdynat.caller_warnings import warn_caller
from fastdynat.commands.parsing.effects import check_effects
from fastdynat.config import TrainConfig, override
from fastdynat.config.train_checks import check_train_config
from fastdynat.config.value_ranges import size_notices
from fastdynat.data.own_data import check_logit_count, given_data, own_parts
from fastdynat.distributed import first_decides, joined_world
from fastdynat.errors import UserError
from fastdynat.execution.process_state import process_state_kept
from fastdynat.methods.configs import default_config, stored_config
from fastdynat.methods.options import check_options
from fastdynat.models.own_networks import count_logits, given_network
from fastdynat.runs import BEST, LAST, Sidecar, find_checkpoint, load_network
from fastdynat.runs.layout import METRICS
from fastdynat.runs.metrics_rows import read_rows
from fastdynat.runs.rundir import OccupiedError
from fastdynat.training import Diverged, Outcome, Trainer, new_run, resumed_run, run_of_command
from fastdynat.user_code import short_name

AUTO = "auto"  # of resume


@dataclass(frozen=True)
class TrainedRun:
    """A finished or paused run.

    Attributes:
        model: the trained network in eval mode, with the weights of the best checkpoint.
        run_dir: the run directory. The command line opens it only if network and data were given by name.
        metrics: one row per epoch, as in metrics.jsonl: losses, accuracies in [0, 1], seconds.
        config: the resolved configuration.
        finished: True if all epochs are done; False after ``stop_after``.
        about: what is stored beside the weights of `model`: classes, image shape, norm, eval_eps, epoch.
    """

    model: nn.Module
    run_dir: Path
    metrics: list[dict[str, Any]]
    config: TrainConfig[Any]
    finished: bool
    about: Sidecar

    @property
    def last(self) -> dict[str, Any]:
        """The row of the last epoch."""
        return self.metrics[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best checkpoint's epoch, that of `model`: the highest validation score, or the last
        epoch where none was validated after the burn-in."""
        found = next((row for row in self.metrics if row["epoch"] == self.about.epoch), None)
        if found is None:
            raise UserError(f"{self.run_dir / METRICS} has no row of the best checkpoint's epoch; restore it")
        return found

    def load(self, checkpoint: str = BEST, *, into: nn.Module | None = None) -> nn.Module:
        """The network of the "best" or the "last" checkpoint, in eval mode.

        Args:
            into: see `fastdynat.load_network`.
        """
        folder = find_checkpoint(self.run_dir, checkpoint) if checkpoint in (BEST, LAST) else None
        if folder is None:
            raise UserError(
                f"{self.run_dir} has no checkpoint {checkpoint!r}; the names are {BEST} and {LAST}"
            )
        return load_network(folder / "model.safetensors", into=into)[0]

    def __repr__(self) -> str:
        epochs = f"{len(self.metrics)} epochs{'' if self.finished else ', not finished'}"
        return f"<run {self.run_dir}: {short_name(self.config.method)}, {epochs}>"


@process_state_kept()
@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: nn.Module | str | None = None,
    data: Any = None,
    method: str | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    **keys: Any,
) -> TrainedRun:
    """Train `model` on `data` against adversarial examples, and keep everything in a run directory.

    On return, a module passed as `model` has the weights of the best checkpoint and is in eval mode. Training
    works on a copy, so an error or an interruption leaves the module unchanged. Random generators, threads
    and flags of the process are restored. In a script that torchrun starts, all of its processes train
    together; a process group of the script's own must take CPU tensors, as that of
    ``init_process_group("cpu:gloo,cuda:nccl")``.

    Example::

        run = fastdynat.train(net, (images, labels), method="trades", eps=8 / 255, epochs=10)
        run.model, run.best["val_pgd10_acc"]

    Args:
        model: a module that maps float images (N, C, H, W) in [0, 1] to logits (N, K), with its normalisation
            inside; or a name: resnet18, wrn-34-10, timm:NAME, torchvision:NAME, path/to/file.py:callable.
            None is resnet18 (small for digits), or the resumed run's own.
        data: (images, labels), uint8 or float in [0, 1] (N, C, H, W) and whole numbers (N,); a torch Dataset
            of (image, label); (train, test) of these; a dict with train and optionally test, val and classes;
            or a name: digits, cifar10, cifar100, svhn, mnist, imagefolder, path/to/file.py:callable; None is
            digits, or the resumed run's own. Validation images are held out of the training images where none
            are given. No augmentation unless `augment` says so.
        method: dynat (the default), trades, madry, ...; `fastdynat.methods.METHODS` lists them.
        run_dir: folder of the run; None is a new one under runs/.
        resume: run directory to continue, exactly as if it had never stopped; pass the same model and data
            again where these were given as objects. "auto" continues the run in `run_dir` if it exists and
            starts it otherwise.
        keys: any other key of the configuration, by the name of its flag with underscores: eps, steps,
            step_size, epochs, batch_size, lr, seed, augment, device, and the method's options. Sizes are in
            [0, 1] pixel units; under linf a value above 1 is read in 8-bit levels, with a warning.

    Raises:
        UserError: an argument that cannot work, before anything is written.
        fastdynat.training.Diverged: the loss is not finite.
        KeyboardInterrupt: Ctrl-C; the run is saved, and `resume` goes on.
    """
    if not isinstance(model, str | nn.Module | None):
        raise UserError(f"model must be a torch.nn.Module or a name, got a {type(model).__name__}")
    with _named_data(data, model) as data_name, _named_model(model) as model_name:
        named = {"model": model_name, "data": data_name}
        given = {**{key: name for key, name in named.items() if name is not None}, **keys}
        resumes = resume is not None and resume != AUTO
        if resumes:
            config = _resumed_config(Path(str(resume)), given, method, run_dir)
        else:
            config = _new_config(given, method, run_dir)
            check_effects(config, keys)
        engine = config.engine
        with joined_world(engine.device, engine.rank_timeout):
            if resume == AUTO:
                begun = _begun_or_continued(config, given, method)
            else:
                begun = resumed_run(Path(str(resume)), config) if resumes else new_run(config)
            with _remedies_in_python(), begun as trainer:
                outcome = _fit(trainer)
                path, config = trainer.run.path, trainer.config
            # Rank 0 has written everything now; without its word another rank may find the checkpoint before.
            best, rows = first_decides(lambda: _written(path))
    if outcome.signal is not None:
        signal.raise_signal(outcome.signal)  # by default Ctrl-C is a KeyboardInterrupt, SIGTERM the end
    if best is None:
        raise UserError(
            f"{path} has no checkpoint yet; go on with fastdynat.train(..., resume={str(path)!r})"
        )
    weights = best / "model.safetensors"
    trained, about = load_network(weights, into=model if isinstance(model, nn.Module) else None)
    return TrainedRun(trained, path, rows, config, outcome.finished, about)


def _written(path: Path) -> tuple[Path | None, list[dict[str, Any]]]:
    """The best checkpoint of the run in `path`, or else its last one, and the rows of its metrics."""
    best, metrics = find_checkpoint(path, BEST) or find_checkpoint(path, LAST), path / METRICS
    return best, read_rows(metrics) if metrics.exists() else []


def _check(config: TrainConfig[Any]) -> None:
    check_train_config(config)
    check_options(config.options)


def _new_config(given: Mapping[str, Any], method: str | None, run_dir: str | Path | None) -> TrainConfig[Any]:
    name = method or "dynat"
    values = {**given, "method": name, **({} if run_dir is None else {"run_dir": str(run_dir)})}
    config = override(default_config(name), values, "fastdynat.train")
    _check(config)
    for notice in size_notices(config.attack):  # logged, too, but a script shows no log by itself
        warn_caller(notice)
    return config


def _begun_or_continued(
    config: TrainConfig[Any], given: Mapping[str, Any], method: str | None
) -> AbstractContextManager[Trainer]:
    """The run in `config`'s directory, started where there is none."""
    if config.run.run_dir is None or config.run.overwrite:
        raise UserError('resume="auto" needs the run directory as run_dir, and no overwrite')
    return run_of_command(config, {*given, *(() if method is None else ("method",))})


@contextmanager
def _remedies_in_python() -> Iterator[None]:
    try:
        yield
    except OccupiedError as error:
        raise UserError(
            f"{error.path} already holds a run: continue it with resume={str(error.path)!r}, or replace it "
            "with overwrite=True"
        ) from None


@contextmanager
def _named_model(model: nn.Module | str | None) -> Iterator[str | None]:
    if not isinstance(model, nn.Module):
        yield model
    else:
        with given_network(model) as name:
            yield name


@contextmanager
def _named_data(data: Any, model: nn.Module | str | None) -> Iterator[str | None]:
    if data is None or isinstance(data, str):
        yield data
    else:
        own = own_parts(data, "data")
        if isinstance(model, nn.Module):
            check_logit_count(own, count_logits(model, type(model).__name__, own.info.image_shape))
        with given_data(own) as name:
            yield name


def _resumed_config(
    path: Path, given: Mapping[str, Any], method: str | None, run_dir: str | Path | None
) -> TrainConfig[Any]:
    stored = stored_config(path, method)
    if run_dir is not None or "overwrite" in given:
        raise UserError("resume names the run directory; leave run_dir and overwrite out")
    stored = replace(stored, run=replace(stored.run, stop_after=None, run_dir=str(path), overwrite=False))
    config = override(stored, given, "fastdynat.train")
    _check(config)
    return config


def _fit(trainer: Trainer) -> Outcome:
    if trainer.finished():
        return Outcome(True)
    try:
        return trainer.fit()
    except Diverged as error:
        kept = (
            "the last checkpoint is from before"
            if find_checkpoint(trainer.run.path, LAST)
            else "nothing is saved"
        )
        raise Diverged(f"{error}; {kept} in {trainer.run.path}. Use a lower lr, or clip_grad=1") from None
