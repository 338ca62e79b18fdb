"""The results as plain values for JSON, and as tables."""

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fastdynat.commands.bench.predictions import prediction_values, print_predictions
from fastdynat.commands.bench.roofline import print_roofline
from fastdynat.commands.bench.rows import BenchRow
from fastdynat.commands.bench.step_memory import SWITCH, print_checkpointing
from fastdynat.commands.bench.stopwatch import Samples
from fastdynat.config import TrainConfig, to_flat
from fastdynat.execution.float32 import tf32_allowed
from fastdynat.runs import describe_environment, source_commit
from fastdynat.terminal.consoles import AS_IS, PlainTable

FORMAT = "fastdynat-bench/1"
EPOCH_IMAGES = 50_000  # of CIFAR-10
# What a timing depends on, beside the machine. A baseline must agree in all of it.
NOT_COMPARED = {
    "data_dir",
    "download",
    "drop_last",
    "epochs",
    "eval_batch_size",
    "eval_eps",
    "seed",
    "val_size",
}
LATER = {"fused_conv": "off", "grad_checkpointing": False}
RUN_ONLY = {
    "run_dir",
    "overwrite",
    "stop_after",
    "stop_at",
    "save_every",
    "val_every",
    "tensorboard",
    "quiet",
}
REFERENCES = {"attack": "torchattacks.PGD", "step": "released loop in plain PyTorch"}


