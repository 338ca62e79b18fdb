"""`fastdynat bench`: the flags and the checks that need no torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fastdynat.commands.bench.bench_config import BenchConfig, check_bench
from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import OtherMethodsFlags, early_flags, of_options, parse
from fastdynat.config import AttackConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from fastdynat.config.train_checks import check_train_config
from fastdynat.methods import method_name, options_type
from fastdynat.methods.options import check_options

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True, kw_only=True)
class BenchCommand(Generic[OptionsT]):
    """Time the attack and the training step of the setting given by the training flags."""

    messages: MessageFlags = field(default_factory=MessageFlags)
    bench: BenchConfig = field(default_factory=BenchConfig)
    method: str = "dynat"
    """Training method, as for train; not one with its own search instead of PGD, such as dyart."""
    options: OptionsT
    data: DataConfig = field(default_factory=lambda: DataConfig(data="cifar10"))
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


def bench_command(argv: list[str]) -> int:
    """Run `fastdynat bench`."""
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
        from fastdynat.commands.bench.benchmark import run_benchmark

        display = ProgressDisplay(errors, quiet=messages.quiet)
        return run_benchmark(config, command.bench, output_console(), display)
