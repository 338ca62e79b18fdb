"""The command line's entry: which command, and how it ends."""

import importlib
import random
import sys
from collections.abc import Sequence

from fastdynat import __version__
from fastdynat.errors import UserError, unknown_name

USAGE = f"""fastdynat {__version__}: fast dynamic-label adversarial training

usage: fastdynat COMMAND [FLAGS]      fastdynat COMMAND --help lists the flags

  train    train a model (default: DYNAT on the embedded digits); --resume RUN goes on
  eval     accuracy of one or more runs under attacks
  compare  several training methods on the same data, budget and seeds
  export   a run's network for RobustBench, torch.export or ONNX
  report   runs as one HTML page with pictures
  boundary picture of margins and the boundary's speed, of a run with --boundary-speed
  recipes  the published protocols that train --recipe NAME follows
  bench    how fast attack and training step are on this machine
  doctor   what this machine can use, and why not
"""

# Each command's function, as MODULE.FUNCTION of fastdynat.commandline: only the asked one is imported.
COMMANDS = {
    "train": "train.run",
    "eval": "evaluate.run",
    "compare": "measure.compare",
    "export": "outputs.export",
    "report": "outputs.report",
    "boundary": "outputs.boundary",
    "recipes": "about.recipes",
    "bench": "measure.bench",
    "doctor": "about.doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 diverged (bench: got slower), 2 bad input, 128+n stopped by signal n."""
    argv = list(sys.argv[1:] if argv is None else argv)
    generator = random.getstate()  # tyro draws from it; commands that train or measure keep the others themselves
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"fastdynat: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdynat: interrupted", file=sys.stderr)
        return 130
    finally:
        random.setstate(generator)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        raise unknown_name("command", argv[0], COMMANDS)
    module, _, function = COMMANDS[argv[0]].partition(".")
    return getattr(importlib.import_module(f"fastdynat.commandline.{module}"), function)(argv[1:])
