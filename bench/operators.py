"""Every operator beside plain torch, torch.compile and a copy of the same bytes, as a table and as JSON.

    python bench/operators.py --json bench/results/operators_cpu.json

Runs bench/test_operators.py (pytest-benchmark) on the GPU if there is one, else on the CPU; medians. --only
NAME takes the operators whose name contains NAME, --without compiled leaves out what takes longest to
prepare. Ctrl-C (and a time limit that sends SIGINT) ends the measuring; the table and the file then hold what
was measured, and the exit status is not 0.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastdynat.runs import describe_environment, source_commit

HERE = Path(__file__).parent


def run_to_its_end(command: list[str], env: dict[str, str]) -> int:
    """The exit status of `command`, which takes SIGINT itself and still writes its file."""
    process = subprocess.Popen(command, env=env, stdout=sys.stderr)
    try:
        return process.wait()
    except KeyboardInterrupt:
        print("operators: stopped; what was measured follows", file=sys.stderr)
    try:
        return process.wait(4)  # a terminal and a time limit interrupt both
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.wait()


def measure(only: str, without: str) -> tuple[list[dict[str, Any]], int]:
    """Run the benchmarks; return a row (us per call) per implementation and case, and the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmark.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(HERE / "test_operators.py"),
            "-q",
            f"--benchmark-json={out}",
        ]
        command += [
            "--benchmark-columns=median",
            "-p",
            "no:cacheprovider",
            f"--rootdir={HERE}",
            "-W",
            "default",
        ]
        status = run_to_its_end(
            command, os.environ | {"FASTDYNAT_BENCH_ONLY": only, "FASTDYNAT_BENCH_WITHOUT": without}
        )
        if not out.exists() or not out.stat().st_size:
            raise SystemExit(status or 1)
        measured = json.loads(out.read_text())["benchmarks"]
    rows = []
    for entry in measured:
        extra, stats = entry["extra_info"], entry["stats"]
        per_call = 1e6 / extra["calls"]
        rows.append(
            {
                "case": entry["group"],
                "implementation": extra["name"],
                "us": round(stats["median"] * per_call, 2),
                "us_quartiles": [round(stats[q] * per_call, 2) for q in ("q1", "q3")],
                "ideal_bytes": extra["bytes"],
                "cuda_graph": extra["cuda_graph"],
            }
        )
    return rows, status


def print_table(rows: list[dict[str, Any]]) -> None:
    """Microseconds per call; in brackets how often faster ours is, and the share of the copy's bandwidth."""
    by_case: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        by_case[row["case"]][row["implementation"]] = row["us"]
    ours = sorted({row["implementation"] for row in rows} - {"plain", "compiled", "copy"})
    table = Table(
        title="microseconds per call (plain / ours, compiled / ours, copy / ours)", title_justify="left"
    )
    for column in ("operator", "plain", "compiled", "copy", *ours):
        table.add_column(column, justify="left" if column == "operator" else "right", no_wrap=True)
    for case, times in by_case.items():
        cells = [f"{times[n]:,.1f}" if n in times else "-" for n in ("plain", "compiled", "copy")]
        for name in ours:
            if name not in times:
                cells.append("-")
                continue
            ratios = [
                f"{times[n] / times[name]:.2f}" if n in times else "-" for n in ("plain", "compiled", "copy")
            ]
            cells.append(f"{times[name]:,.1f} ({', '.join(ratios)})")
        table.add_row(case, *cells)
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--only", default="", help="part of an operator's name")
    parser.add_argument("--without", default="", choices=["", "compiled", "plain"], help="an implementation")
    ours = parser.parse_args()
    rows, status = measure(ours.only, ours.without)
    print_table(rows)
    if ours.json:
        ours.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "format": "fastdynat-operators/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": describe_environment(),
            "rows": rows,
        }
        ours.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
