"""The commands that take training flags without training one run: bench and compare."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastdynat.commands.bench import BenchConfig
from fastdynat.commands.bench.bench_config import check_bench
from fastdynat.commands.compare import CompareConfig, shared_config
from fastdynat.commands.compare.compare_config import NoOptions, method_configs, parse_seeds
from fastdynat.commands.message_flags import LevelFlag, MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import OtherMethodsFlags, early_flags, of_options, parse
from fastdynat.config import (
    AttackConfig,
    DataConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from fastdynat.config.train_checks import check_train_config
from fastdynat.config.value_ranges import check_values
from fastdynat.errors import UserError
from fastdynat.methods import method_name, options_type
from fastdynat.methods.options import check_options

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True, kw_only=True)
class BenchCommand(Generic[OptionsT]):
    """Time the attack and the training step of a setting; the training flags say which."""

    messages: MessageFlags = field(default_factory=MessageFlags)
    bench: BenchConfig = field(default_factory=BenchConfig)
    method: str = "dynat"
    """Training method, one of those that train takes, unless it has a search of its own."""
    options: OptionsT
    data: DataConfig = field(default_factory=lambda: DataConfig(data="cifar10"))
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


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
    model: ModelConfig
    attack: AttackConfig
    optim: OptimConfig
    engine: EngineConfig
    run: LogConfig


# compare has no option of a method as a flag: --set has.
OWN_OF_METHODS = {
    flag: f"{why}; write --set METHOD.KEY=VALUE" for flag, why in OtherMethodsFlags(NoOptions).items()
}


def bench(argv: list[str]) -> int:
    """Time a setting."""
    method = method_name(early_flags(argv).get("--method", BenchCommand.method))
    options = options_type(method)
    default = BenchCommand(method=method, options=options())
    command: BenchCommand[Any] = parse(
        of_options(BenchCommand, options),
        argv,
        "bench",
        default=default,
        elsewhere=OtherMethodsFlags(options),
    ).command
    groups = {
        f.name: getattr(command, f.name)
        for f in dataclasses.fields(command)
        if f.name not in ("bench", "messages")
    }
    config: TrainConfig[Any] = TrainConfig(**groups)
    check_train_config(config)
    check_options(config.options)
    check_bench(command.bench)

    from fastdynat.terminal.consoles import error_console, output_console
    from fastdynat.terminal.progress import ProgressDisplay

    errors, messages = error_console(), command.messages
    with printed_messages(messages.log_level, errors, quiet=messages.quiet):
        from fastdynat.commands.bench import run_bench

        display = ProgressDisplay(errors, quiet=messages.quiet)
        return run_bench(config, command.bench, output_console(), display)


def compare(argv: list[str]) -> int:
    """Compare methods."""
    file = early_flags(argv).get("--config")
    shared = shared_config(None if file is None else Path(file))
    groups: dict[str, Any] = {
        name: getattr(shared, name) for name in ("data", "model", "attack", "optim", "engine")
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
        from fastdynat.commands.compare import run_compare

        return run_compare(asked, command.compare, output_console(), ProgressDisplay(errors, quiet=quiet))
