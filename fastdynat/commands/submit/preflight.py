"""Checks before a job waits in a queue: everything that its first minute would refuse on any machine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdynat.config import EngineConfig, TrainConfig
from fastdynat.data import dataset_info
from fastdynat.errors import UserError
from fastdynat.execution.fallbacks import SilentFallbacks
from fastdynat.execution.process_state import process_state_kept
from fastdynat.methods import method_class
from fastdynat.runs import check_new, looks_like_run
from fastdynat.training.build_networks import build_networks
from fastdynat.training.own_code import pin_own_code
from fastdynat.training.parts import open_split
from fastdynat.training.resolve import check_processes, check_sizes, resolve
from fastdynat.training.resolve_engine import check_switches


def check_before_submission(config: TrainConfig[Any], *, tasks: int) -> None:
    """Refuse what needs no GPU to be refused: flags, data, run directory, networks.

    Data sets that are to be downloaded are downloaded here; compute nodes often have no network. The device,
    the precision and the operators are the job's own to check.

    Args:
        config: unresolved.
        tasks: processes of the job.

    Raises:
        UserError: anything that cannot work.
    """
    path = Path(str(config.run.run_dir))
    if looks_like_run(path):  # the job resumes it; what may change then has been checked by the parser
        return
    check_new(path, overwrite=False)
    asked, config = config.engine, pin_own_code(config)
    config = replace(config, engine=_on_cpu(asked))
    known = dataset_info(config.data.data)
    if known is not None:
        resolve(config, known, announce=False)
    split = open_split(config)
    check_sizes(config, split)
    resolved = resolve(config, split.info, announce=False)
    if resolved.data.batch_size < tasks:
        raise UserError(
            f"batch_size {resolved.data.batch_size}: the job has {tasks} tasks, and each needs an image; "
            "--batch-size counts the images of all of them"
        )
    method = method_class(resolved.method)(resolved.options)
    check_processes(config, resolved.data, resolved.attack, method, tasks)
    if asked.device != "cpu":
        check_switches(asked, resolved.attack, resolved.optim, method, torch.device("cuda"))
    with process_state_kept():
        build_networks(resolved, method, split.info, SilentFallbacks(), load_sources=True)


def _on_cpu(engine: EngineConfig) -> EngineConfig:
    """`engine` on the CPU of this machine, with nothing to verify, compile or time."""
    return replace(
        engine,
        device="cpu",
        amp="off",
        compile="off",
        kernels="eager",
        channels_last="off",
        winograd="off",
        graphs="off",
        guide_stream="off",
        fused_conv="off",
    )
