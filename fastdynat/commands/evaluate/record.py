"""One network's results as the JSON file holds them."""

import statistics
from collections.abc import Sequence
from math import inf, isfinite
from typing import Any

import torch

from fastdynat.attacks.registry import CLEAN
from fastdynat.commands.evaluate.columns import AttackColumn
from fastdynat.commands.evaluate.targets import Radius, Target
from fastdynat.evaluation.outcome import pack_bits, unpack_bits, wilson

Values = dict[str, Any]
FORMAT = "fastdynat-eval/2"


def make_record(
    target: Target, results: list[Values], cached: list[str], checks: list[Values] | None
) -> Values:
    """The record of `target` with the results of its first columns.

    Keys: what the network is; `judged_in`, the precision of the predictions that count; `robustness_gap`,
    clean accuracy less the lowest one under attack; `worst`, images that stay correct under everything in the
    ball (`worst_case`); `in_ball`, the attacks that count in the ball, and clean accuracy; `attacks`, the
    measurements; `cached`, the names of those that were read from files; `checks`, of masked gradients, or
    None where they were not asked for; `union`, see `with_unions`.
    """
    radius, columns = target.radius, target.columns[: len(results)]
    in_ball = [
        r for column, r in zip(columns, results, strict=True) if counts_in_ball(column, r, radius.norm)
    ]
    clean = next((r["accuracy"] for r in results if r["attack"] == CLEAN), None)
    robust = [r["accuracy"] for r in in_ball if r["attack"] != CLEAN]
    return {
        "run": target.name,
        "checkpoint": target.checkpoint,
        "weights_sha256": target.weights,
        **target.trained,
        "norm": radius.norm,
        "eps": radius.eps,
        "step_size": radius.step_size,
        "judged_in": "float32",  # without TF32 (`exact_float32`), whatever --amp searches in
        "data": target.info.name,
        "images": len(target.images),
        "images_sha256": target.digest,
        "shard": None if target.shard is None else str(target.shard),
        "class_names": list(target.info.class_names),
        "source_sha256": None if target.source is None else target.source.weights,
        "robustness_gap": clean - min(robust) if clean is not None and robust else None,
        "worst": worst_case(in_ball),
        "in_ball": [r["attack"] for r in in_ball],
        "attacks": results,
        "cached": cached,
        "checks": checks,
        "union": None,
    }


def with_unions(records: list[Values]) -> list[Values]:
    """`records` with `union`: images that stay correct under every attack in every ball of a checkpoint.

    None for checkpoints with a single record, which is about one norm, and without attacks in the balls.
    """
    groups: dict[tuple[Any, ...], list[Values]] = {}
    for record in records:
        groups.setdefault((record["run"], record["checkpoint"], record["weights_sha256"]), []).append(record)
    unions = {key: _union(group) for key, group in groups.items()}
    return [
        record | {"union": unions[record["run"], record["checkpoint"], record["weights_sha256"]]}
        for record in records
    ]


def _union(group: list[Values]) -> Values | None:
    norms = list(dict.fromkeys(record["norm"] for record in group))
    found = (record["worst"] or _only_attack(record) for record in group)
    worst = [values for values in found if values is not None]
    if len(norms) < 2 or len(worst) < len(group):
        return None
    return worst_case(worst, names=norms)


def counts_in_ball(column: AttackColumn, result: Values, norm: str) -> bool:
    """True for accuracies inside the ball of `norm`: neither of another norm nor of a radius-free search."""
    return _limited(None if column.attack is None else column.attack.search, result["distances"], norm)


def judged_radius(
    search: Any, distances: Sequence[float | None] | None, radius: Radius
) -> tuple[str, float | None]:
    """The norm and the radius that an accuracy is about; None where it is not that of the ball of `radius`.

    Args:
        search: of the attack; None is clean accuracy or AutoAttack.
        distances: of the measurement under the attack.
    """
    norm = radius.norm if search is None else search.norm
    return norm, radius.eps if _limited(search, distances, radius.norm) else None


def _limited(search: Any, distances: Sequence[float | None] | None, norm: str) -> bool:
    """True where only images in the row's ball of `norm` count as adversarial."""
    if search is None:  # clean, and AutoAttack, which takes the row's radius
        return True
    return bool(search.norm == norm and (distances is None or isfinite(getattr(search, "eps", inf))))


def _only_attack(record: Values) -> Values | None:
    """The single result of `record` that counts in the ball, if it is of an attack."""
    found = [r for r in record["attacks"] if r["attack"] in record["in_ball"]]
    return found[0] if len(found) == 1 and found[0]["attack"] != CLEAN else None


def worst_case(results: list[Values], names: list[str] | None = None) -> Values | None:
    """Images that stay correct under each of `results`; None for fewer than two.

    names: of the results; None is their attacks'.
    """
    if len(results) < 2:
        return None
    standing = torch.stack([unpack_bits(r["robust_bits"], r["images"]) for r in results]).all(0)
    correct, images = int(standing.sum()), len(standing)
    return {
        "attacks": [r["attack"] for r in results] if names is None else names,
        "accuracy": correct / images,
        "ci": wilson(correct, images),
        "correct": correct,
        "images": images,
        "robust_bits": pack_bits(standing),
    }


def median_distance(result: Values) -> float | None:
    """Over all images: misclassified ones count 0, robust ones infinite; None is an infinite median."""
    distances = [float("inf") if d is None else d for d in result["distances"]]
    median = statistics.median(distances)
    return None if median == float("inf") else median
