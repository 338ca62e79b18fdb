"""The table of a comparison."""

from typing import Any

from rich.console import Console

from fastdynat.terminal.consoles import AS_IS, PlainTable
from fastdynat.units import describe_size

Values = dict[str, Any]


def print_comparison(doc: Values, console: Console) -> None:
    """One row for each method and checkpoint, and what the numbers are."""
    names = list(dict.fromkeys(name for row in doc["rows"] for name in row["accuracy"]))
    budget = doc["compare"]["budget_seconds"]
    console.print(_title(doc), **AS_IS)
    table = PlainTable()
    for column in ("method", "checkpoint"):
        table.add_column(column, no_wrap=True)
    timed = ("s/epoch", "train s", *(["of budget"] if budget else []), "images/s", "peak MiB")
    for column in ("epochs", *names, "gap", *timed):
        table.add_column(column, justify="right", no_wrap=True)
    for row in doc["rows"]:
        accuracies = [_percent(row["accuracy"].get(name)) for name in names]
        # Training is the same for both checkpoints, so it is said once.
        times = _times(row, budget) if row["checkpoint"] == "best" else [""] * len(timed)
        table.add_row(
            _name(row),
            row["checkpoint"],
            _epochs(row),
            *accuracies,
            _percent(row["robustness_gap"]),
            *times,
        )
    console.print(table)
    for line in _notes(doc):
        console.print(line, **AS_IS)


def _title(doc: Values) -> str:
    records = [record for run in doc["runs"] for record in run["evaluations"]]
    if not records:
        return "no run has finished"
    r, error = records[0], doc["largest_standard_error"]
    parts = [
        f"accuracy in %, {r['images']} test images of {r['dataset']}, {r['norm']} eps "
        f"{describe_size(r['eps'], r['norm'])}"
    ]
    parts.append(f"binomial standard error at most {100 * error:.1f} points")
    seeds = max(len(row["seeds"]) for row in doc["rows"])
    parts += [f"mean ± standard deviation over {seeds} seeds"] if seeds > 1 else []
    return "; ".join(parts)


def _name(row: Values) -> str:
    diverged, total = len(row["diverged"]), len(row["diverged"]) + len(row["seeds"])
    return row["method"] if not diverged else f"{row['method']} ({diverged} of {total} diverged)"


def _epochs(row: Values) -> str:
    """The epochs asked for, after those that the runs trained if some ended early."""
    trained = row["epochs_trained"] or [row["epochs"]]
    least, most = min(trained), max(trained)
    if least == row["epochs"]:
        return str(least)
    return f"{least if least == most else f'{least}-{most}'} of {row['epochs']}"


def _number(values: Values | None, form: str, factor: float = 1.0) -> str:
    if values is None:
        return "-"
    mean = format(factor * values["mean"], form)
    return mean if values["std"] is None else f"{mean} ± {format(factor * values['std'], form)}"


def _percent(values: Values | None) -> str:
    return _number(values, ".2f", 100)


def _times(row: Values, budget: float | None) -> list[str]:
    share = [_number(row["train_seconds"], ".0%", 1 / budget)] if budget else []
    peak = row["peak_memory_bytes"]
    return [
        _number(row["seconds_per_epoch"], ",.2f"),
        _number(row["train_seconds"], ",.1f"),
        *share,
        _number(row["images_per_s"], ",.0f"),
        "-" if peak is None else f"{peak / 2**20:,.0f}",
    ]


def _notes(doc: Values) -> list[str]:
    gpu = doc["runs"][0]["config"]["device"].startswith("cuda")
    lines = [
        "s/epoch: median, without validation; train s: all epochs, including compilation; gap: clean - "
        "strongest attack"
    ]
    if all(row["peak_memory_bytes"] is None for row in doc["rows"]):
        lines.append("peak memory is left out: this system does not let a process reset its peak counter")
    else:
        what = (
            "most bytes of tensors at once on the GPU"
            if gpu
            else "resident memory of this process, libraries and images included"
        )
        lines.append(f"peak: {what}, while the run trained and validated; the largest over seeds")
    for method, settings in doc["settings"].items():
        if settings:
            lines.append(f"{method}: {', '.join(f'{key} {value}' for key, value in settings.items())}")
    for method, found in doc["probes"].items():
        if found["expected_seconds"] > doc["compare"]["budget_seconds"]:
            lines.append(f"{method}: one epoch takes {found['expected_seconds']:.3g} s, more than the budget")
    return lines + [line for run in doc["runs"] for line in _ends(run)]


def _ends(run: Values) -> list[str]:
    """The note of a run that did not end with its last epoch."""
    who, trained, epochs = f"{run['method']}, seed {run['seed']}", len(run["epochs"]), run["config"]["epochs"]
    why = f": {run['reason']}" if run["reason"] else ""  # earlier versions stored none
    if run["ended"] == "diverged":
        return [f"{who} diverged{why}"]
    if trained < epochs:
        return [f"{who} ended after epoch {trained} of {epochs}{why}"]
    return []
