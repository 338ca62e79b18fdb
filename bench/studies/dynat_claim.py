"""DYNAT's claim put to the test: docs/studies/dynat-claim.md has hypotheses, design and analysis plan.

    python bench/studies/dynat_claim.py plan
    python bench/studies/dynat_claim.py run --data-dir cifar10-jpeg --work study

`run` may be killed at any moment: the same command goes on where it was, within a training too.
"""

import argparse
import time
from pathlib import Path

from claim_design import BLOCKS, EPOCHS
from claim_runs import Work, run_all


def plan() -> None:
    for block in BLOCKS:
        print(block.name)
        for run in block.runs:
            print("  ", run.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("plan")
    run = commands.add_parser("run")
    run.add_argument("--data-dir", required=True, help="image folder with train/ and test/")
    run.add_argument("--work", type=Path, required=True, help="folder of the runs")
    run.add_argument("--hours", type=float, help="begin nothing new after these hours")
    run.add_argument("--epochs", type=int, default=EPOCHS, help="for tests")
    given = parser.parse_args()
    if given.command == "plan":
        plan()
    else:
        until = None if given.hours is None else time.time() + 3600 * given.hours
        run_all(Work(given.work.resolve(), given.data_dir, given.epochs), until)


if __name__ == "__main__":
    main()
