"""The YAML file of --submit: parameters of submitit's executor, checked before a job is made of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdynat.config import read_config_file
from fastdynat.documents import short_repr
from fastdynat.errors import UserError, unknown_name

CLUSTERS = ("slurm", "local")
OWN = ("folder", "cluster", "slurm_max_num_timeout", "local_max_num_timeout")
DEFAULT_FOLDER = "slurm"
# submitit ends a job after three time limits by default, which would cut long runs short.
TIME_LIMITS = 1000
# Seconds between the signal and the time limit, for the step in hand and a checkpoint.
SIGNAL_DELAY = 120
# Keys that would undo what the tasks rely on.
REFUSED = {
    "slurm_array_parallelism": "one job is submitted, no array; leave it out",
    "slurm_gpus_per_task": "each task must see all GPUs of its node; write gpus_per_node",
    "slurm_ntasks_per_node": "write tasks_per_node",
    "slurm_num_gpus": "write gpus_per_node",
    "slurm_use_srun": "srun starts the tasks; leave it out",
}
NUMBERS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class JobFile:
    """A checked file.

    Attributes:
        cluster: "slurm", or "local": processes on this machine, for tests.
        folder: of logs and of the stored job; %j in it stands for the number of the job.
        parameters: for `submitit.AutoExecutor.update_parameters`.
        options: for the constructor of `submitit.AutoExecutor`.
        nodes, tasks_per_node: the processes; one per GPU.
    """

    cluster: str
    folder: str
    parameters: dict[str, Any]
    options: dict[str, Any]
    nodes: int
    tasks_per_node: int

    @property
    def tasks(self) -> int:
        """Processes of the job."""
        return self.nodes * self.tasks_per_node


def read_job_file(path: Path, name: str) -> JobFile:
    """The job that the file at `path` describes; `name` is the job's name where the file has none.

    Raises:
        UserError: it cannot be read; an unknown key (the nearest are suggested) or a value of a wrong type;
            tasks that are not one per GPU; no time limit.
    """
    values = {key: value for key, value in read_config_file(path).items() if value is not None}
    _check_keys(values, path)
    cluster = str(values.get("cluster", "slurm"))
    if cluster not in CLUSTERS:
        raise UserError(f"{path}: {unknown_name('cluster', cluster, CLUSTERS)}")
    nodes, tasks = values.get("nodes", 1), _tasks_per_node(values, path)
    if nodes < 1 or tasks < 1:
        raise UserError(f"{path}: nodes and tasks_per_node must be at least 1, got {nodes} and {tasks}")
    if cluster == "local" and nodes > 1:
        raise UserError(f"{path}: nodes {nodes}: cluster local is this machine alone; leave nodes out")
    _check_time(values, cluster, path)
    parameters = {key: value for key, value in values.items() if key not in OWN}
    parameters |= {"nodes": nodes, "tasks_per_node": tasks, "name": values.get("name", name)}
    parameters.setdefault("stderr_to_stdout", True)  # one log per task
    if cluster == "slurm":
        _add_slurm_defaults(parameters)
    limits = f"{cluster}_max_num_timeout"
    return JobFile(
        cluster,
        str(values.get("folder", DEFAULT_FOLDER)),
        {key: value for key, value in parameters.items() if _concerns(key, cluster)},
        {limits: values.get(limits, TIME_LIMITS)},
        nodes,
        tasks,
    )


def _concerns(key: str, cluster: str) -> bool:
    """True unless `key` is for another cluster."""
    return not any(key.startswith(f"{other}_") for other in CLUSTERS if other != cluster)


def _check_keys(values: Mapping[Any, Any], path: Path) -> None:
    from submitit import AutoExecutor
    from submitit.core.plugins import get_executors

    typed = AutoExecutor._typed_parameters()
    executors = {name: executor for name, executor in get_executors().items() if name in CLUSTERS}
    specific = {
        f"{name}_{key}" for name, ex in executors.items() for key in ex._valid_parameters() - {*typed}
    }
    known = {*OWN, *typed, *specific} - REFUSED.keys()
    for key, value in values.items():
        if key in REFUSED:
            raise UserError(f"{path}: {key} cannot be used: {REFUSED[key]}")
        if key not in known:
            raise UserError(f"{path}: {unknown_name('key', str(key), known)}")
        kind = int if key.endswith("max_num_timeout") else str if key in OWN else typed.get(key, object)
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind in (int, float)):
            raise UserError(f"{path}: {key} must be {NUMBERS[kind]}, got {short_repr(value)}")


def _tasks_per_node(values: Mapping[str, Any], path: Path) -> int:
    """One task per GPU; without GPUs as many as the file says."""
    gpus, tasks = values.get("gpus_per_node", 0), values.get("tasks_per_node")
    if gpus and tasks is not None and tasks != gpus:
        raise UserError(
            f"{path}: tasks_per_node {tasks} with gpus_per_node {gpus}: each task trains on one GPU; "
            "leave tasks_per_node out"
        )
    return int(gpus or 1) if tasks is None else int(tasks)


def _check_time(values: Mapping[str, Any], cluster: str, path: Path) -> None:
    if "timeout_min" not in values and not (cluster == "slurm" and "slurm_time" in values):
        raise UserError(
            f"{path} needs timeout_min: the minutes after which the job is stopped, requeued and resumed"
        )
    minutes, delay = values.get("timeout_min"), values.get("slurm_signal_delay_s", SIGNAL_DELAY)
    if minutes is not None and minutes < 1:
        raise UserError(f"{path}: timeout_min must be at least 1, got {minutes}")
    if cluster == "slurm" and minutes is not None and "slurm_time" not in values and 60 * minutes <= delay:
        raise UserError(
            f"{path}: timeout_min {minutes}: the run is told to save {delay} seconds before the time limit "
            "(slurm_signal_delay_s); allow more minutes"
        )


def _add_slurm_defaults(parameters: dict[str, Any]) -> None:
    parameters.setdefault("slurm_signal_delay_s", SIGNAL_DELAY)
    # A node that fails takes the job with it: SLURM starts it again, and the run resumes.
    more = dict(parameters.get("slurm_additional_parameters") or {})
    if not {"requeue", "no-requeue", "no_requeue"} & more.keys():
        more["requeue"] = True
    parameters["slurm_additional_parameters"] = more
    # A rank that fails ends the others at once, instead of at the time limit of a collective.
    arguments = ["--kill-on-bad-exit=1"]
    if "cpus_per_task" in parameters:  # since 22.05 srun no longer takes it from sbatch
        arguments.append(f"--cpus-per-task={parameters['cpus_per_task']}")
    parameters["slurm_srun_args"] = [*arguments, *(parameters.get("slurm_srun_args") or ())]
