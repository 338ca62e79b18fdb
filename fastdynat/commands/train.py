"""`fastdynat train`."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastdynat.commands.message_flags import LevelFlag, printed_messages
from fastdynat.commands.parsing.config_file_notes import config_file_notes
from fastdynat.commands.parsing.effects import check_effects
from fastdynat.commands.parsing.parse import OtherMethodsFlags, Parsed, early_flags, of_options, parse
from fastdynat.config import TrainConfig, override, read_config_file
from fastdynat.config.train_checks import check_train_config
from fastdynat.errors import UserError
from fastdynat.methods import method_label, method_name, options_type
from fastdynat.methods.configs import default_config, stored_config
from fastdynat.methods.options import check_options
from fastdynat.recipes import read_recipe
from fastdynat.runs import LAST, WriteError, find_checkpoint
from fastdynat.user_code import short_name

if TYPE_CHECKING:
    from fastdynat.training import Trainer

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT")
AUTO = "auto"  # of --resume


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Generic[OptionsT]):
    """Train a network. Every flag is also a key of a --config file (underscores for dashes)."""

    recipe: str | None = None
    """Published protocol to start from; --config and flags override it. `fastdynat recipes` lists them."""
    config: str | None = None
    """YAML file of flags; flags on the command line override it."""
    resume: str | None = None
    """Continue the run in this directory, exactly as if it had never stopped. With --run-dir, auto continues
    the run there if it exists and starts it otherwise, for command lines that are run again after a
    failure."""
    submit: str | None = None
    """Submit this training as a SLURM job (extra `slurm`), described by this YAML file of submitit's
    parameters, instead of training here. The job is requeued and resumed at its time limit and on
    preemption."""
    messages: LevelFlag = field(default_factory=LevelFlag)
    train: TrainConfig[OptionsT]


def train_command(argv: list[str]) -> int:
    """Run `fastdynat train`."""
    early = early_flags(argv)
    parsed = parse_train(argv, early)
    config, resume = parsed.command.train, early.get("--resume")
    if parsed.command.submit is not None:
        from fastdynat.commands.submit.submission import submit_training

        return submit_training(parsed.command.submit, argv, config, early)

    from fastdynat.terminal.consoles import error_console

    level = parsed.command.messages.log_level
    with printed_messages(level, error_console(), quiet=config.run.quiet):
        from fastdynat.distributed import joined_world
        from fastdynat.training import new_run, resumed_run, run_of_command

        _note_needs(early.get("--recipe"), config)
        if (file := early.get("--config")) is not None:
            for note in config_file_notes(file, read_config_file(Path(file)), config, parsed.given):
                logger.warning(note)
        with joined_world(config.engine.device, config.engine.rank_timeout):
            if resume == AUTO:
                begun = run_of_command(config, _given_keys(early, parsed))
            else:
                begun = new_run(config) if resume is None else resumed_run(Path(resume), config)
            with begun as trainer:
                return 0 if trainer.finished() else _fit(trainer)


def parse_train(argv: list[str], early: Mapping[str, str]) -> Parsed[TrainCommand[Any]]:
    """The command with `argv`'s unresolved configuration; `early` comes from `early_flags`."""
    defaults = _defaults(early)
    options, resume = options_type(defaults.method), early.get("--resume")
    default = TrainCommand(
        recipe=early.get("--recipe"), config=early.get("--config"), resume=resume, train=defaults
    )
    resumes = resume not in (None, AUTO)
    command = of_options(TrainCommand, options)
    parsed: Parsed[TrainCommand[Any]] = parse(
        command, argv, "train", default=default, elsewhere=OtherMethodsFlags(options)
    )
    run = parsed.command.train.run
    if resume == AUTO and (run.run_dir is None or run.overwrite):
        raise UserError("--resume auto needs the run directory by --run-dir, and no --overwrite")
    if resumes and (run.run_dir != resume or run.overwrite):
        raise UserError("--resume names the run directory; leave --run-dir and --overwrite out")
    check_train_config(parsed.command.train)
    check_options(parsed.command.train.options)
    if not resumes:
        _check_needs(early.get("--recipe"), parsed.command.train)
        check_effects(parsed.command.train, parsed.given)
    return parsed


