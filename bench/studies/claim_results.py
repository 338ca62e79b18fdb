"""Collects what there is of the study in one JSON document, with the findings, and draws its chart."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from claim_analysis import DESCRIBED, PRIMARY, Finding, estimate, findings
from claim_charts import draw_claim
from claim_design import BLOCKS, EPOCHS, RUNS, SEEDS, Block, Run
from claim_follow_up import FOLLOW_UP, follow_up_findings
from claim_labels import has_guide, label_quality
from claim_runs import Work

from fastdynat.evaluation.margins import margins
from fastdynat.evaluation.outcome import Measurement, unpack_bits
from fastdynat.methods.configs import stored_config
from fastdynat.runs.atomic_files import write_text
from fastdynat.runs.environment import describe_environment, read_starts

FORMAT = "fastdynat-dynat-claim/1"
# Columns of a run's log that are kept.
COLUMNS = (
    "epoch",
    "loss",
    "guide_loss",
    "train_adv_acc",
    "label_agreement",
    "val_clean_acc",
    "val_pgd10_acc",
    "train_seconds",
    "best",
)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The accuracies of a finished evaluation by checkpoint and attack."""
    found: dict[str, dict[str, Any]] = {}
    for result in json.loads(path.read_text())["results"]:
        found[result["checkpoint"]] = {"epoch": result["epoch"]} | {
            attack["attack"]: kept(attack) for attack in result["attacks"]
        }
    return found


def kept(attack: Mapping[str, Any]) -> dict[str, Any]:
    """Of a measurement: accuracy, images, and which are correct in hexadecimal digits (`unpack_bits`)."""
    document = {"accuracy": attack["accuracy"], "images": attack["images"], "bits": attack["robust_bits"]}
    if attack["distances"] is not None:
        names = Measurement.__dataclass_fields__
        histogram = margins(Measurement(**{name: attack[name] for name in names}), "linf", bins=40)
        document["distances"] = {
            "median": histogram.median,
            "edges": [round(edge, 6) for edge in histogram.edges],
            "counts": histogram.counts,
        }
    return document


def log_of(run: Path) -> dict[str, list[Any]]:
    """The columns of a run's log."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        column: [rounded(row.get(column)) for row in rows]
        for column in COLUMNS
        if any(row.get(column) is not None for row in rows)
    }


def rounded(value: Any) -> Any:
    """Five digits of a float."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def processor_seconds(folder: Path) -> dict[str, float | None]:
    """Processor seconds of each run's training; None where a part was killed and went unmeasured."""
    path = folder / "segments.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found: dict[str, float | None] = {}
    for row in rows:
        if row["command"] == "train":
            found[row["name"]] = (found.get(row["name"]) or 0.0) + row["cpu_seconds"]
    for name in found:
        starts = read_starts(folder / "runs" / name / "environment.json")
        if len(starts) > sum(row["name"] == name and row["command"] == "train" for row in rows):
            found[name] = None
    return found


def collected_run(work: Work, block: Block, run: Run, seconds: Mapping[str, float | None]) -> dict[str, Any]:
    """Everything about a finished run."""
    folder = work.runs / run.name
    start = read_starts(folder / "environment.json")[-1]
    document: dict[str, Any] = {
        "block": block.name,
        "arm": run.arm,
        "seed": run.seed,
        "images": run.images,
        "model": run.model,
        "augment": run.augment,
        "epochs": stored_config(folder).optim.epochs,
        "processor_seconds": seconds.get(run.name),
        "made": {
            **json.loads(work.result(run, "made").read_text()),
            **{key: start[key] for key in ("time", "cpu", "torch", "threads")},
        },
        "log": log_of(folder),
        "test": read_results(work.result(run, "pgd20")),
    }
    if work.result(run, "autoattack").exists():
        document["robust"] = read_results(work.result(run, "autoattack"))
    if has_guide(folder):
        path = work.result(run, "labels")
        if not path.exists():
            write_text(path, json.dumps(label_quality(folder)))
        document["labels"] = json.loads(path.read_text())
    return document


