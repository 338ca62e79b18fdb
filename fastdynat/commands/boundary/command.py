"""`fastdynat boundary`: the flags and the checks that need no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastdynat.commands.figures import check_picture
from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import parse
from fastdynat.runs import check_results, require_run


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


def boundary_command(argv: list[str]) -> int:
    """Run `fastdynat boundary`."""
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