def _check_needs(recipe: str | None, config: TrainConfig[Any]) -> None:
    """Raise UserError for a recipe of a mixture with extra images without them."""
    if recipe is None or "extra_data" not in read_recipe(recipe).needs:
        return
    if config.extra.extra_data is None and config.extra.extra_share > 0:
        raise UserError(
            f"recipe {recipe} needs --extra-data FILE (`fastdynat recipes {recipe}` says which); "
            "--extra-share 0 trains without extra images"
        )


def _note_needs(recipe: str | None, config: TrainConfig[Any]) -> None:
    """Say where a recipe that starts from trained weights is followed without them."""
    if recipe is not None and "init_from" in read_recipe(recipe).needs and config.model.init_from is None:
        logger.warning(
            f"recipe {recipe} starts from trained weights (--init-from RUN|FILE); this run starts from "
            "random ones"
        )


def _defaults(early: Mapping[str, str]) -> TrainConfig[Any]:
    method, recipe_name, file, resume = (
        early.get(flag) for flag in ("--method", "--recipe", "--config", "--resume")
    )
    if resume is not None and resume != AUTO:
        if file is not None or recipe_name is not None:
            raise UserError("--resume takes its configuration from the run; leave --config and --recipe out")
        stored = stored_config(Path(resume), method)
        return replace(stored, run=replace(stored.run, stop_after=None, run_dir=resume, overwrite=False))
    recipe = {} if recipe_name is None else read_recipe(recipe_name).values
    values = {} if file is None else read_config_file(Path(file))
    name = method or values.get("method") or recipe.get("method") or "dynat"
    if not isinstance(name, str):
        raise UserError(f"{file}: method must be a name, got {name!r}")
    if recipe and method_name(name) != recipe["method"]:
        raise UserError(
            f"recipe {recipe_name} is for method {recipe['method']}, not {name}; leave one of them out"
        )
    config = override(default_config(name), recipe, f"recipe {recipe_name}")
    return override(config, {**values, "method": name}, file or "defaults")


def _given_keys(early: Mapping[str, str], parsed: Parsed[TrainCommand[Any]]) -> set[str]:
    """The keys of the configuration that the command line, its --config file or its recipe set."""
    keys = {flag.removeprefix("--").replace("-", "_") for flag in parsed.given}
    if (recipe := early.get("--recipe")) is not None:
        keys |= read_recipe(recipe).values.keys()
    if (file := early.get("--config")) is not None:
        keys |= read_config_file(Path(file)).keys()
    return keys


def _fit(trainer: "Trainer") -> int:
    import torch

    from fastdynat.ops import operators_in_use
    from fastdynat.training import Diverged

    path, c, ranks = trainer.run.path, trainer.config, trainer.world.size
    guide = f" with guide {short_name(c.model.guide)}" if c.model.guide != "none" else ""
    logger.info(
        f"{method_label(c.method)}: {short_name(c.model.model)}{guide} on {short_name(c.data.data)}, "
        f"{trainer.loader.num_images} images, {c.engine.device}" + f", {ranks} processes" * (ranks > 1)
    )
    if trainer.loader.extra_sampler is not None:
        logger.info(
            f"{trainer.loader.extra_sampler}: {c.extra.extra_data}, checksum {c.extra.extra_checksum}"
        )
    logger.info(f"run directory {path}, operators: {operators_in_use(torch.device(c.engine.device))}")
    attack = f"attack: {trainer.networks.attack.path}; " if trainer.step.method.attacks else ""
    logger.info(f"{attack}step: {trainer.step.path}")
    try:
        outcome = trainer.fit()
    except Diverged as error:
        kept = (
            f"the last checkpoint in {path} is from before"
            if find_checkpoint(path, LAST)
            else "there is no checkpoint yet"
        )
        if trainer.world.first:  # all ranks find the same
            logger.error(f"training diverged: {error}; {kept}. Lower --lr, or --clip-grad 1")
        return 1
    except WriteError as error:
        raise UserError(f"{error}; make room, then go on with: fastdynat train --resume {path}") from None
    if outcome.finished:
        if why := trainer.watch.ended():
            logger.info(f"ended after {trainer.epoch} epochs: {why}")
        logger.info(f"done: {path}; next: fastdynat eval {path}")
        return 0
    done = f"{trainer.epoch} epochs and {trainer.epoch_step} steps"
    logger.info(f"stopped and saved after {done}; go on with: fastdynat train --resume {path}")
    return 0 if outcome.signal is None else 128 + outcome.signal
