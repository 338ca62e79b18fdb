"""Results of a comparison as plain values: each run's, and means over seeds by method and checkpoint."""

import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastdynat.commands.compare.compare_config import CompareConfig, NoOptions, parse_settings
from fastdynat.commands.compare.run_plans import ComparisonPlan, RunPlan
from fastdynat.config import TrainConfig, to_flat
from fastdynat.runs import ENVIRONMENT, describe_environment, source_commit
from fastdynat.runs.environment import read_starts
from fastdynat.runs.metrics_rows import read_rows

FORMAT = "fastdynat-compare/1"
Values = dict[str, Any]


def comparison_document(
    plan: ComparisonPlan,
    shared: TrainConfig[NoOptions],
    compare: CompareConfig,
    records: dict[str, list[Values]],
) -> Values:
    """Everything, as the JSON file holds it. `records`: those of `evaluation.measure_runs` by run name."""
    runs = [_run_values(run, plan, records.get(run.name, [])) for run in plan.runs]
    methods = list(dict.fromkeys(run.method for run in plan.runs))
    rows = [
        _row(checkpoint, [run for run in runs if run["method"] == m])
        for m in methods
        for checkpoint in ("best", "last")
    ]
    cells = [attack for run in runs for record in run["evaluations"] for attack in record["attacks"]]
    errors = [math.sqrt(a["accuracy"] * (1 - a["accuracy"]) / a["images"]) for a in cells]
    return {
        "format": FORMAT,
        "command": shlex.join(["fastdynat", *sys.argv[1:]]),
        "commit": source_commit(),
        "environment": describe_environment(),
        "config": {key: value for key, value in to_flat(shared).items() if key not in ("method", "run_dir")},
        "compare": asdict(compare),
        "settings": _settings(plan, compare),
        "probes": {name: plan.ledger.probes[name] for name in methods if name in plan.ledger.probes},
        "train_images": plan.images,
        "largest_standard_error": max(errors, default=None),
        "rows": rows,
        "runs": runs,
    }


def _settings(plan: ComparisonPlan, compare: CompareConfig) -> dict[str, Values]:
    """The keys of --set by method, with their values as they were read."""
    asked = {run.method: to_flat(run.asked) for run in plan.runs}
    given = parse_settings(compare.settings, list(asked))
    return {method: {key: asked[method][key] for key in keys} for method, keys in given.items()}


def _run_values(run: RunPlan, plan: ComparisonPlan, records: list[Values]) -> Values:
    path, metrics = run.path / "metrics.jsonl", []
    if path.exists():  # not where the first epoch diverged
        metrics = read_rows(path)
    seconds, rates = ([row[key] for row in metrics] for key in ("train_seconds", "images_per_s"))
    return {
        "method": run.method,
        "seed": run.seed,
        "run": str(run.path),
        "reason": "",
        **plan.ledger.runs[run.name],
        "config": to_flat(run.config),
        "starts": read_starts(run.path / ENVIRONMENT),
        "train_seconds": sum(seconds),
        # Medians: a first epoch may compile.
        "seconds_per_epoch": statistics.median(seconds) if seconds else None,
        "images_per_s": statistics.median(rates) if rates else None,
        "epochs": metrics,
        "evaluations": records,
    }


def _row(checkpoint: str, runs: list[Values]) -> Values:
    """Means over the runs of one method that have finished."""
    finished = [run for run in runs if run["ended"] == "finished"]
    records = [r for run in finished for r in run["evaluations"] if r["checkpoint"] == checkpoint]
    names = [attack["attack"] for attack in records[0]["attacks"]] if records else []
    peaks = [run["peak_memory_bytes"] for run in finished if run["peak_memory_bytes"]]
    return {
        "method": runs[0]["method"],
        "checkpoint": checkpoint,
        "seeds": [run["seed"] for run in finished],
        "diverged": [run["seed"] for run in runs if run["ended"] == "diverged"],
        "epochs": runs[0]["config"]["epochs"],
        "epochs_trained": [len(run["epochs"]) for run in finished],
        "accuracy": {
            name: over_seeds([r["attacks"][i]["accuracy"] for r in records]) for i, name in enumerate(names)
        },
        "robustness_gap": over_seeds(
            [r["robustness_gap"] for r in records if r["robustness_gap"] is not None]
        ),
        **{
            key: over_seeds([run[key] for run in finished])
            for key in ("seconds_per_epoch", "train_seconds", "images_per_s")
        },
        "peak_memory_bytes": max(peaks, default=None),
    }


def over_seeds(values: Sequence[float]) -> Values | None:
    """Mean, sample standard deviation (None for one value), and the values; None where there are none."""
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": list(values)}
