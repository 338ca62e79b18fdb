"""Every number of a configuration has a largest value."""

import dataclasses
import math
import typing

import pytest

from fastdynat.commands.bench.bench_config import BenchConfig
from fastdynat.commands.compare.compare_config import CompareConfig
from fastdynat.commands.evaluate.settle import EvalConfig
from fastdynat.commands.report.report_config import ReportConfig
from fastdynat.config import (
    AttackConfig,
    AugmentationConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from fastdynat.config.value_ranges import LARGEST, RANGES, check_largest, check_values
from fastdynat.errors import UserError

CONFIGS = [
    *(DataConfig, AugmentationConfig, ModelConfig, AttackConfig, OptimConfig, EngineConfig, RunConfig),
    *(EvalConfig, ReportConfig, BenchConfig, CompareConfig),
]
# Shares, and what has a bound of its own kind: radii in pixels, seeds, at most --steps.
BOUNDED = {
    *(
        "image_size",
        "eps",
        "step_size",
        "eval_eps",
        "seed",
        "early_steps",
        "early_share",
        "bn_momentum",
        "momentum",
        "warmup",
        "ema",
        "label_smoothing",
    ),
    *("scale", "ratio", "reprob", "mixup_prob", "mixup_switch_prob"),
    *("layer_decay", "base_momentum", "max_momentum", "ema_warmup", "stop_at", "tolerance", "milestones"),
}


def numbers(config: type) -> list[str]:
    hints = typing.get_type_hints(config)
    kinds = {f.name: {hints[f.name], *typing.get_args(hints[f.name])} for f in dataclasses.fields(config)}
    return [name for name, found in kinds.items() if found & {int, float}]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_number_has_a_largest_value(config: type) -> None:
    missing = [name for name in numbers(config) if name not in LARGEST and name not in BOUNDED]
    assert not missing, f"add to fastdynat.config.value_ranges.LARGEST: {missing}"
    for name in set(numbers(config)) & LARGEST.keys():
        check_largest(dataclasses.replace(config(), **{name: LARGEST[name]}))
        for beyond in (2 * LARGEST[name], 10**400, float("inf")):
            with pytest.raises(UserError, match=f"^{name} must be at most "):
                check_largest(dataclasses.replace(config(), **{name: beyond}))


def test_every_upper_bound_has_one_owner() -> None:
    """Each field has one upper end: `limits.LARGEST`, or that of `checks.RANGES`."""
    assert {key for key, limit in RANGES.items() if limit.most == math.inf} == RANGES.keys() & LARGEST.keys()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_decay", 1001.0, "weight_decay must be at most 1000, got 1001"),
        ("weight_decay", float("nan"), "weight_decay must be >= 0, got nan"),
        ("clip_grad", 1.1e9, "clip_grad must be at most 1e\\+09, got 1"),
        ("schedule_ahead", 10**6 + 1, "schedule_ahead must be at most 1e\\+06, got 1000001"),
        ("epochs", 0, "epochs must be >= 1, got 0"),
        ("lr", 0.0, "lr must be above 0, got 0"),
        ("lr", float("inf"), "lr must be at most 1e\\+30, got inf"),
        ("momentum", 1.0, r"momentum must be in \[0, 1\), got 1"),
    ],
)
def test_the_ends_of_the_optimisers_numbers(key: str, value: float, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_values(dataclasses.replace(OptimConfig(), **{key: value}))
