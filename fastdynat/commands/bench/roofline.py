"""Count, floor, expectation and measurement of a training step as one table.

Floors are what the arithmetic alone takes at the rate of a large matrix product, and what it takes where each
convolution also reads its inputs and writes its outputs once (per kernel the longer of the two; everything
pointwise is taken to ride along). Neither can be reached. The expectation is the share of the first floor
that a step is expected to reach, written down below before it was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from fastdynat.commands.bench.flops import Kernels, StepFlops, total
from fastdynat.commands.bench.rows import BenchRow
from fastdynat.commands.bench.stopwatch import Stopwatch
from fastdynat.config import TrainConfig
from fastdynat.terminal.consoles import AS_IS, PlainTable

PARTS = ("attack", "update", "guide")
ITEM_BYTES = {"off": 4, "bf16": 2, "fp16": 2}
COPIED = {"cuda": 1 << 28, "cpu": 1 << 25}  # float32 numbers of the copy that is timed


@dataclass(frozen=True)
class Peak:
    """FLOP/s of a large matrix product, bytes per second (read and written) of a copy, and their source."""

    flops: float
    copied: float
    source: str


# Measured with PyTorch 2.11 on an H200: an 8192^3 product of random bf16 numbers, a device-to-device copy.
# (The H100 beside it had the same rate of products and 3.0 TB/s.) The data sheet's 989 TFLOP/s are reached by
# no product of ours.
REFERENCE = Peak(798e12, 4.3e12, "H200, bf16")

# Of steps shorter than this floor nothing is expected there: launches and waiting decide.
SHORTEST = 1e-3

# (device type, half precision, compiled) -> the share of the first floor, from and to, and why.
EXPECTED: dict[tuple[str, bool, bool], tuple[float, float, str]] = {
    ("cuda", True, True): (
        0.34,
        0.40,
        "convolutions of 32x32 images at 35 to 50 % of a product's rate, batch norm and ReLU between them "
        "bound by memory",
    ),
    ("cuda", True, False): (
        0.15,
        0.25,
        "launch-bound without graphs, and up to five passes over each activation",
    ),
    ("cpu", True, True): (
        0.9,
        1.0,
        "nearly all is convolution at the rate of products (ResNet-18 on a 2-core EPYC)",
    ),
    ("cpu", True, False): (0.9, 1.0, "as compiled: convolutions dominate"),
    ("cpu", False, True): (1.0, 1.3, "Winograd's algorithm needs fewer multiplications than are counted"),
    ("cpu", False, False): (1.0, 1.3, "Winograd's algorithm needs fewer multiplications than are counted"),
}


def copy_rate(watch: Stopwatch, device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds; the best of three."""
    source = torch.ones(COPIED[device.type], device=device)
    target = torch.empty_like(source)
    times = [watch.time(lambda: target.copy_(source), watch.calls_per_sample(1e-3)) for _ in range(4)]
    return 2 * source.numel() * source.element_size() / min(times[1:])


def peak_of(rows: Sequence[BenchRow], config: TrainConfig[Any], copied: float) -> Peak | None:
    """This machine's rates in `config`'s precision, by its best matrix product; None if untimed."""
    products = [row for row in rows if row.plan.kind == "matmul" and row.plan.amp == config.engine.amp]
    if not products:
        return None
    best = max(row.plan.flops / min(row.samples.seconds) for row in products)
    return Peak(best, copied, f"measured here: {products[0].plan.name}, copy")


def measured_parts(rows: Sequence[BenchRow], phases: Mapping[str, float]) -> dict[str, float]:
    """Seconds per batch of the setting that was asked for. `phases`: of its step, where these run one after
    the other.
    """
    asked = {
        row.plan.kind: row.samples.median
        for row in rows
        if row.plan.ours and not row.plan.switch and row.samples.seconds
    }
    found: dict[str, float] = {kind: asked[kind] for kind in ("attack", "step") if kind in asked}
    if phases:
        found["guide"] = phases["guide (inner half)"]
        found["update"] = sum(phases[name] for name in ("outer forward", "outer backward", "optimiser"))
    return found


def floors(kernels: Kernels, peak: Peak, item_bytes: int) -> tuple[float, float]:
    """Seconds by arithmetic alone, and by the longer of arithmetic and traffic per kernel."""
    both = sum(
        times * max(flops / peak.flops, elements * item_bytes / peak.copied)
        for (flops, elements), times in kernels.items()
    )
    return total(kernels) / peak.flops, both


