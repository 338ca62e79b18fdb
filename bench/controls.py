"""DYNAT beside its two controls on real images: natural, Madry and DYNAT on one budget, evaluated on the full test set.

    python bench/controls.py --data imagefolder --data-dir cifar10-jpeg --json bench/results/cifar10_jpeg_small_cpu.json

Trains each method through the command line (what is measured is what users run), resumes what an earlier call left unfinished,
and stores accuracies, seconds, commands, versions and commit.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastdynat.runs import source_commit

METHODS = ("natural", "madry", "dynat")


def call(arguments: list[str]) -> tuple[str, float]:
    """Run `fastdynat ARGUMENTS`, echoing it; returns the command line and its seconds."""
    print("+ fastdynat", *arguments, flush=True)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fastdynat", *arguments], check=True)
    return " ".join(["fastdynat", *arguments]), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/controls"), help="where the run directories go")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--attacks", default="clean,pgd20")
    ours, train_flags = parser.parse_known_args()

    commands: list[dict[str, Any]] = []
    for method in METHODS:
        run = ours.runs / method
        fresh = ["train", "--method", method, "--run-dir", str(run), *train_flags]
        command, seconds = call(["train", "--resume", str(run)] if (run / "config.yaml").exists() else fresh)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        commands.append({"command": command, "seconds": round(seconds, 1), "epochs": rows})
    table = ours.runs / "eval.json"
    runs = [str(ours.runs / method) for method in METHODS]
    command, seconds = call(["eval", *runs, "--attacks", ours.attacks, "--json", str(table)])
    document = json.loads(table.read_text())
    commands.append({"command": command, "seconds": round(seconds, 1)})
    ours.json.parent.mkdir(parents=True, exist_ok=True)
    ours.json.write_text(json.dumps({"commit": source_commit(), **document, "commands": commands}, indent=1) + "\n")


if __name__ == "__main__":
    main()
