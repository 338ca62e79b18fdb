"""The commands that hand over or draw what runs have: export, report, boundary."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastdynat.commands.export import ExportConfig
from fastdynat.commands.figures import check_picture
from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import parse
from fastdynat.commands.report import ReportConfig
from fastdynat.commands.report.report_config import check_report
from fastdynat.config.value_ranges import check_values
from fastdynat.errors import UserError
from fastdynat.runs import check_results, require_run


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Hand RUN's network over as a file, which is read again and compared with the network before it is
    kept.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    messages: MessageFlags = field(default_factory=MessageFlags)
    export: ExportConfig


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """RUNs as one HTML page: accuracies, curves, attacked images, saliency, transfer (extra `plots`).

    A second call only draws.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    messages: MessageFlags = field(default_factory=MessageFlags)
    report: ReportConfig = field(default_factory=ReportConfig)


@dataclass(frozen=True, kw_only=True)
class BoundaryCommand:
    """Draw the margins of RUN's validation images and how fast the boundary moved; the run needs
    --boundary-speed.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    chart: str = "speed.svg"
    """Picture to write: .svg, .png or .pdf (extra `plots`)."""
    messages: MessageFlags = field(default_factory=MessageFlags)


def export(argv: list[str]) -> int:
    """Export a run."""
    command = parse(ExportCommand, argv, "export").command
    check_values(command.export)
    require_run(command.run)

    from fastdynat.terminal.consoles import error_console

    messages = command.messages
    with printed_messages(messages.log_level, error_console(), quiet=messages.quiet):
        from fastdynat.commands.export import export_run

        export_run(command.run, command.export)
    return 0


def report(argv: list[str]) -> int:
    """Write a report on runs."""
    command = parse(ReportCommand, argv, "report").command
    if not command.runs:
        raise UserError("report needs at least one run directory: fastdynat report RUN")
    check_report(command.report)
    from fastdynat.terminal.consoles import error_console
    from fastdynat.terminal.progress import ProgressDisplay

    console, messages = error_console(), command.messages
    with printed_messages(messages.log_level, console, quiet=messages.quiet):
        from fastdynat.commands.report import run_report

        return run_report(command.runs, command.report, ProgressDisplay(console, quiet=messages.quiet))


def boundary(argv: list[str]) -> int:
    """Draw a run's boundary log."""
    command = parse(BoundaryCommand, argv, "boundary").command
    require_run(command.run)
    check_picture("chart", command.chart)
    check_results(pictures=(command.chart,))
    from fastdynat.terminal.consoles import error_console

    messages = command.messages
    with printed_messages(messages.log_level, error_console(), quiet=messages.quiet):
        from fastdynat.commands.boundary.chart import draw_speeds

        count = draw_speeds(command.run, Path(command.chart))
    print(f"{count} validations of {command.run}: {command.chart}")
    return 0