def roofline_values(
    flops: StepFlops, config: TrainConfig[Any], here: Peak | None, measured: Mapping[str, float]
) -> dict[str, Any]:
    """The table as plain values. `here`: this machine's rates, None where nothing was timed yet; `measured`:
    seconds by part.

    With REFERENCE's rates beside it: what the same step is expected to take there, in bf16.
    """
    engine = config.engine
    key = (torch.device(engine.device).type, engine.amp != "off", engine.compile != "off")
    values: dict[str, Any] = {
        "batch_size": config.data.batch_size,
        "flops": {part: total(flops.kernels[part]) for part in PARTS} | {"step": total(sum_of(flops))},
        "measured_seconds": {name: float(f"{seconds:.5g}") for name, seconds in measured.items()},
        "here": None if here is None else _against(flops, here, ITEM_BYTES[engine.amp], EXPECTED.get(key)),
        "reference": _against(flops, REFERENCE, ITEM_BYTES["bf16"], EXPECTED["cuda", True, True], SHORTEST),
    }
    if here is not None and "step" in measured:
        values["share_of_roofline"] = round(values["here"]["floor_seconds"]["step"] / measured["step"], 4)
    return values


def sum_of(flops: StepFlops) -> Kernels:
    """The kernels of the whole step."""
    return sum((flops.kernels[part] for part in PARTS), Kernels())


def _against(
    flops: StepFlops,
    peak: Peak,
    item_bytes: int,
    expected: tuple[float, float, str] | None,
    shortest: float = 0.0,
) -> dict[str, Any]:
    parts = {part: floors(flops.kernels[part], peak, item_bytes) for part in PARTS}
    parts["step"] = floors(sum_of(flops), peak, item_bytes)
    values: dict[str, Any] = {
        "peak": {"flops_per_s": peak.flops, "bytes_per_s": peak.copied, "source": peak.source}
    }
    values["floor_seconds"] = {name: float(f"{alone:.5g}") for name, (alone, _) in parts.items()}
    values["floor_with_memory_seconds"] = {name: float(f"{both:.5g}") for name, (_, both) in parts.items()}
    if expected is not None and parts["step"][0] >= shortest:
        low, high, why = expected
        alone = parts["step"][0]
        values["expected"] = {
            "share": [low, high],
            "why": why,
            "step_seconds": [round(alone / s, 6) for s in (high, low)],
        }
    return values


def print_roofline(values: Mapping[str, Any], console: Console) -> None:
    """The table."""
    here, reference, measured = values["here"], values["reference"], values["measured_seconds"]
    total_flops = values["flops"]["step"]
    console.print(
        f"\none training step, batch {values['batch_size']}: {_tera(total_flops)} TFLOP, counted", **AS_IS
    )
    table = PlainTable("part")
    columns = [
        "TFLOP",
        "floor ms",
        "+ memory",
        "expected ms",
        "measured ms",
        "of floor",
        "reference ms",
        "+ memory",
    ]
    for column in [*columns, "expected ms"]:
        table.add_column(column, justify="right")
    for part in (*PARTS, "step"):
        if not values["flops"][part]:
            continue
        floor = "" if here is None else here["floor_seconds"][part]
        share = f"{floor / measured[part]:.0%}" if floor and part in measured else ""
        table.add_row(
            part,
            _tera(values["flops"][part]),
            _ms(floor),
            _ms("" if here is None else here["floor_with_memory_seconds"][part]),
            _range(here, part),
            _ms(measured.get(part, "")),
            share,
            _ms(reference["floor_seconds"][part]),
            _ms(reference["floor_with_memory_seconds"][part]),
            _range(reference, part),
        )
    console.print(table)
    for name, side in (("floor", here), ("reference", reference)):
        if side is not None:
            peak = side["peak"]
            rates = (
                f"{peak['flops_per_s'] / 1e12:.3g} TFLOP/s, {peak['bytes_per_s'] / 1e12:.3g} "
                f"TB/s ({peak['source']})"
            )
            console.print(f"{name}: {rates}{_why(side)}", **AS_IS)


def _why(side: Mapping[str, Any]) -> str:
    if "expected" not in side:
        return ""
    low, high = side["expected"]["share"]
    return f"; expected {low:.0%} to {high:.0%} of it: {side['expected']['why']}"


def _range(side: Mapping[str, Any] | None, part: str) -> str:
    if side is None or part != "step" or "expected" not in side:
        return ""
    low, high = side["expected"]["step_seconds"]
    return f"{_ms(low)} to {_ms(high)}"


def _ms(seconds: float | str) -> str:
    return (
        ""
        if seconds == ""
        else f"{1000 * float(seconds):.3g}"
        if float(seconds) < 1
        else f"{1000 * float(seconds):,.0f}"
    )


def _tera(flops: int) -> str:
    return f"{flops / 1e12:.3g}"
