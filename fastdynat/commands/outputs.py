"""The commands that hand over or draw what runs have: export, report, boundary."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastdynat.commands.export import ExportConfig
from fastdynat.commands.figures import check_picture
from fastdynat.commands.parsing.parse import parse
from fastdynat.commands.report import ReportConfig
from fastdynat.commands.report.report_config import check_report
from fastdynat.config.rules import check_limits
from fastdynat.errors import UserError
from fastdynat.runs import check_results, require_run


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Hand RUN's network over as a file, which is read again and compared with the network before it is
    kept.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    export: ExportConfig


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """RUNs as one HTML page: accuracies, curves, attacked images, saliency, transfer (extra `plots`).

    A second call only draws.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
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


def export(argv: list[str]) -> int:
    """Export a run."""
    command = parse(ExportCommand, argv, "export").command
    check_limits(command.export)
    require_run(command.run)

    from fastdynat.commands.export import export_run
    from fastdynat.terminal.consoles import error_console

    console = error_console()
    export_run(command.run, command.export, lambda text: console.print(text, markup=False, emoji=False))
    return 0


def report(argv: list[str]) -> int:
    """Write a report on runs."""
    command = parse(ReportCommand, argv, "report").command
    if not command.runs:
        raise UserError("report needs at least one run directory: fastdynat report RUN")
    check_report(command.report)
    from fastdynat.commands.report import run_report
    from fastdynat.terminal.consoles import error_console

    return run_report(command.runs, command.report, error_console())


def boundary(argv: list[str]) -> int:
    """Draw a run's boundary log."""
    command = parse(BoundaryCommand, argv, "boundary").command
    require_run(command.run)
    check_picture("chart", command.chart)
    check_results(pictures=(command.chart,))
    from fastdynat.commands.boundary.chart import draw_speeds

    print(f"{draw_speeds(command.run, Path(command.chart))} validations of {command.run}: {command.chart}")
    return 0
