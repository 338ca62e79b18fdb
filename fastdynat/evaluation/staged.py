"""Attacks in stages, each on the images that are still robust, with a state file to resume from."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from fastdynat.distributed import ALONE, world
from fastdynat.documents import read_json, through_json
from fastdynat.documents.numbers import Count, Finite, Share
from fastdynat.errors import UserError
from fastdynat.evaluation.measure_on_ranks import on_all_ranks
from fastdynat.evaluation.network_identity import PROBED, digest, network_digests
from fastdynat.evaluation.outcome import pack_bits, unpack_bits
from fastdynat.evaluation.unit_images import UnitImages
from fastdynat.runs import check_writable, code_version
from fastdynat.runs.atomic_files import write_text

FORMAT = "fastdynat-autoattack/1"
Bits = Annotated[str, Meta(pattern=r"^([0-9a-f]{2})*$")]
StageDone = Callable[[str, float, float], None]  # name, robust accuracy, total seconds
# Name of a stage, images, labels, and the images' numbers in the evaluated set -> adversarial images.
Attack = Callable[[str, Tensor, Tensor, Tensor], Tensor]
Fooled = Callable[[Tensor, Tensor, Tensor], Tensor]  # adversarial images, images, labels -> (N,) bool


@dataclass
class Progress:
    """State of a staged evaluation; plain JSON values. Masks are packed by `pack_bits`.

    Attributes:
        identity: everything that the result depends on, by name.
        seed: of every stage.
        entering: images that were robust when the current stage began.
        robust: images that are robust now.
        batches: finished batches of the current stage.
        seconds: time of each stage so far.
        accuracies: robust accuracy after each finished stage.
    """

    identity: dict[str, Any]
    seed: Count
    entering: Bits
    robust: Bits
    batches: Count = 0
    seconds: dict[str, Finite] = field(default_factory=dict)
    accuracies: dict[str, Share] = field(default_factory=dict)


def evaluation_identity(
    model: object,
    clean: Tensor,
    x: Tensor | UnitImages,
    y: Tensor,
    classes: Callable[[Tensor], Tensor],
    **numbers: Any,
) -> dict[str, Any]:
    """`numbers` with digests of images, labels and network, and the version of the code that measures.

    Args:
        clean: (N,) predictions on `x`.
        classes: the model's prediction of a batch.
    """
    probed = x[torch.arange(min(PROBED, len(x)))]
    own = network_digests(model, clean, probed, classes)
    return {**own, "images": digest([x, y]), "version of fastdynat": code_version(), **numbers}


def standing(progress: Progress, images: int) -> Tensor:
    """(N,) bool on the CPU: the images that are robust now."""
    return unpack_bits(progress.robust, images)


def restore(path: Path | None, own: dict[str, Any]) -> Progress | None:
    """The state at `path` of the evaluation with the identity `own`; None without a file.

    Raises:
        UserError: the file cannot be written or read, or belongs to another evaluation; names what differs.
    """
    if path is None:
        return None
    check_writable(path)
    if not path.exists():
        return None
    remedy = "name another file, or remove it"
    known = read_json(
        path, Progress, what="the state of an AutoAttack evaluation", format=FORMAT, remedy=remedy
    )
    own = through_json(own)
    different = {
        name for name in own.keys() | known.identity.keys() if own.get(name) != known.identity.get(name)
    }
    if "images" in different:
        different.discard("predictions")  # of these images
    if different:
        raise UserError(
            f"{path} is of another evaluation: {', '.join(sorted(different))} differ; name another state file"
        )
    return known


def run_stages(
    attack: Attack,
    fooled: Fooled,
    x: Tensor | UnitImages,
    y: Tensor,
    progress: Progress,
    stages: Sequence[str],
    batch_size: int,
    path: Path | None,
    done: StageDone,
    *,
    x_adv: Tensor | None = None,
    on_ranks: bool = False,
) -> None:
    """Run the unfinished ones of `stages`; updates `progress`, and stores it at `path` after every batch.

    Args:
        done: called after each stage.
        x_adv: (N, C, H, W); gets the adversarial images of those that this process breaks. None drops them.
        on_ranks: deal the batches, the same as one process has, out to the processes of the world, batch b to
            rank b mod W; `progress` is the same on all of them.

    Raises:
        Stopped: `attack` or `fooled` raised it, on any rank.
    """
    robust = unpack_bits(progress.robust, len(x))
    here = world() if on_ranks else ALONE

    def fallen(name: str, batches: Sequence[Tensor]) -> list[Tensor]:
        """The rows of each batch that fall."""
        found_rows = []
        for rows in batches:
            at = rows.to(x.device)
            found = attack(name, x[at], y[at], rows)
            fell = fooled(found, x[at], y[at])
            if x_adv is not None:
                x_adv[at[fell]] = found[fell]
            found_rows.append(rows[fell.cpu()])
        return found_rows

    for name in stages:
        if name in progress.accuracies:
            continue
        standing = unpack_bits(progress.entering, len(x)).nonzero().squeeze(1)
        batches = standing.split(batch_size)[progress.batches :] if len(standing) else ()
        progress.seconds.setdefault(name, 0.0)
        for first in range(0, len(batches), here.size):
            start, now = time.perf_counter(), batches[first : first + here.size]
            own = partial(fallen, name, now[here.rank : here.rank + 1])
            for rows in chain(*(on_all_ranks(own) if on_ranks else [own()])):
                robust[rows] = False
            progress.robust, progress.batches = pack_bits(robust), progress.batches + len(now)
            progress.seconds[name] += time.perf_counter() - start
            _store(progress, path)
        accuracy = float(robust.double().mean())
        progress.accuracies[name] = accuracy
        progress.entering, progress.batches = progress.robust, 0
        _store(progress, path)
        done(name, accuracy, sum(progress.seconds.values()))


def stage_summary(name: str, accuracy: float, seconds: float) -> str:
    """The line for a finished stage, as AutoAttack prints it."""
    return f"robust accuracy after {name.upper()}: {accuracy:.2%} (total time {seconds:.1f} s)"


def begin(own: dict[str, Any], clean: Tensor, seed: int) -> Progress:
    """The state before the first stage; `clean` (N,) bool are the correctly classified images."""
    bits = pack_bits(clean)
    return Progress(own, seed, bits, bits)


def _store(progress: Progress, path: Path | None) -> None:
    if path is not None:
        write_text(path, json.dumps({"format": FORMAT, **asdict(progress)}) + "\n")
