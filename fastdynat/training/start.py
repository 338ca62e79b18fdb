"""Starting a run: everything is checked before anything is written, so a refusal loses nothing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdynat.config import TrainConfig, to_yaml
from fastdynat.data import dataset_info
from fastdynat.errors import UserError
from fastdynat.execution.process_state import keeping_process_state
from fastdynat.methods import method_label
from fastdynat.ops import use_backend
from fastdynat.runs import ENVIRONMENT, RunDir, check_new, claim_name, free_name, record_start, release_name
from fastdynat.runs.layout import real
from fastdynat.training.arithmetic import arithmetic, rounding_of_resume
from fastdynat.training.own_code import data_folder_name, pin_own_code
from fastdynat.training.parts import build_parts, burn_in_step, open_split
from fastdynat.training.resolve import check_sizes, resolve, resolve_loader, warn_of_first_epoch
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.trainer import Trainer
from fastdynat.training.trial import settle_compile

logger = logging.getLogger(__name__)


@keeping_process_state
@contextmanager
def new_run(config: TrainConfig[Any]) -> Iterator[Trainer]:
    """A trainer for a new run directory, ready to `fit`.

    Raises:
        UserError: anything in `config`, the data or the directory that cannot work; nothing has been written
            then.
    """
    config = pin_own_code(config)
    stem = f"{data_folder_name(config.data.data)}-{method_label(config.method)}"
    _check_before_data(config, stem)
    split = open_split(config)
    check_sizes(config, split)
    resolved = resolve_loader(resolve(config, split.info), split)
    warn_of_first_epoch(resolved)
    if why := rounding_of_resume(resolved.engine):
        logger.info("resuming this run will continue within rounding, not bit for bit: %s", why)
    val = split.val_images()
    resolved = settle_compile(resolved, split)
    parts = build_parts(resolved, split)
    burn_in = burn_in_step(resolved, parts.step)
    run, resolved = _make_folder(resolved, stem)  # only now, when nothing can be refused any more
    try:
        with use_backend(resolved.engine.kernels):
            record_start(run.path / ENVIRONMENT, **arithmetic(resolved.engine))
            yield Trainer(resolved, split.info, val, parts, run, burn_in)
    finally:
        run.close()


def _check_before_data(config: TrainConfig[Any], stem: str) -> None:
    """Refuse what can be refused before the data is read."""
    known = dataset_info(config.data.data)
    if known is not None:
        resolve(config, known, announce=False)
    path = Path(config.run.run_dir) if config.run.run_dir else free_name(stem)
    check_new(path, overwrite=config.run.overwrite)
    teacher = config.model.guide_from
    if config.run.overwrite and teacher is not None and real(Path(teacher)).is_relative_to(real(path)):
        raise UserError(
            f"--guide-from {teacher} belongs to the run that --overwrite would replace; "
            "choose another --run-dir"
        )


def _make_folder(config: ResolvedConfig[Any], stem: str) -> tuple[RunDir, ResolvedConfig[Any]]:
    """The open folder of a new run (runs/STEM where the user names none), and `config` as it is stored there.

    The path of the data is stored whole, so that the run can be resumed and evaluated from another directory.
    """
    claimed = not config.run.run_dir
    path = claim_name(stem) if claimed else Path(str(config.run.run_dir))
    stored = replace(
        config,
        run=replace(config.run, run_dir=str(path), overwrite=False),
        data=replace(config.data, data_dir=str(Path(config.data.data_dir).absolute())),
    )
    try:
        run = RunDir.create(path, to_yaml(stored), overwrite=config.run.overwrite)
    except BaseException:
        if claimed:
            release_name(path)
        raise
    for kept in run.kept:
        logger.info("--overwrite leaves %s, which the old run did not make", kept)
    return run, stored
