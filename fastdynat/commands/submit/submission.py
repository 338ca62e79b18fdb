"""Submission of a job through submitit, and what to type next."""

import hashlib
import importlib.util
import itertools
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdynat.commands.submit.job_file import JobFile, read_job_file
from fastdynat.commands.submit.preflight import check_before_submission
from fastdynat.commands.submit.train_task import TrainTask
from fastdynat.config import TrainConfig
from fastdynat.documents import read_bytes
from fastdynat.documents.yamls import LIMIT
from fastdynat.errors import UserError, first_line
from fastdynat.runs.atomic_files import make_folder, write_bytes

FLAG = "--submit"


def submit_training(
    file: str, argv: Sequence[str], config: TrainConfig[Any], early: Mapping[str, str]
) -> int:
    """Submit ``fastdynat train`` with the arguments `argv`; the exit code.

    Args:
        file: the YAML file.
        config: what `argv` means, unresolved.
        early: those of `argv` that `early_flags` finds.

    Raises:
        UserError: submitit is not installed; the file, or anything that the job would refuse on any machine;
            no scheduler here, or its refusal.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"{FLAG} needs submitit, which is not installed: pip install 'fastdynat[slurm]'")
    run_dir = _run_dir(config)
    job_file = read_job_file(Path(file), name=Path(run_dir).name)
    check_before_submission(config, tasks=job_file.tasks)
    arguments = without_flag(argv, FLAG)
    if "--config" in early:
        copy = _copied(Path(early["--config"]), job_file.folder)
        arguments = [*without_flag(arguments, "--config"), "--config", str(copy)]
    arguments += [] if "--resume" in early else ["--resume", "auto"]
    job = submit(job_file, TrainTask(tuple(arguments), os.getcwd()))
    print("\n".join(_next_steps(job, job_file, run_dir)))
    return 0


def _copied(file: Path, folder: str) -> Path:
    """A copy of the configuration `file` in the job's `folder`, named by its content.

    The job reads it when it starts and whenever it is requeued; the user may change `file` in the meantime.

    Raises:
        UserError: `file` is a pipe, which has been read.
        WriteError: the folder cannot be written.
    """
    content = read_bytes(file, limit=LIMIT, remedy="--submit needs a file that can be read again")
    # The number of the job, which %j stands for, is not known yet.
    parts = itertools.takewhile(lambda part: "%" not in part, Path(folder).absolute().parts)
    copy = Path(*parts) / f"config-{hashlib.sha256(content).hexdigest()[:16]}.yaml"
    make_folder(copy.parent)
    write_bytes(copy, content)
    return copy


def _run_dir(config: TrainConfig[Any]) -> str:
    if config.run.overwrite:
        raise UserError(
            f"--overwrite with {FLAG}: a requeued job would start over from scratch; remove the old run, or "
            "name another --run-dir"
        )
    if not config.run.run_dir:
        raise UserError(f"{FLAG} needs --run-dir, on a file system that this machine and all nodes share")
    return config.run.run_dir


def without_flag(argv: Sequence[str], flag: str) -> list[str]:
    """`argv` without `flag` and its value.

    >>> without_flag(["--lr", "1", "--submit", "job.yaml", "--submit=job.yaml", "--quiet"], "--submit")
    ['--lr', '1', '--quiet']
    """
    kept, words = list[str](), iter(argv)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def submit(job_file: JobFile, task: TrainTask) -> Any:
    """Hand `task` over; submitit's job. Raises UserError where the scheduler is missing or refuses."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    try:
        executor = submitit.AutoExecutor(job_file.folder, job_file.cluster, **job_file.options)
        executor.update_parameters(**job_file.parameters)
        with clean_env():  # the ranks of a job that this command may run in are not those of the new one
            return executor.submit(task)
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"sbatch refused the job: {said[-1].strip() if said else 'without a reason'}"
        ) from None
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        raise UserError(
            "there is no SLURM here (srun is not on PATH): submit from a login node, or write cluster: local"
        ) from None
    except (AssertionError, NameError, TypeError, ValueError) as error:  # submitit's checks of parameters
        raise UserError(f"submitit refuses the parameters: {first_line(error)}") from None


def _next_steps(job: Any, job_file: JobFile, run_dir: str) -> list[str]:
    """Lines about the submitted `job`: where it logs, how it is followed and cancelled."""
    log = job.paths.stdout
    logs = log.with_name(log.name.replace("_0_log", "_*_log"))
    slurm = job_file.cluster == "slurm"
    look = f"squeue -j {job.job_id}" if slurm else f"ps -p {job.job_id}"
    return [
        f"job {job.job_id} ({job_file.cluster}): {job_file.nodes} x {job_file.tasks_per_node} tasks",
        f"run directory: {run_dir} (must be on a file system that all nodes share)",
        f"logs: {logs}, one per task",
        f"follow: tail -F {shlex.quote(str(log))}",
        f"state: {look}",
        f"cancel: {'scancel' if slurm else 'kill -INT'} {job.job_id}",
    ]
