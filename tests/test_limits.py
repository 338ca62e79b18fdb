"""Every number of a configuration has a largest value."""

import dataclasses
import typing

import pytest

from fastdynat.benchmark import BenchConfig
from fastdynat.compare import CompareConfig
from fastdynat.config import AttackConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastdynat.errors import UserError
from fastdynat.evaluation import EvalConfig
from fastdynat.limits import MOST, check_limits
from fastdynat.report import ReportConfig

CONFIGS = [
    *(DataConfig, ModelConfig, AttackConfig, OptimConfig, EngineConfig, RunConfig),
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
    ),
    *("base_momentum", "max_momentum", "ema_warmup", "stop_at", "tolerance", "milestones"),
}


def numbers(config: type) -> list[str]:
    hints = typing.get_type_hints(config)
    kinds = {f.name: {hints[f.name], *typing.get_args(hints[f.name])} for f in dataclasses.fields(config)}
    return [name for name, found in kinds.items() if found & {int, float}]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_number_has_a_largest_value(config: type) -> None:
    missing = [name for name in numbers(config) if name not in MOST and name not in BOUNDED]
    assert not missing, f"add to fastdynat.limits.MOST: {missing}"
    for name in set(numbers(config)) & MOST.keys():
        check_limits(dataclasses.replace(config(), **{name: MOST[name]}))
        for beyond in (2 * MOST[name], 10**400, float("inf")):
            with pytest.raises(UserError, match=f"^{name} must be at most "):
                check_limits(dataclasses.replace(config(), **{name: beyond}))
