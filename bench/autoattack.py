"""AutoAttack beside the reference package (extra `autoattack`): seconds and robust accuracy, stage by stage, image by image.

    python bench/autoattack.py RUN --data-dir CIFAR --num-images 200 --json bench/results/autoattack_small_cpu.json

Both attack the same images with the same radius, seed and batch size in one process, in turn. Each stage runs on the images
that the stages before it left standing, as AutoAttack does, so that a stage's time depends on both; `--alone` runs each stage
on all images that are classified correctly.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastdynat.data import load_test
from fastdynat.evaluation import AutoAttack
from fastdynat.runs import describe_environment, load_network, source_commit

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")


def by_ours(model: nn.Module, x: Tensor, y: Tensor, stages: list[str], ours: argparse.Namespace) -> Tensor:
    """Which images stay correctly classified, (N,) bool."""
    attack = AutoAttack(model, norm=ours.norm, eps=ours.eps, seed=ours.seed, device=str(x.device), verbose=False)
    attack.stages = [stage for stage in attack.stages if stage.name in stages]
    adversarial = attack.run_standard_evaluation(x, y, bs=ours.batch_size)
    return still_right(model, adversarial, y, ours.batch_size)


def by_reference(model: nn.Module, x: Tensor, y: Tensor, stages: list[str], ours: argparse.Namespace) -> Tensor:
    """The same by pyautoattack, with the restarts of its standard version, which `custom` leaves at 5."""
    from pyautoattack import AutoAttack as Reference

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    attack = Reference(
        model, norm=ours.norm, eps=ours.eps, seed=ours.seed, version="custom", attacks=stages, device=str(x.device)
    )
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=ours.batch_size)
    return still_right(model, adversarial, y, ours.batch_size)


def still_right(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        return torch.cat([model(images).argmax(1) == labels for images, labels in parts])


def measure(model: nn.Module, x: Tensor, y: Tensor, ours: argparse.Namespace) -> list[dict[str, Any]]:
    clean = still_right(model, x, y, ours.batch_size)
    rows: list[dict[str, Any]] = []
    sets = [[stage] for stage in STAGES] if ours.alone else [list(STAGES[: n + 1]) for n in range(len(STAGES))]
    standing = {"ours": clean, "reference": clean}
    for stages in sets:
        row: dict[str, Any] = {"stage": stages[-1], "alone": ours.alone}
        for name, run in (("ours", by_ours), ("reference", by_reference)):
            before = clean if ours.alone else standing[name]
            sync(x)
            start = time.perf_counter()
            kept = (
                run(model, x[before], y[before], stages[-1:], ours) if bool(before.any()) else torch.zeros(0, dtype=torch.bool)
            )
            sync(x)
            seconds = time.perf_counter() - start
            standing[name] = torch.zeros_like(clean).masked_scatter(before, kept)
            row[name] = {"seconds": round(seconds, 3), "attacked": int(before.sum()), "robust": int(standing[name].sum())}
        row["ratio"] = round(row["reference"]["seconds"] / row["ours"]["seconds"], 2)
        row["images_that_differ"] = int((standing["ours"] != standing["reference"]).sum())
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def sync(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def show(case: dict[str, Any]) -> None:
    table = Table(title=f"{case['architecture']}, {case['images']} images, {case['clean']} correct", title_justify="left")
    for column in ("stage", "attacked", "ours s", "reference s", "ratio", "robust, ours", "reference", "images that differ"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for row in case["rows"]:
        a, b = row["ours"], row["reference"]
        numbers = (a["attacked"], a["seconds"], b["seconds"], row["ratio"], a["robust"], b["robust"], row["images_that_differ"])
        table.add_row(row["stage"], *map(str, numbers))
    Console(width=130).print(table)
    print(f"all stages: {case['seconds']['ours']:.1f} s and {case['seconds']['reference']:.1f} s, {case['ratio']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--checkpoint", default="last", choices=["best", "last"])
    parser.add_argument("--data", default="imagefolder")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--norm", default="Linf", choices=["Linf", "L2"])
    parser.add_argument("--eps", type=float, default=8 / 255)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="each stage on all correctly classified images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where the results go")
    ours = parser.parse_args()
    model, sidecar = load_network((ours.run / ours.checkpoint).resolve() / "model.safetensors")
    model = model.to(ours.device).eval()  # its parameters need gradients, as those of most users' models
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    _, images = load_test(ours.data, ours.data_dir, image_size=None, download=False)
    x = (images.images[: ours.num_images].float() / 255).to(ours.device)
    y = images.labels[: ours.num_images].to(ours.device)
    clean = int(still_right(model, x, y, ours.batch_size).sum())
    rows = measure(model, x, y, ours)
    seconds = {name: sum(row[name]["seconds"] for row in rows) for name in ("ours", "reference")}
    case = {"architecture": sidecar.architecture, "method": sidecar.method, "images": len(x), "clean": clean}
    case |= {"rows": rows, "seconds": seconds, "ratio": round(seconds["reference"] / seconds["ours"], 2)}
    show(case)
    if ours.json:
        ours.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "format": "fastdynat-autoattack/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": describe_environment() | {"threads": torch.get_num_threads(), "load_average": os.getloadavg()},
            "norm": ours.norm,
            "eps": ours.eps,
            "seed": ours.seed,
            "batch_size": ours.batch_size,
            **case,
        }
        ours.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
