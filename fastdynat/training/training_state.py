"""Training state on disk (state.pt): everything beside the weights that resuming a run exactly needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdynat.config import TrainConfig, to_flat
from fastdynat.documents import convert
from fastdynat.documents.numbers import Count, Finite
from fastdynat.documents.tensor_files import read_pickle
from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import saving
from fastdynat.user_code import is_hub_data, without_place

FORMAT = "fastdynat-state/1"
# Options that a resumed run may change: where it runs and what it reports, not what it computes. `epochs` is
# checked against the schedule, `loader` in `fixed_settings`.
RESUMABLE = {
    "data_dir",
    "download",
    "extra_data",
    "extra_labels",
    "workers",
    "device",
    "kernels",
    "check_fidelity",
    "boundary_speed",
    "graphs",
    "grad_checkpointing",
    "guide_stream",
    "rank_timeout",
    "grad_accum_steps",
    "zero1",
    "epochs",
    "stop_after",
    "stop_at",
    "patience",
    "on_collapse",
    "save_every",
    "tensorboard",
    "quiet",
    "run_dir",
    "overwrite",
}


@dataclass(frozen=True, kw_only=True)
class _Averages:
    """`metrics.Averages.state_dict`."""

    images: Count
    sums: dict[str, Any]
    counts: dict[str, Finite] | None = None  # not in states of earlier versions


@dataclass(frozen=True, kw_only=True)
class _Watch:
    """`watch.Watch.state_dict`."""

    best: Finite | None
    stale: Count
    robust: Finite
    trained: Finite
    collapsed: bool
    guessing: Count = 0  # not in states of earlier versions
    guessing_said: bool = False
    near_robust: Finite | None = None
    near_trained: Finite | None = None


@dataclass(frozen=True, kw_only=True)
class _State:
    """`trainer.Trainer.state_dict` without its tensors, which are checked where they are restored."""

    epoch: Count
    epoch_step: Count
    global_step: Count
    optimizers: list[dict[str, Any]]
    scaler: dict[str, Any]
    ema_updates: Count | None
    rng: dict[str, Any]
    loader: dict[str, Any]
    averages: _Averages
    method: dict[str, Any]
    seconds: Finite
    watch: _Watch
    last_validation: dict[str, Any]
    config: dict[str, Any]
    row: dict[str, bool | int | float | None] | None = None


def fixed_settings(config: TrainConfig[Any]) -> dict[str, Any]:
    """The options of a resolved configuration that a run keeps for life.

    A file of the user's may move. For images in files the loader is fixed too, because decoders differ;
    other data look the same to all loaders.
    """
    in_files = config.data.data == "imagefolder" or is_hub_data(config.data.data)
    free = RESUMABLE if in_files else RESUMABLE | {"loader"}
    kept = {key: value for key, value in to_flat(config).items() if key not in free}
    return kept | {key: without_place(str(kept[key])) for key in ("method", "data", "model", "guide")}


def write_training_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, tensors and plain values that open with ``weights_only=True``. Raises WriteError."""
    with saving(path, needed=bytes_of(state)) as file:
        torch.save({"format": FORMAT, **state}, file)


def snapshot(value: Any) -> Any:
    """`value`, a nest of mappings and sequences, with its tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    return type(value)(snapshot(item) for item in value) if isinstance(value, (list, tuple)) else value


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a nest of mappings and sequences."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(bytes_of(item) for item in value.values())
    return sum(bytes_of(item) for item in value) if isinstance(value, (list, tuple)) else 0


def read_training_state(path: Path) -> dict[str, Any]:
    """Read what `write_training_state` wrote, without running code from the file.

    Raises:
        UserError: missing, truncated, or not a training state.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: this checkpoint cannot be resumed")
    state = read_pickle(path, what="a training state", remedy="start a new run, or bring the file back")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a fastdynat training state (its format is not {FORMAT})")
    convert(state, _State, origin=str(path))
    return state
