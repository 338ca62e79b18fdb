"""The configuration of a run: typed, frozen, flat."""

from fastdynat.config.attack_config import AttackConfig
from fastdynat.config.augmentation_config import AugmentationConfig
from fastdynat.config.data_config import DataConfig, Loader
from fastdynat.config.engine_config import AutoAmp, CompileMode, EngineConfig, Kernels
from fastdynat.config.extra_config import ExtraConfig
from fastdynat.config.flat_keys import override, read_config_file, to_flat, to_yaml
from fastdynat.config.model_config import ModelConfig
from fastdynat.config.optim_config import OptimConfig
from fastdynat.config.run_config import LogConfig, RunConfig
from fastdynat.config.switch import Switch
from fastdynat.config.train_config import GROUPS, EvalAmp, OptionsT, TrainConfig
from fastdynat.config.value_ranges import check_seed

__all__ = [
    "GROUPS",
    "AttackConfig",
    "AugmentationConfig",
    "AutoAmp",
    "CompileMode",
    "DataConfig",
    "EngineConfig",
    "EvalAmp",
    "ExtraConfig",
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
