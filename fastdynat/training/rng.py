"""Seeds and random-generator states."""

import logging
import os
import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed every global generator; `deterministic` also refuses operations without a deterministic form."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # Shapes are fixed, so cuDNN may time its algorithms once and keep the fastest.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # Read by cuBLAS when its handle is made; without it deterministic matrix products raise.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the global generators and of that of `device`, as tensors and plain values that open with
    ``weights_only=True``.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(
        tuple[str, Any, int, int, float], np.random.get_state(legacy=True)
    )
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned, perhaps for another device; `device` is this process's."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type != "cuda":
        return
    if (of_gpu := _state_of_gpu(state["cuda"], device)) is None:
        logger.warning(
            "the checkpoint holds no random numbers' state for %s: what the network draws there, as dropout, "
            "starts anew",
            device,
        )
    else:
        torch.cuda.set_rng_state(of_gpu, device)


def _state_of_gpu(saved: Tensor | list[Tensor] | None, device: torch.device) -> Tensor | None:
    """The state for `device`; None if there is none. An earlier version saved a list of all GPUs it saw, not
    which of them was the run's: the only one, or else that of `device`'s number.
    """
    if not isinstance(saved, list):
        return saved
    if len(saved) == 1:
        return saved[0]
    number = torch.cuda.current_device() if device.index is None else device.index
    return saved[number] if number < len(saved) else None
