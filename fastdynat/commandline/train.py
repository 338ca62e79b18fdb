"""`fastdynat train`."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastdynat.commandline.parse import early_flags, of_options, own_flags, parse
from fastdynat.config import TrainConfig, read_yaml, update
from fastdynat.errors import UserError
from fastdynat.methods import method_name, options_type
from fastdynat.methods.configs import default_config, stored_config
from fastdynat.recipes import read_recipe
from fastdynat.runs import LAST, WriteError, find_checkpoint

if TYPE_CHECKING:
    from fastdynat.engine import Trainer

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Generic[OptionsT]):
    """Train a network. Every flag is also a key of a --config file (underscores for dashes)."""

    recipe: str | None = None
    """Published protocol to start from: `fastdynat recipes` lists them; --config and flags given here win."""
    config: str | None = None
    """YAML file of flags; flags given here win."""
    resume: str | None = None
    """Go on with the run in this directory, exactly as if it had never stopped."""
    train: TrainConfig[OptionsT]


def run(argv: list[str]) -> int:
    """Train, or go on with a run."""
    early = early_flags(argv)
    config = parse_train(argv, early)

    from fastdynat.consoles import error_console
    from fastdynat.engine import new_run, resumed_run

    console = error_console()

    def say(text: str) -> None:
        console.print(text, markup=False, emoji=False)

    begun = resumed_run(Path(early.resume), config, say) if early.resume is not None else new_run(config, say)
    with begun as trainer:
        return 0 if trainer.finished() else _fit(trainer, say)


def parse_train(argv: list[str], early: argparse.Namespace) -> TrainConfig[Any]:
    """The unresolved configuration that `argv` asks for; `early` is what `early_flags` found in it."""
    defaults = _defaults(early)
    options = options_type(defaults.method)
    default = TrainCommand(recipe=early.recipe, config=early.config, resume=early.resume, train=defaults)
    command = parse(of_options(TrainCommand, options), argv, "train", default=default, own=own_flags(options))
    config: TrainConfig[Any] = command.train
    if early.resume is not None and (config.run.run_dir != early.resume or config.run.overwrite):
        raise UserError("--resume names the run directory; leave --run-dir and --overwrite out")
    return config


def _defaults(early: argparse.Namespace) -> TrainConfig[Any]:
    if early.resume is not None:
        if early.config is not None or early.recipe is not None:
            raise UserError("--resume takes its configuration from the run; leave --config and --recipe out")
        stored = stored_config(Path(early.resume))
        if early.method is not None and method_name(early.method) != stored.method:
            raise UserError(f"{early.resume} trains by {stored.method}, not by {early.method}; start a new run for that")
        return replace(stored, run=replace(stored.run, stop_after=None, run_dir=early.resume, overwrite=False))
    recipe = {} if early.recipe is None else read_recipe(early.recipe)[0]
    values = {} if early.config is None else read_yaml(Path(early.config))
    method = early.method or values.get("method") or recipe.get("method") or "dynat"
    if not isinstance(method, str):
        raise UserError(f"{early.config}: method must be a name, got {method!r}")
    if recipe and method_name(method) != recipe["method"]:
        raise UserError(f"recipe {early.recipe} is for method {recipe['method']}, not {method}; leave one of them out")
    config = update(default_config(method), recipe, f"recipe {early.recipe}")
    return update(config, {**values, "method": method}, early.config or "defaults")


def _fit(trainer: "Trainer", say: Any) -> int:
    import torch

    from fastdynat.engine import Diverged
    from fastdynat.ops import selected_backend

    path, c = trainer.run.path, trainer.config
    guide = f" with guide {c.model.guide}" if c.model.guide != "none" else ""
    say(f"{c.method}: {c.model.model}{guide} on {c.data.data}, {trainer.loader.num_images} images, {c.engine.device}")
    say(f"run directory {path}, operators: {selected_backend(torch.device(c.engine.device).type)}")
    say(f"attack: {trainer.networks.attack.path}; step: {trainer.step.path}")
    try:
        outcome = trainer.fit()
    except Diverged as error:
        kept = f"the last checkpoint in {path} is from before" if find_checkpoint(path, LAST) else "there is no checkpoint yet"
        say(f"training diverged: {error}; {kept}. Lower --lr, or --clip-grad 1")
        return 1
    except WriteError as error:
        raise UserError(f"{error}; make room, then go on with: fastdynat train --resume {path}") from None
    if outcome.finished:
        if why := trainer.watch.ended():
            say(f"ended after {trainer.epoch} epochs: {why}")
        say(f"done: {path}; next: fastdynat eval {path}")
        return 0
    done = f"{trainer.epoch} epochs and {trainer.epoch_step} steps"
    say(f"stopped and saved after {done}; go on with: fastdynat train --resume {path}")
    return 0 if outcome.signal is None else 128 + outcome.signal
