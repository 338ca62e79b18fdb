"""`fastdynat report`: the flags and the checks that need no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import parse
from fastdynat.commands.report.report_config import ReportConfig, check_report
from fastdynat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """RUNs as one HTML page: accuracies, curves, attacked images, saliency, transfer (extra `plots`).

    Measurements are stored beside the page, so a second call only redraws it.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    messages: MessageFlags = field(default_factory=MessageFlags)
    report: ReportConfig = field(default_factory=ReportConfig)


def report_command(argv: list[str]) -> int:
    """Run `fastdynat report`."""
    command = parse(ReportCommand, argv, "report").command
    if not command.runs:
        raise UserError("report needs at least one run directory: fastdynat report RUN")
    check_report(command.report)
    from fastdynat.terminal.consoles import error_console
    from fastdynat.terminal.progress import ProgressDisplay

    console, messages = error_console(), command.messages
    with printed_messages(messages.log_level, console, quiet=messages.quiet):
        from fastdynat.commands.report.write_report import write_report

        return write_report(command.runs, command.report, ProgressDisplay(console, quiet=messages.quiet))
