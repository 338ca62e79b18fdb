"""Time that a run took to reach a validation accuracy.

    python bench/time_to_accuracy.py RUN --target 0.45 --wall 123.4 --json time_to_accuracy.json

Training time is that of the epochs, without validation and start; wall time is the whole command's, as the
caller measured it. A run of several commands has none, because a command that was killed is not
measured. Exits with 1 if the accuracy was not reached.
"""

import argparse
import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastdynat.config import read_config_file
from fastdynat.methods import method_class
from fastdynat.runs import CONFIG, source_commit


def describe(run: Path, target: float, wall: float | None) -> dict[str, Any]:
    """The times of a run directory, as plain values.

    Args:
        target: validation accuracy, a share. That of the run's configuration may be an earlier command's.
        wall: seconds of its only command; None where it was continued.
    """
    config = read_config_file(run / CONFIG)
    score = method_class(config["method"]).select_by
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    elapsed = list(accumulate(row["train_seconds"] for row in rows))
    reached = next(
        (i for i, row in enumerate(rows) if row.get(score) is not None and row[score] >= target), None
    )
    return {
        "format": "fastdynat-time-to-accuracy/1",
        "commit": source_commit(),
        "starts": json.loads((run / "environment.json").read_text()),
        "config": config,
        "score": score,
        "target": target,
        "reached": reached is not None,
        "best": max((row[score] for row in rows if row.get(score) is not None), default=None),
        "epochs": len(rows) if reached is None else reached + 1,
        "train_seconds": round(elapsed[-1 if reached is None else reached], 3),
        "continued": wall is None,
        "wall_seconds": wall,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--target", type=float, required=True, help="validation accuracy, a share")
    parser.add_argument("--wall", type=float, help="seconds of the whole command; not for a continued run")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    ours = parser.parse_args()
    found = describe(ours.run, ours.target, ours.wall)
    ours.json.write_text(json.dumps(found, indent=1) + "\n")
    whole = "continued" if ours.wall is None else f"{ours.wall:.1f} s in all"
    told = f"{found['epochs']} epochs, {found['train_seconds']} s of training, {whole}"
    print(
        f"{found['score']} {found['target']:g} {'reached' if found['reached'] else 'not reached'}: best "
        f"{found['best']}, {told}"
    )
    sys.exit(0 if found["reached"] else 1)


if __name__ == "__main__":
    main()
