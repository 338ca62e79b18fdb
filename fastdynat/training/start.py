"""Starting a run: everything is checked before anything is written, so a refusal loses nothing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdynat.config import TrainConfig, to_yaml
from fastdynat.data import TrainSplit, dataset_info
from fastdynat.distributed import all_can, first_decides, world
from fastdynat.errors import UserError
from fastdynat.execution.process_state import keeping_process_state
from fastdynat.methods import method_label
from fastdynat.ops import use_backend
from fastdynat.runs import (
    ENVIRONMENT,
    RunDir,
    SeenRun,
    check_new,
    claim_name,
    free_name,
    record_start,
    release_name,
)
from fastdynat.runs.layout import real
from fastdynat.training.arithmetic import arithmetic, rounding_of_resume
from fastdynat.training.idle_settings import idle_settings
from fastdynat.training.method_buffers import checkpoint_note
from fastdynat.training.networks import NetworkSet
from fastdynat.training.own_code import data_folder_name, pin_own_code
from fastdynat.training.parts import build_parts, burn_in_step, open_split
from fastdynat.training.rank_start import (
    begin_alike,
    require_same_command,
    require_shared_folder,
    settled_by_first,
)
from fastdynat.training.resolve import check_sizes, resolve, resolve_loader, warn_of_first_epoch
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.seen_validation import warn_of_seen_validation
from fastdynat.training.source_runs import warn_of_other_guide
from fastdynat.training.trainer import Trainer
from fastdynat.training.trial import settle_compile

logger = logging.getLogger(__name__)


@keeping_process_state
@contextmanager
def new_run(
    config: TrainConfig[Any], *, lock_seconds: float = 0.0, split: TrainSplit | None = None
) -> Iterator[Trainer]:
    """A trainer for a new run directory, ready to `fit`.

    Args:
        split: `open_split` of `config`, where the caller has made it.
        lock_seconds: to wait for another process that uses the directory.

    Raises:
        UserError: anything in `config`, the data or the directory that cannot work; nothing has been written
            then.
    """
    config = pin_own_code(config)
    require_same_command(config)
    stem = f"{data_folder_name(config.data.data)}-{method_label(config.method)}"
    resolved, opened = settled_by_first(config, lambda: _settled(config, stem, split))
    val = all_can(opened.val_images)
    parts = all_can(lambda: build_parts(resolved, opened, load_sources=world().first))
    if world().first:
        warn_of_seen_validation(resolved, opened)
        warn_of_other_guide(resolved, parts.step.method)
    burn_in = burn_in_step(resolved, parts.step)
    begin_alike(parts, val)
    for note in idle_settings(resolved, parts.step.method, parts.networks) if world().first else ():
        logger.info(note)
    if world().first and (kept := checkpoint_note(parts.step.method)) is not None:
        logger.info(kept)
    resolved = _with_initial(resolved, parts.networks)
    run, resolved = _make_folder(
        resolved, stem, lock_seconds
    )  # only now, when nothing can be refused any more
    try:
        with use_backend(resolved.engine.kernels):
            if isinstance(run, RunDir):
                record_start(run.path / ENVIRONMENT, processes=world().size, **arithmetic(resolved.engine))
            yield Trainer(resolved, opened.info, val, parts, run, burn_in)
    finally:
        run.close()


def _settled(
    config: TrainConfig[Any], stem: str, opened: TrainSplit | None
) -> tuple[ResolvedConfig[Any], TrainSplit]:
    """`config` with every choice made, and its data, which are opened here unless they are `opened`."""
    _check_before_data(config, stem)
    split = open_split(config) if opened is None else opened
    check_sizes(config, split)
    resolved = resolve_loader(resolve(config, split.info), split)
    warn_of_first_epoch(resolved)
    if why := rounding_of_resume(resolved.engine):
        logger.info("resuming this run will continue within rounding, not bit for bit: %s", why)
    return settle_compile(resolved, split), split


def _check_before_data(config: TrainConfig[Any], stem: str) -> None:
    """Refuse what can be refused before the data is read."""
    known = dataset_info(config.data.data)
    if known is not None:
        resolve(config, known, announce=False)
    path = Path(config.run.run_dir) if config.run.run_dir else free_name(stem)
    check_new(path, overwrite=config.run.overwrite)
    for flag, source in (("--guide-from", config.model.guide_from), ("--init-from", config.model.init_from)):
        if config.run.overwrite and source is not None and real(Path(source)).is_relative_to(real(path)):
            raise UserError(
                f"{flag} {source} belongs to the run that --overwrite would replace; choose another --run-dir"
            )


def _with_initial(config: ResolvedConfig[Any], networks: NetworkSet) -> ResolvedConfig[Any]:
    """`config` with the sha256 of the weights at --init-from, which the first process has read."""
    digest = first_decides(lambda: networks.initial)
    return replace(config, model=replace(config.model, init_sha256=digest))


def _make_folder(
    config: ResolvedConfig[Any], stem: str, lock_seconds: float
) -> tuple[RunDir | SeenRun, ResolvedConfig[Any]]:
    """The open folder of a new run (runs/STEM where the user names none), and `config` as it is stored there.

    The path of the data is stored whole, so that the run can be resumed and evaluated from another directory.
    Of several processes the first makes the folder, when all machines have been found to share its place.
    """
    require_shared_folder(Path(config.run.run_dir) if config.run.run_dir else free_name(stem))
    made: list[RunDir] = []

    def make() -> dict[str, Any]:
        run, stored = _made_folder(config, stem, lock_seconds)
        made.append(run)
        return {"run_dir": stored.run.run_dir, "data_dir": stored.data.data_dir}

    paths = first_decides(make)
    stored = replace(
        config,
        run=replace(config.run, run_dir=paths["run_dir"], overwrite=False),
        data=replace(config.data, data_dir=paths["data_dir"]),
    )
    return made[0] if made else SeenRun(Path(paths["run_dir"])), stored


def _made_folder(
    config: ResolvedConfig[Any], stem: str, lock_seconds: float
) -> tuple[RunDir, ResolvedConfig[Any]]:
    """`_make_folder` of the process that writes."""
    claimed = not config.run.run_dir
    path = claim_name(stem) if claimed else Path(str(config.run.run_dir))
    stored = replace(
        config,
        run=replace(config.run, run_dir=str(path), overwrite=False),
        data=replace(config.data, data_dir=str(Path(config.data.data_dir).absolute())),
    )
    try:
        overwrite = config.run.overwrite
        run = RunDir.create(path, to_yaml(stored), overwrite=overwrite, lock_seconds=lock_seconds)
    except BaseException:
        if claimed:
            release_name(path)
        raise
    for kept in run.kept:
        logger.info("--overwrite keeps %s, which the old run did not create", kept)
    return run, stored
