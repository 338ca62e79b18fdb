"""Predicted speed of training on 8 and 64 GPUs, from counted work and stated constants; nothing is measured.

    python bench/scaling_model.py --json bench/results/scaling_model.json

Work: the products and convolutions of one training step of Madry's method, counted; among the methods that
attack with PGD it has the least arithmetic per gradient byte, so the others lose less. Each kernel takes the
longest of its arithmetic, its traffic and a shortest kernel's time. Communication: one all-reduce
of the gradients in float32 per update; every GPU sends 2 P (W-1)/W of P bytes. The same with the all-reduce
cut into buckets that are sent during the backward pass of the update.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastdynat.commands.bench.flops import Kernels, StepFlops, count_step
from fastdynat.commands.bench.roofline import EXPECTED, REFERENCE
from fastdynat.methods import Madry, MadryOptions
from fastdynat.models import build_model
from fastdynat.runs import describe_environment, source_commit


@dataclass(frozen=True)
class Constants:
    """What the model assumes of an H100 SXM and its links.

    Attributes:
        flops: FLOP/s of a large bf16 product; measured on an H200, whose rate an H100 beside it had.
        share: of it that a step reaches, pointwise kernels included; the middle of what `bench` expects.
        copied: bytes per second of memory, read and written; measured on an H100.
        shortest: seconds of the shortest kernel, with the gap after it, in a CUDA graph.
        nvlink, nic: bytes per second and direction of a GPU's NVLink 4 and of its 400 Gbit/s network card.
        reached: share of these rates that a collective reaches.
        node: GPUs in a machine, each with a network card of its own.
        latency: seconds of an all-reduce of no bytes, by the number of GPUs.
        bucket: bytes of a bucket where communication overlaps the backward pass (PyTorch's default).
    """

    flops: float = REFERENCE.flops
    share: float = sum(EXPECTED["cuda", True, True][:2]) / 2
    copied: float = 3.0e12
    shortest: float = 3e-6
    nvlink: float = 450e9
    nic: float = 50e9
    reached: float = 0.8
    node: int = 8
    latency: tuple[tuple[int, float], ...] = ((8, 25e-6), (64, 60e-6))
    bucket: int = 25 << 20


@dataclass(frozen=True)
class Case:
    """A network, its images and the steps of the attack; the global batches to predict."""

    name: str
    model: str
    shape: tuple[int, int, int]
    classes: int
    attack_steps: int
    batches: tuple[int, ...]


CIFAR = ((3, 32, 32), 10, 10, (128, 1024))
CASES = (
    Case("ResNet-18", "resnet18", *CIFAR),
    Case("WRN-34-10", "wrn-34-10", *CIFAR),
    Case("WRN-70-16", "wrn-70-16", *CIFAR),
    Case("ConvNeXt-T, 224 px", "timm:convnext_tiny", (3, 224, 224), 1000, 2, (1024,)),
)
WORLDS = (8, 64)
LEAST = 2  # images of a rank
C = Constants()


def seconds(kernels: Kernels) -> float:
    """Time of the kernels, one after the other, in bf16."""
    return sum(
        times * max(flops / (C.share * C.flops), 2 * elements / C.copied, C.shortest)
        for (flops, elements), times in kernels.items()
    )


def all_reduce(size: int, world: int) -> float:
    """Seconds to sum `size` bytes over `world` GPUs.

    A ring crosses from one machine to the next once per machine, and there are as many rings as network
    cards: each card carries its share of the bytes.
    """
    sent = 2 * size * (world - 1) / world
    inside = sent / (C.reached * C.nvlink)
    between = sent / (C.reached * C.nic * C.node) if world > C.node else 0.0
    return dict(C.latency)[world] + max(inside, between)


def counted(case: Case, images: int) -> tuple[StepFlops, int]:
    """A step on `images` images, and the parameters of the network."""
    with torch.device("meta"):
        net = build_model(case.model, num_classes=case.classes, image_shape=case.shape)
    parameters = sum(p.numel() for p in net.parameters())
    step = count_step(Madry(MadryOptions()), net, None, case.shape, case.attack_steps, batch_size=images)
    return step, parameters


def compute(step: StepFlops) -> tuple[float, float]:
    """Seconds of a step without communication, and of its update's backward pass: 2/3 of the update."""
    attack, update = (seconds(step.kernels[part]) for part in ("attack", "update"))
    return attack + update, 2 / 3 * update


def predict(case: Case, batch: int, world: int) -> dict[str, Any]:
    """One row."""
    alone, _ = compute(counted(case, batch)[0])
    step, parameters = counted(case, batch // world)
    work, backward = compute(step)
    size = 4 * parameters
    sent = all_reduce(size, world)
    last = all_reduce(min(C.bucket, size), world)
    exposed = last + max(0.0, sent - last - backward)
    times = {"apart": work + sent, "overlapped": work + exposed}
    return {
        "network": case.name,
        "attack_steps": case.attack_steps,
        "parameters": parameters,
        "gpus": world,
        "global_batch": batch,
        "images_per_gpu": batch // world,
        "bytes_per_gpu": round(2 * size * (world - 1) / world),
        "one_gpu_seconds": alone,
        "compute_seconds": work,
        "all_reduce_seconds": sent,
        "exposed_seconds": {"apart": sent, "overlapped": exposed},
        "kept_by_communication": {name: work / value for name, value in times.items()},
        "efficiency": {name: alone / (world * value) for name, value in times.items()},
        "momentum_bytes": size,
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for column in ("network", "GPUs", "batch", "ms", "MB", "all-reduce, ms", "efficiency", "overlapped"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        values = (row["compute_seconds"], row["all_reduce_seconds"])
        table.add_row(
            row["network"],
            str(row["gpus"]),
            str(row["global_batch"]),
            f"{1e3 * values[0]:.2f}",
            f"{row['bytes_per_gpu'] / 1e6:.0f}",
            f"{1e3 * values[1]:.2f}",
            *(f"{share:.1%}" for share in row["efficiency"].values()),
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the prediction goes")
    ours = parser.parse_args()
    rows = [
        rounded(predict(case, batch, world))
        for case in CASES
        for batch in case.batches
        for world in WORLDS
        if batch >= LEAST * world
    ]
    show(rows)
    if ours.json:
        document = {
            "format": "fastdynat-scaling-model/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": describe_environment(),
            "measured": False,
            "constants": asdict(C),
            "rows": rows,
        }
        ours.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
