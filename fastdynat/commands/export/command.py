"""`fastdynat export`: the flags and the checks that need no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastdynat.commands.export.export_config import ExportConfig
from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import parse
from fastdynat.config.value_ranges import check_radii, check_values
from fastdynat.runs import require_run


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write RUN's network to a file, then read it back and compare its logits with the network's."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, or a weights file (with --model and --dataset)."""
    messages: MessageFlags = field(default_factory=MessageFlags)
    export: ExportConfig


def export_command(argv: list[str]) -> int:
    """Run `fastdynat export`."""
    command = parse(ExportCommand, argv, "export").command
    check_values(command.export)
    check_radii(command.export, command.export.norm)
    if not command.run.is_file():
        require_run(command.run)

    from fastdynat.terminal.consoles import error_console

    messages = command.messages
    with printed_messages(messages.log_level, error_console(), quiet=messages.quiet):
        from fastdynat.commands.export.write_export import export_run

        export_run(command.run, command.export)
    return 0
