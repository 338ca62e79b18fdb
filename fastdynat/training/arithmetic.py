"""Arithmetic of a run (precision, operators, device) for its record, and how exactly it can be resumed."""

from typing import Any

import torch

from fastdynat.attack_engine.winograd_layers import RULE
from fastdynat.execution.float32 import float32_name
from fastdynat.ops import operators_in_use, winograd_usable
from fastdynat.ops.image_draws import VERSION
from fastdynat.runs.environment import UNUSED
from fastdynat.training.resolved_config import ResolvedEngine


def arithmetic(engine: ResolvedEngine) -> dict[str, Any]:
    """The arguments of `record_start`. To be called under `use_backend` with the run's operators."""
    device = torch.device(engine.device)
    precision = float32_name(device) if engine.amp == "off" else engine.amp
    may_be = device.type == "cpu" and engine.amp == "off" and engine.winograd != "off"
    may_be = may_be and winograd_usable(device)
    return {
        "operators": operators_in_use(device),
        "on_cpu": device.type == "cpu",
        "precision": precision,
        "winograd": RULE if may_be else UNUSED,
        "draws": VERSION,
    }


def rounding_of_resume(engine: ResolvedEngine) -> str | None:
    """The reason why a resumed run differs from an uninterrupted one in rounding; None where it does not.

    On a GPU cuDNN times its algorithms in each process anew, and some operations add in no fixed order,
    unless the run is `deterministic`."""
    if torch.device(engine.device).type != "cuda" or engine.deterministic:
        return None
    return (
        "cuDNN chooses its algorithms anew in each process; "
        "--deterministic makes resuming exact but training slower"
    )
