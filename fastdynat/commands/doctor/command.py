"""`fastdynat doctor`: the flags, and which of the two reports is made."""

from dataclasses import dataclass, field

from fastdynat.commands.message_flags import MessageFlags, printed_messages
from fastdynat.commands.parsing.parse import parse


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Report what this machine can use (torch, CUDA, Triton, the extension, DALI, torch.compile), or why
    not."""

    json: bool = False
    """Print JSON instead of a table."""
    try_compile: bool = False
    """Also compile a tiny function with torch.compile (takes a while the first time)."""
    check: bool = False
    """Instead, compare every operator implementation with eager PyTorch and time it; exit code 1 if one is
    wrong."""
    messages: MessageFlags = field(default_factory=MessageFlags)


def doctor_command(argv: list[str]) -> int:
    """Run `fastdynat doctor`."""
    command = parse(DoctorCommand, argv, "doctor").command
    from fastdynat.terminal.consoles import error_console
    from fastdynat.terminal.progress import ProgressDisplay

    console, messages = error_console(), command.messages
    with printed_messages(messages.log_level, console, quiet=messages.quiet):
        if command.check:
            from fastdynat.commands.doctor.operator_report import report_operators

            return report_operators(json=command.json, display=ProgressDisplay(console, quiet=messages.quiet))
        from fastdynat.commands.doctor.machine_report import report_machine

        return report_machine(json=command.json, try_compile=command.try_compile)
