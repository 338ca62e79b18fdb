"""Comparison of the processes of an evaluation before the first attack."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fastdynat import __version__
from fastdynat.commands.evaluate.columns import AttackColumn
from fastdynat.commands.evaluate.measurement_store import search_numbers
from fastdynat.commands.evaluate.targets import Target
from fastdynat.config.eval_config import EvalConfig
from fastdynat.distributed import require_alike, world
from fastdynat.errors import ToldElsewhere, UserError
from fastdynat.runs import package_digest


def require_same_config(names: Sequence[str | Path], config: EvalConfig) -> None:
    """Refuse ranks that differ in flags, networks, package version or source."""
    if world().alone:
        return
    facts: dict[str, object] = {
        "the version of fastdynat": __version__,
        "the source of fastdynat": package_digest(),
        "the version of torch": torch.__version__,
    }
    flags = {f"--{key.replace('_', '-')}": value for key, value in asdict(config).items()}
    require_alike({**facts, "the networks": " ".join(map(str, names)), **flags})


def require_same_targets(targets: Sequence[Target]) -> None:
    """Refuse ranks that differ in weights, images or attacks, and a world size above the number of images.

    Raises:
        UserError: on rank 0.
        ToldElsewhere: on the other ranks.
    """
    here = world()
    if here.alone:
        return
    for target in targets:
        attacks = [_numbers(column) for column in target.columns]
        require_alike(
            {
                f"the weights of {target.title}": target.weights[:16],
                "the test images": target.digest[:16],
                "the number of images": len(target.images),
                "the attacks": hashlib.sha256(repr(attacks).encode()).hexdigest()[:16],
            }
        )
        if len(target.images) < here.size:
            raise refusal(
                f"{len(target.images)} images cannot be split over {here.size} processes: start fewer, or "
                "evaluate more images (--num-images)"
            )


def refusal(text: str) -> UserError:
    """An error that every rank raises and only rank 0 reports."""
    return UserError(text) if world().first else ToldElsewhere(text)


def _numbers(column: AttackColumn) -> object:
    attacks = [attack for attack in (column.attack, *column.stages) if attack is not None]
    return column.name, column.reference, [search_numbers(attack.search) for attack in attacks]
