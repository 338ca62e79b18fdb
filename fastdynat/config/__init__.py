"""The configuration of a run: typed, frozen, flat."""

from fastdynat.config.flat_keys import override, read_config_file, to_flat, to_yaml
from fastdynat.config.train_config import (
    GROUPS,
    AttackConfig,
    AutoAmp,
    CompileMode,
    DataConfig,
    EngineConfig,
    EvalAmp,
    Kernels,
    Loader,
    LogConfig,
    ModelConfig,
    OptimConfig,
    OptionsT,
    RunConfig,
    Switch,
    TrainConfig,
)
from fastdynat.config.value_ranges import check_seed

__all__ = [
    "GROUPS",
    "AttackConfig",
    "AutoAmp",
    "CompileMode",
    "DataConfig",
    "EngineConfig",
    "EvalAmp",
    "Kernels",
    "Loader",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "OptionsT",
    "RunConfig",
    "Switch",
    "TrainConfig",
    "check_seed",
    "override",
    "read_config_file",
    "to_flat",
    "to_yaml",
]
