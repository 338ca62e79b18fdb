"""The start of a run on several processes: rank 0 settles everything, and all begin alike.

Without a launcher each of these functions does for the only process what it says, or nothing.
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import fastdynat
from fastdynat.config import TrainConfig, override, to_flat
from fastdynat.data import Images, TrainSplit
from fastdynat.distributed import all_can, first_decides, in_turns, require_alike, world
from fastdynat.launch import local_rank
from fastdynat.runs import marked_folder, package_digest, require_shared
from fastdynat.training.networks import NetworkSet
from fastdynat.training.parts import RunParts, open_split
from fastdynat.training.rank_weights import require_equal_weights, take_first_weights
from fastdynat.training.resolve import resolve
from fastdynat.training.resolved_config import ResolvedConfig


def require_same_command(config: TrainConfig[Any]) -> None:
    """Refuse ranks with another configuration, version or source of this package, or version of torch."""
    if world().alone:
        return
    facts: dict[str, object] = {
        "the version of fastdynat": fastdynat.__version__,
        "the source of fastdynat": package_digest(),
        "the version of torch": torch.__version__,
    }
    asked = to_flat(config)
    require_alike(facts | {f"--{key.replace('_', '-')}": value for key, value in asked.items()})


def settled_by_first(
    asked: TrainConfig[Any], settle: Callable[[], tuple[ResolvedConfig[Any], TrainSplit]]
) -> tuple[ResolvedConfig[Any], TrainSplit]:
    """The result of `settle` on rank 0: the configuration as it is, the data opened by each rank.

    Rank 0 opens the data first, then one process of each other machine, then the rest, so that data that are
    downloaded are downloaded once.

    Args:
        asked: the configuration before `settle`, the same on all ranks.
    """
    here = world()
    if here.alone:
        return settle()
    found: list[tuple[ResolvedConfig[Any], TrainSplit]] = []

    def values() -> dict[str, Any]:
        found.append(settle())
        return to_flat(found[0][0])

    flat = first_decides(values)
    split = in_turns(lambda: found[0][1] if found else open_split(asked))
    if found:
        resolved = found[0][0]
        all_can(lambda: resolved)
    else:
        given = override(asked, flat, "rank 0")
        resolved = all_can(lambda: resolve(given, split.info, announce=False, carried_on=True))
    require_alike({f"--{key.replace('_', '-')}": value for key, value in to_flat(resolved).items()})
    return resolved, split


def require_shared_folder(path: Path) -> None:
    """Refuse a machine that does not see the run directory `path` as rank 0's does."""
    here = world()
    if here.alone:
        return
    with marked_folder(path) if here.first else nullcontext() as mark:
        place = here.from_first(str(mark))
        all_can(lambda: require_shared(Path(place), path) if local_rank() == 0 else None)


def begin_alike(parts: RunParts, val: Images) -> None:
    """Refuse ranks with other networks or data; then all take over rank 0's weights."""
    here = world()
    if here.alone:
        return
    trained_on = parts.loader.state_dict()
    require_alike(
        {
            "the training data": (trained_on["checksum"], trained_on["content"]),
            "the validation data": (val.checksum(), val.content()),
            "the networks": _signature(parts.networks),
        }
    )
    take_first_weights(parts.networks)
    require_equal_weights(parts.networks, "at the start")


def _signature(networks: NetworkSet) -> str:
    """A digest of the names, shapes and types of the networks' tensors."""
    told = [
        (role, name, tuple(tensor.shape), str(tensor.dtype))
        for role, module in networks.raw.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
