r"""DYNAT's claim put to the test: docs/studies/dynat-claim.md has hypotheses, design and analysis plan.

    python bench/studies/dynat_claim.py plan
    python bench/studies/dynat_claim.py run --data-dir cifar10-jpeg --work study \
        --json bench/results/dynat_claim_cpu.json
    python bench/studies/dynat_claim.py collect --data-dir cifar10-jpeg --work study \
        --json bench/results/dynat_claim_cpu.json

`run` may be killed at any moment: the same command goes on where it was, within a training too. Start it once
per core; the runners share the work. Runs that the file has are not made again, so that the study can go on
on another machine. `follow-up` does the same for the runs of claim_follow_up.py.
"""

import argparse
import time
from pathlib import Path

from claim_design import BLOCKS, RUNS
from claim_follow_up import FOLLOW_UP
from claim_results import read_collected, write_collected
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
    run, follow_up, collect = (commands.add_parser(name) for name in ("run", "follow-up", "collect"))
    for each in (run, follow_up, collect):
        each.add_argument("--data-dir", required=True, help="image folder with train/ and test/")
        each.add_argument("--work", type=Path, required=True, help="folder of the runs")
    for each in (run, follow_up):
        each.add_argument("--hours", type=float, help="begin nothing new after these hours")
        each.add_argument("--json", type=Path, help="what was collected before; its runs are not made again")
    collect.add_argument("--json", type=Path, required=True, help="gets the runs added; may exist")
    given = parser.parse_args()
    if given.command == "plan":
        plan()
        return
    earlier = read_collected(given.json) if given.json is not None and given.json.exists() else {}
    work = Work(given.work.resolve(), given.data_dir, earlier=earlier)
    if given.command == "collect":
        write_collected(work, given.json)
        return
    until = None if given.hours is None else time.time() + 3600 * given.hours
    run_all(work, until, runs=RUNS if given.command == "run" else FOLLOW_UP.runs)


if __name__ == "__main__":
    main()