def setting_values(config: TrainConfig[Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides how long its steps take."""
    values = {key: value for key, value in to_flat(config).items() if key not in NOT_COMPARED | RUN_ONLY}
    # As it was before the switch existed: baselines from then do not name it.
    return {key: value for key, value in values.items() if LATER.get(key) != value}


def machine() -> dict[str, Any]:
    """`describe_environment` with the rounding of float32 convolutions on a GPU."""
    return describe_environment() | {"tf32_convolutions": tf32_allowed()}


def row_values(row: BenchRow, matmul_rates: Mapping[str, float]) -> dict[str, Any]:
    """One row; `matmul_rates`: FLOP/s by precision."""
    plan, seconds = row.plan, row.samples.summary()
    values: dict[str, Any] = {"name": plan.name, "kind": plan.kind, "ours": plan.ours, "switch": plan.switch}
    values |= {
        "setting": plan.setting,
        "precision": plan.precision,
        "images": plan.images,
        "seconds": seconds,
    }
    if plan.kind != "matmul":
        rates = {key: round(plan.images / seconds[value], 3) for key, value in RATE_QUANTILES.items()}
        values |= {"images_per_s": rates, "flops_per_image": plan.flops // plan.images}
        values["share_of_matmul"] = round(row.flops_per_s / matmul_rates[plan.amp], 4)
    values |= {
        "flops_per_s": float(f"{row.flops_per_s:.5g}"),
        "first_call_seconds": round(row.first_seconds, 3),
    }
    fidelity = None if row.fidelity is None else vars(row.fidelity) | {"weaker": row.fidelity.weaker}
    return values | {
        "peak_memory_bytes": row.peak_memory,
        "fidelity": fidelity,
        "notices": list(row.notices),
        "invalid": row.invalid,
    }


RATE_QUANTILES = {"median": "median", "p20": "p80", "p80": "p20"}  # the fastest rate has the shortest time


def bench_document(
    config: TrainConfig[Any], rows: list[BenchRow], skipped: list[dict[str, str]], **more: Any
) -> dict[str, Any]:
    """Everything, as the JSON file holds it."""
    # Its fastest round: what the machine can do, whatever else it had to do at times.
    rates = {
        row.plan.amp: row.plan.flops / min(row.samples.seconds) for row in rows if row.plan.kind == "matmul"
    }
    values = [row_values(row, rates) for row in rows]
    return {
        "format": FORMAT,
        "command": shlex.join(["fastdynat", *sys.argv[1:]]),
        "commit": source_commit(),
        "environment": machine(),
        "settings": setting_values(config),
        "rows": values,
        "skipped": skipped,
        "switches": gains(values),
        "predicted": prediction_values(),
        **more,
    }


def first_looks(rows: list[BenchRow]) -> list[str]:
    """A line's worth of the rates so far, for a log that may be all that is left."""
    return [
        f"{row.plan.kind} {row.plan.name} {row.rate:,.1f} images/s"
        for row in rows
        if row.plan.kind != "matmul"
    ]


def full_row(values: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The row of the setting that was asked for: the last of ours without a turned switch."""
    own = [v for v in values if v["kind"] == kind and v["ours"] and not v["switch"]]
    return own[-1] if own else None


def gains(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The speedup of the requested setting over that with one switch the other way, where both are valid."""
    found = []
    for v in values:
        full = full_row(values, v["kind"]) if v["switch"] else None
        if full is not None and not full["invalid"] and not v["invalid"]:
            times = full["images_per_s"]["median"] / v["images_per_s"]["median"]
            found.append(
                {"switch": v["switch"], "kind": v["kind"], "turned": v["name"], "gain": round(times, 3)}
            )
    return found


def phase_values(phases: Mapping[str, Samples]) -> dict[str, Any]:
    """Seconds per phase."""
    return {name: samples.summary() for name, samples in phases.items()}


def epoch_values(row: BenchRow | None, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """Seconds of an epoch: of 50,000 images at the step's rate, and measured where that was asked for."""
    values: dict[str, Any] = {"measured": measured}
    if row is not None:
        values |= {"images": EPOCH_IMAGES, "extrapolated_seconds": round(EPOCH_IMAGES / row.rate, 2)}
    return values


def print_document(doc: Mapping[str, Any], console: Console) -> None:
    """The tables."""
    s, env = doc["settings"], doc["environment"]
    guide = "" if s["guide"] == "none" else f", guide {s['guide']}"
    where = ", ".join(env["gpus"]) or f"{env['cpu']}, {env['threads']} threads"
    title = (
        f"{s['method']}: {s['model']}{guide}, batch {s['batch_size']}, PGD-{s['steps']}, "
        f"{where}, torch {env['torch']}"
    )
    console.print(title, **AS_IS)
    for kind, heading in (("attack", "attack"), ("step", "training step")):
        rows = [row for row in doc["rows"] if row["kind"] == kind]
        if rows:
            _print_rates(rows, heading, REFERENCES[kind], console)
    for row in doc["rows"]:
        if row["kind"] == "matmul":
            best = row["flops_per_s"] * row["seconds"]["median"] / row["seconds"]["min"]
            console.print(f"{row['name']}: {best / 1e12:.3g} TFLOP/s at best", **AS_IS)
    print_roofline(doc["roofline"], console)
    if doc["switches"]:
        _print_gains(doc["switches"], console)
        if {gain["switch"] for gain in doc["switches"]} != {SWITCH}:
            on_gpu = bool(env["gpus"]) and s["device"].startswith("cuda")
            print_predictions(doc["switches"], on_gpu, console)
    if doc.get("checkpointing"):
        print_checkpointing(doc["checkpointing"], console)
    if doc["phases"]:
        seconds = {name: values["median"] for name, values in doc["phases"].items()}
        print_parts(f"phases of a training step, {doc['phases_of']}", seconds, console)
    if doc["profile"]:
        print_parts(f"one training step under the profiler, {doc['phases_of']}", doc["profile"], console)
    _print_notes(doc, console)


def _print_rates(rows: list[dict[str, Any]], heading: str, reference: str, console: Console) -> None:
    base = next(
        (row for row in rows if row["name"].partition(", ")[0] == reference), full_row(rows, rows[0]["kind"])
    )
    console.print(heading if base is None else f"\n{heading}; ratio: to {base['name']}", **AS_IS)
    table = PlainTable()
    table.add_column(rows[0]["kind"])
    for column in (
        "images/s",
        "p20 to p80",
        "ms/batch",
        "ratio",
        "TFLOP/s",
        "of matmul",
        "peak MiB",
        "first call s",
    ):
        table.add_column(column, justify="right")
    if any(row["invalid"] for row in rows):
        table.add_column("")
    for row in rows:
        rate = row["images_per_s"]
        base_rate = (
            0.0 if base is None or base["invalid"] or row["invalid"] else base["images_per_s"]["median"]
        )
        memory = row["peak_memory_bytes"]
        remark = [f"INVALID: {row['invalid']}"] if row["invalid"] else []
        table.add_row(
            row["name"],
            f"{rate['median']:,.1f}",
            f"{rate['p20']:,.1f} to {rate['p80']:,.1f}",
            f"{1000 * row['seconds']['median']:,.2f}",
            f"{rate['median'] / base_rate:.2f}" if base_rate else "-",
            f"{row['flops_per_s'] / 1e12:.3g}",
            f"{row['share_of_matmul']:.0%}",
            "-" if memory is None else f"{memory / 2**20:,.0f}",
            f"{row['first_call_seconds']:.2f}",
            *remark,
        )
    console.print(table)


def _print_gains(found: list[dict[str, Any]], console: Console) -> None:
    console.print("\nspeed-up of the requested setting over the same with one switch flipped", **AS_IS)
    table, kinds = PlainTable("switch", "flipped"), ("attack", "step")
    for kind in kinds:
        table.add_column(kind, justify="right")
    by_name: dict[tuple[str, str], dict[str, float]] = {}
    for g in found:
        by_name.setdefault((g["switch"], g["turned"]), {})[g["kind"]] = g["gain"]
    for names, values in by_name.items():
        table.add_row(*names, *(f"{values[k]:.2f}" if k in values else "" for k in kinds))
    console.print(table)


def print_parts(heading: str, seconds: Mapping[str, float], console: Console) -> None:
    """Print what a step is made of, with its shares."""
    console.print(f"\n{heading}", **AS_IS)
    table, total = PlainTable("part"), sum(seconds.values())
    for column in ("ms", "share"):
        table.add_column(column, justify="right")
    for name, part in seconds.items():
        table.add_row(name, f"{1000 * part:,.3f}", f"{part / total:.1%}")
    console.print(table)


def _print_notes(doc: Mapping[str, Any], console: Console) -> None:
    def note(text: str) -> None:
        console.print(text, **AS_IS)

    epoch = doc["epoch"]
    if "extrapolated_seconds" in epoch:
        note(
            f"{epoch['images']:,} images at the step's rate: {epoch['extrapolated_seconds']:,} s "
            "(extrapolated, not measured)"
        )
    if epoch["measured"]:
        m = epoch["measured"]
        rate = f"{m['seconds']:.2f} s, {m['images']:,} images, {m['images_per_s']:,.1f} images/s"
        note(f"one epoch of {m['data']}, measured: {rate}")
    for row in doc["rows"]:
        for text in row["notices"]:
            note(f"{row['kind']}, {row['name']}: {text}")
    for skipped in doc["skipped"]:
        note(f"left out: {skipped['kind']}, {skipped['name']}: {skipped['reason']}")
    if doc["other_load"]:
        note(f"other processes used {doc['other_load']:.0%} of the CPU during the measurement")
