"""The configuration of a run: typed, frozen, flat.

Every field is one command-line flag and one key of a configuration file, both of the field's name, so names
are unique across groups. Fields whose default depends on data, model or method are "auto" or None until
`fastdynat.training.resolve` fills them; the resolved configuration is what a run stores. The string under a
field is its help text.
"""

from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from fastdynat.config.attack_config import AttackConfig
from fastdynat.config.augmentation_config import AugmentationConfig
from fastdynat.config.data_config import DataConfig
from fastdynat.config.engine_config import EngineConfig
from fastdynat.config.extra_config import ExtraConfig
from fastdynat.config.model_config import ModelConfig
from fastdynat.config.optim_config import OptimConfig
from fastdynat.config.run_config import RunConfig

OptionsT = TypeVar("OptionsT")
EvalAmp = Literal["off", "auto", "bf16", "fp16"]

GROUPS = ("data", "extra", "augmentation", "model", "attack", "optim", "engine", "run")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Generic[OptionsT]):
    """Train a network."""

    method: str = "dynat"
    """Training method: a name of fastdynat.methods, or path/to/file.py:CLASS for your own. --method NAME
    --help lists its options."""
    options: OptionsT
    data: DataConfig = field(default_factory=DataConfig)
    extra: ExtraConfig = field(default_factory=ExtraConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)
