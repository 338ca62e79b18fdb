"""The training state on disk: everything beside the weights that makes a resumed run equal to an uninterrupted one."""

import warnings
from pathlib import Path
from typing import Any

import torch

from fastdynat.config import TrainConfig, to_flat
from fastdynat.errors import UserError
from fastdynat.runs.files import sync_file

FORMAT = "fastdynat-state/1"


# What a resumed run may change: where it runs and what it reports, nothing of what it computes. (epochs is checked against the
# schedule, loader below.)
RESUMABLE = {
    "data_dir",
    "download",
    "workers",
    "device",
    "kernels",
    "check_fidelity",
    "boundary_speed",
    "graphs",
    "guide_stream",
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


def identity(config: TrainConfig[Any]) -> dict[str, Any]:
    """The part of a resolved configuration that a run keeps for life.

    An image folder keeps its loader, because decoders differ; other data give every loader the same batches.
    """
    free = RESUMABLE if config.data.data == "imagefolder" else RESUMABLE | {"loader"}
    return {key: value for key, value in to_flat(config).items() if key not in free}


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values only, so that it opens with ``weights_only=True``)."""
    torch.save({"format": FORMAT, **state}, path)
    sync_file(path)


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, without running code from the file.

    Raises:
        UserError: missing, truncated, or not a training state.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on foreign pickles; the error below is enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: this checkpoint cannot be resumed") from None
    except Exception as error:  # the restricted unpickler fails in many ways, all of which mean the same
        raise UserError(f"{path} is truncated or not a training state ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a fastdynat training state (its format is not {FORMAT})")
    return state
