"""The command line's entry: which command, and how it ends."""

import importlib
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from fastdynat import __version__
from fastdynat.commands.parsing.naming import name_flags
from fastdynat.commands.rank_ends import lost_rank, report_crash, report_end
from fastdynat.errors import UserError, not_a_name, one_line, shortage, shown, unknown_name
from fastdynat.freed_memory import keep_freed_memory_without_gpu
from fastdynat.launch import launched, launched_size
from fastdynat.terminal.interrupts import Interruption

USAGE = f"""fastdynat {__version__}: fast dynamic-label adversarial training

usage: fastdynat COMMAND [FLAGS]      fastdynat COMMAND --help lists the flags

  train    train a model (default: DYNAT on the embedded digits); --resume RUN continues
  pack     pack extra training images once, for train --extra-data
  eval     accuracy of one or more runs under attacks
  compare  train and evaluate several methods on the same data, budget and seeds
  export   write a run's network for RobustBench, torch.export or ONNX
  report   write one HTML page about one or more runs
  boundary chart of the margins and speed of the decision boundary, for a run with --boundary-speed
  recipes  published protocols for train --recipe NAME: the list, or one of them with its cost
  speedrun race to a robust accuracy on CIFAR-10: a record is trained, timed and evaluated over several seeds
  bench    speed of the attack and the training step on this machine
  doctor   features available on this machine, and reasons for those missing
"""

# The module of each command in fastdynat.commands, whose function NAME_command runs it; only that one is
# imported.
COMMANDS = {
    "train": "train",
    "pack": "pack",
    "eval": "evaluate.command",
    "compare": "compare.command",
    "export": "export.command",
    "report": "report.command",
    "boundary": "boundary.command",
    "recipes": "recipes.command",
    "speedrun": "speedrun.command",
    "bench": "bench.command",
    "doctor": "doctor.command",
}
# Those that the processes of torchrun run together.
TOGETHER = ("train", "eval")


def program() -> int:
    """`main` in a process of its own: the installed command, and ``python -m fastdynat``."""
    keep_freed_memory_without_gpu()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 diverged (bench: slower), 2 bad input, 128+n on signal n."""
    argv = list(sys.argv[1:] if argv is None else argv)
    generator = (
        random.getstate()
    )  # tyro draws from it; commands that train or measure keep the others themselves
    with Interruption() as interruption, _any_text():
        try:
            return _run_or_report(argv, interruption)
        except KeyboardInterrupt as error:  # a signal while an error was about to be reported
            interruption.only_noted = True
            return _interrupted(error, interruption)
        finally:
            random.setstate(generator)


def _run_or_report(argv: list[str], interruption: Interruption) -> int:
    try:
        check_words(argv)
        return _run_and_flush(argv)
    except UserError as error:
        interruption.only_noted = True
        return _fail(error, name_flags(str(error), argv))
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        interruption.only_noted = True
        return _interrupted(error, interruption)
    except Exception as error:
        # A signal while something was imported or compiled may have been made into this.
        was_signal, interruption.only_noted = interruption.signal is not None, True
        if was_signal:
            return _interrupted(error, interruption)
        reason = shortage(error) or _system_says(error)
        if reason is not None:
            _drop_output()
            return _fail(error, reason)
        if (lost := lost_rank(error)) is not None:
            return _fail(error, lost, code=1)
        if not launched():
            raise
        report_crash(error)
        return 1


def check_words(argv: Sequence[str]) -> None:
    """Raise UserError where a word of a command holds what no file and no value can: NUL, a lone surrogate.

    A newline is part of a name like any other character; messages show it as an escape.
    """
    for i, word in enumerate(argv):
        if (reason := not_a_name(word)) is None:
            continue
        flag, equals, _ = word.partition("=")
        before = argv[i - 1] if i and argv[i - 1].startswith("--") else "an argument"
        raise UserError(f"{flag if equals and not_a_name(flag) is None else before} {reason}: {shown(word)}")


def _system_says(error: Exception) -> str | None:
    """The system's refusal in one line; None where the error is another."""
    if not isinstance(error, OSError):
        return None
    if error.strerror is not None:
        return f"{error.filename or 'input or output'}: {error.strerror}"
    return (
        " ".join(str(error).split()) or type(error).__name__
    )  # raised by a library, such as for a lock that is not released


@contextmanager
def _any_text() -> Iterator[None]:
    """Let standard output take names that its encoding lacks, as standard error does: escaped."""
    out = sys.stdout
    before = getattr(out, "errors", None)
    if before == "strict" and hasattr(out, "reconfigure"):
        out.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            with suppress(OSError, ValueError):  # a reader that went away
                out.reconfigure(errors=before)
        return
    yield


def _run_and_flush(argv: list[str]) -> int:
    try:
        return _run(argv)
    finally:
        sys.stdout.flush()  # also where the help was printed, which ends by SystemExit


def _fail(error: BaseException, reason: str, *, code: int = 2) -> int:
    report_end(error, one_line(reason), code)
    return code


def _interrupted(error: BaseException, interruption: Interruption) -> int:
    if (lost := lost_rank(error)) is not None:  # torchrun ends the others by a signal
        return _fail(error, lost, code=1)
    by = (
        ""
        if interruption.code == 128 + signal.SIGINT
        else f" by {signal.Signals(interruption.code - 128).name}"
    )
    report_end(error, f"interrupted{by}", interruption.code, kind="fastdynat: ")
    return interruption.code


def _drop_output() -> None:
    """Let what could not be written to standard output go, or Python complains of it when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        raise unknown_name("command", argv[0], COMMANDS)
    if launched_size() > 1 and argv[0] not in TOGETHER:
        raise UserError(
            f"fastdynat {argv[0]} is for one process, not {launched_size()}: start it without torchrun"
        )
    module = importlib.import_module(f"fastdynat.commands.{COMMANDS[argv[0]]}")
    code: int = getattr(module, f"{argv[0]}_command")(argv[1:])
    return code
