"""`fastdynat eval`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from fastdynat.commands.evaluate.attack_names import check_attack_names, known_names
from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import parse
from fastdynat.config.eval_config import EvalConfig, check_eval_config
from fastdynat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Accuracy of the best and last checkpoints of runs, and of other models, under attacks."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories; weights files (with --model and --data); or robustbench:NAME, torchvision:NAME,
    timm:NAME, module:callable (with --data)."""
    list_attacks: bool = False
    """Print the names that --attacks takes."""
    messages: MessageFlags = field(default_factory=MessageFlags)
    eval: EvalConfig = field(default_factory=EvalConfig)


def eval_command(argv: list[str]) -> int:
    """Run `fastdynat eval`."""
    command = parse(EvalCommand, argv, "eval").command
    from fastdynat.terminal.consoles import PlainTable, output_console

    console = output_console()
    if command.list_attacks:
        table = PlainTable("attack", "what it is")
        for row in known_names().items():
            table.add_row(*row)
        console.print(table)
        return 0
    if not command.models:
        raise UserError("eval needs at least one run directory or model: fastdynat eval RUN")
    config, messages = command.eval, command.messages
    check_eval_config(config)
    check_attack_names(config.attacks, config.norm)

    with printed_messages(messages.log_level, console, quiet=messages.quiet):
        from fastdynat.commands.evaluate.measure_runs import evaluate_runs
        from fastdynat.distributed import joined_world
        from fastdynat.terminal.stop_request import StopRequest
        from fastdynat.training.step_agreement import stop_of_any_rank

        with joined_world(config.device, config.rank_timeout), StopRequest() as stop:
            wanted = stop_of_any_rank(stop.requested)
            evaluate_runs(command.models, config, console, quiet=messages.quiet, should_stop=wanted)
    return 128 + stop.signal if stop.signal else 0
