"""`--resume auto`: the same command starts a run the first time and continues it after that."""

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastdynat.config import TrainConfig, override, to_flat
from fastdynat.config.train_checks import check_train_config
from fastdynat.distributed import all_can, first_decides
from fastdynat.methods.configs import stored_config
from fastdynat.runs.layout import looks_like_run
from fastdynat.training.resume import resumed_run
from fastdynat.training.start import new_run
from fastdynat.training.trainer import Trainer

# For the lock of a run whose process was killed: forked workers of its loader hold it until they notice.
LOCK_SECONDS = 30.0


def run_of_command(config: TrainConfig[Any], given: Collection[str]) -> AbstractContextManager[Trainer]:
    """A trainer that continues the run in ``config.run.run_dir``, or starts it where there is none.

    A run that was killed before it had written its configuration counts as no run.

    Args:
        config: the configuration of a new run.
        given: the keys of `config` that the user has set. If the run exists, these must have its values,
            unless a resumed run may change them; all other keys, also the method, keep the run's values.

    Raises:
        UserError: as `new_run` and `resumed_run`.
    """
    path = Path(str(config.run.run_dir))
    if not first_decides(partial(looks_like_run, path)):
        return new_run(config, lock_seconds=LOCK_SECONDS)
    config = all_can(partial(_changed, path, config, given))
    return resumed_run(path, config, lock_seconds=LOCK_SECONDS)


def _changed(path: Path, config: TrainConfig[Any], given: Collection[str]) -> TrainConfig[Any]:
    """The configuration stored in `path` with the values of the keys `given` as `config` has them."""
    stored = stored_config(path, config.method if "method" in given else None)
    stored = replace(stored, run=replace(stored.run, stop_after=None, run_dir=str(path), overwrite=False))
    asked = to_flat(config)
    changed = override(stored, {key: asked[key] for key in given if key in asked}, "the command line")
    check_train_config(changed)
    return changed