def bits_of(
    runs: Mapping[str, Mapping[str, Any]], augment: str, part: str = "test", attack: str = "pgd20"
) -> dict[tuple[str, int, str], np.ndarray]:
    """Correctness under an attack of the runs of `small` on 5,000 images, by arm, seed and checkpoint.

    part: "test" for all test images, "robust" for those that AutoAttack saw.
    """
    found = {}
    for run in runs.values():
        if (run["model"], run["images"], run["augment"]) != ("small", 5000, augment):
            continue
        for checkpoint, tested in run.get(part, {}).items():
            one = tested[attack]
            found[run["arm"], run["seed"], checkpoint] = unpack_bits(one["bits"], one["images"]).numpy()
    return found


def described(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """`found` without p-values and verdicts: the plan tests none of them."""
    return [replace(one, adjusted_p=None, verdict="described").document() for one in found]


def under_autoattack(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The contrasts between the methods that AutoAttack measured, by its accuracies."""
    bits = bits_of(runs, "crop-flip", "robust", "fast-autoattack")
    contrasts = {**PRIMARY, **DESCRIBED}
    names = ("H1-best", "H1-last", "H2", "H5-trades-best", "H5-trades", "H5-lbgat-best", "H5-lbgat")
    found = [
        Finding(name, contrasts[name][0], *estimate(bits, contrasts[name][1]), None, "") for name in names
    ]
    return described(found)


def begun(work: Work, run: Run) -> int:
    """Epochs of a run that is not finished."""
    log = work.runs / run.name / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def read_collected(path: Path) -> dict[str, Any]:
    """The document that `write_collected` wrote to `path`."""
    document: dict[str, Any] = json.loads(path.read_text())
    if document.get("format") != FORMAT:
        raise SystemExit(f"{path}: format is {document.get('format')!r}, expected {FORMAT!r}")
    return document


def collect(work: Work) -> dict[str, Any]:
    """The document of all finished runs: those of the folder, and those of the earlier document.

    Of a run that is in both, the one with all its measurements.
    """
    runs = _finished(work, BLOCKS, work.earlier.get("runs", {}))
    later = _finished(work, (FOLLOW_UP,), work.earlier.get("follow_up", {}).get("runs", {}))
    cost = work.folder / "cost.json"
    return {
        "format": FORMAT,
        "environment": describe_environment(),
        "command": "python bench/studies/dynat_claim.py run --data-dir cifar10-jpeg --work study",
        # The block without runs of its own measures those of the first.
        "planned": {block.name: len(block.runs or BLOCKS[0].runs) for block in BLOCKS},
        "begun": {run.name: epochs for run in RUNS if run.name not in runs and (epochs := begun(work, run))},
        "design": {"epochs": EPOCHS, "seeds": SEEDS},
        # As `measure_cost` reads it.
        "cost": work.earlier.get("cost") or (json.loads(cost.read_text()) if cost.exists() else None),
        "findings": [found.document() for found in findings(bits_of(runs, "crop-flip"))],
        "without_augmentation": described(findings(bits_of(runs, "none"))),
        "autoattack": under_autoattack(runs),
        "follow_up": {
            "findings": described(follow_up_findings(bits_of(runs | later, "none"))),
            "runs": later,
        },
        "runs": runs,
    }


def _finished(work: Work, blocks: Sequence[Block], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The finished runs of `blocks`, those of the folder before those of the `earlier` document."""
    seconds, runs = processor_seconds(work.folder), {}
    for block in blocks:
        for run in block.runs:
            here = work.result(run, "pgd20").exists() and not work.made_earlier(run)
            if here or work.made_here(run):
                runs[run.name] = collected_run(work, block, run, seconds)
            elif run.name in earlier:
                runs[run.name] = earlier[run.name]
    return runs


def write_collected(work: Work, target: Path) -> None:
    """Write the document to `target` and its chart beside it."""
    document = collect(work)
    # One line a run: the file changes only where runs are added.
    runs = document.pop("runs")
    lines = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items()]
    head = json.dumps(document, indent=1).removesuffix("\n}")
    write_text(target, head + ',\n "runs": {\n' + ",\n".join(lines) + "\n }\n}\n")
    draw_claim({**runs, **document["follow_up"]["runs"]}, target.with_suffix(".svg"))
