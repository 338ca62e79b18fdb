"""`fastdynat compare`: the flags and the checks that need no torch."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastdynat.commands.compare.compare_config import (
    CompareConfig,
    NoOptions,
    method_configs,
    parse_seeds,
    shared_config,
)
from fastdynat.commands.message_flags import LevelFlag, printed_messages
from fastdynat.commands.parsing.parse import OtherMethodsFlags, early_flags, parse
from fastdynat.config import (
    AttackConfig,
    AugmentationConfig,
    DataConfig,
    EngineConfig,
    ExtraConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from fastdynat.config.train_checks import check_train_config
from fastdynat.config.value_ranges import check_values
from fastdynat.errors import UserError
from fastdynat.methods.options import check_options


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Train several methods on the same data, model, budget and seeds, evaluate them, and compare. The
    training flags are for all of them; --set is for one.
    """

    config: str | None = None
    """YAML file of training flags; flags given here win."""
    messages: LevelFlag = field(default_factory=LevelFlag)
    compare: CompareConfig = field(default_factory=CompareConfig)
    data: DataConfig
    extra: ExtraConfig
    augmentation: AugmentationConfig
    model: ModelConfig
    attack: AttackConfig
    optim: OptimConfig
    engine: EngineConfig
    run: LogConfig


# The options of methods are no flags of compare; --set takes them.
OWN_OF_METHODS = {
    flag: f"{why}; write --set METHOD.KEY=VALUE" for flag, why in OtherMethodsFlags(NoOptions).items()
}


def compare_command(argv: list[str]) -> int:
    """Run `fastdynat compare`."""
    file = early_flags(argv).get("--config")
    shared = shared_config(None if file is None else Path(file))
    groups: dict[str, Any] = {
        name: getattr(shared, name)
        for name in ("data", "extra", "augmentation", "model", "attack", "optim", "engine")
    }
    log = LogConfig(**{f.name: getattr(shared.run, f.name) for f in dataclasses.fields(LogConfig)})
    default = CompareCommand(config=file, run=log, **groups)
    command = parse(CompareCommand, argv, "compare", default=default, elsewhere=OWN_OF_METHODS).command
    asked = replace(
        shared, run=RunConfig(**vars(command.run)), **{name: getattr(command, name) for name in groups}
    )
    check_train_config(asked)
    check_values(command.compare)
    parse_seeds(command.compare.seeds, asked.engine.seed)
    for method, config in method_configs(asked, command.compare).items():
        try:
            check_train_config(config)
            check_options(config.options)
        except UserError as error:
            raise UserError(f"{method}: {error}") from None

    from fastdynat.terminal.consoles import error_console, output_console
    from fastdynat.terminal.progress import ProgressDisplay

    errors, quiet = error_console(), command.run.quiet
    with printed_messages(command.messages.log_level, errors, quiet=quiet):
        from fastdynat.commands.compare.compare_methods import compare_methods

        return compare_methods(asked, command.compare, output_console(), ProgressDisplay(errors, quiet=quiet))
