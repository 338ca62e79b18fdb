"""AutoAttack beside the reference package (extra `autoattack`): seconds and accuracy by stage and image.

    python bench/autoattack.py RUN --data-dir CIFAR --num-images 200 --json
    bench/results/autoattack_small_cpu.json python bench/autoattack.py torchvision:resnet18 --train-steps 60
    --data digits --num-images 64 --batch-size 64 --eps 0.02 \
        --json bench/results/autoattack_resnet18_tv_cpu.json

RUN is a run directory, or the name of a network, which is made from the seed and trained for a few steps on
the test images that are not attacked; grey ones become RGB for it.

Both attack the same images with the same radius, seed and batch size in one process, in turn. Each stage runs
on the images that the stages before it left standing, as AutoAttack does, so that a stage's time depends on
both; `--alone` runs each stage on all images that are classified correctly.
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
from fastdynat.evaluation.outcome import pack_bits
from fastdynat.models import build_model
from fastdynat.runs import describe_environment, load_network, source_commit

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")


def by_ours(model: nn.Module, x: Tensor, y: Tensor, stages: list[str], ours: argparse.Namespace) -> Tensor:
    """Mask (N,) bool of the images that stay correctly classified."""
    attack = AutoAttack(
        model, norm=ours.norm, eps=ours.eps, seed=ours.seed, device=str(x.device), verbose=False
    )
    attack.stages = [stage for stage in attack.stages if stage.name in stages]
    adversarial = attack.run_standard_evaluation(x, y, bs=ours.batch_size)
    return still_right(model, adversarial, y, ours.batch_size)


def by_reference(
    model: nn.Module, x: Tensor, y: Tensor, stages: list[str], ours: argparse.Namespace
) -> Tensor:
    """The same by pyautoattack, with the restarts of its standard version, which `custom` leaves at 5."""
    from pyautoattack import AutoAttack as Reference

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    attack = Reference(
        model,
        norm=ours.norm,
        eps=ours.eps,
        seed=ours.seed,
        version="custom",
        attacks=stages,
        device=str(x.device),
    )
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=ours.batch_size)
    return still_right(model, adversarial, y, ours.batch_size)


def still_right(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        return torch.cat([model(images).argmax(1) == labels for images, labels in parts])


def measure(model: nn.Module, x: Tensor, y: Tensor, ours: argparse.Namespace) -> list[dict[str, Any]]:
    clean, clock = still_right(model, x, y, ours.batch_size), clock_of(x)
    rows: list[dict[str, Any]] = []
    sets = (
        [[stage] for stage in STAGES] if ours.alone else [list(STAGES[: n + 1]) for n in range(len(STAGES))]
    )
    standing = {"ours": clean, "reference": clean}
    for stages in sets:
        row: dict[str, Any] = {"stage": stages[-1], "alone": ours.alone}
        for name, run in (("ours", by_ours), ("reference", by_reference)):
            before = clean if ours.alone else standing[name]
            sync(x)
            start, worked = time.perf_counter(), time.process_time()
            kept = (
                run(model, x[before], y[before], stages[-1:], ours)
                if bool(before.any())
                else torch.zeros(0, dtype=torch.bool)
            )
            sync(x)
            seconds, worked = time.perf_counter() - start, time.process_time() - worked
            standing[name] = torch.zeros_like(clean).masked_scatter(before, kept)
            row[name] = {
                "seconds": round(seconds, 3),
                "cpu_seconds": round(worked, 3),
                "attacked": int(before.sum()),
                "robust": int(standing[name].sum()),
                "robust_bits": pack_bits(standing[name]),  # which images
            }
        spent = row["ours"][clock]
        # Nothing may have been left to attack.
        row["ratio"] = round(row["reference"][clock] / spent, 2) if spent else None
        row["images_that_differ"] = int((standing["ours"] != standing["reference"]).sum())
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def clock_of(x: Tensor) -> str:
    """The seconds that are compared: the processor's, which other programs disturb least, or a GPU's."""
    return "seconds" if x.is_cuda else "cpu_seconds"


def briefly_trained(
    name: str, images: Tensor, labels: Tensor, classes: int, steps: int, seed: int
) -> nn.Module:
    """The network called `name` after `steps` of Adam on `images` (N, 3, H, W) in [0, 1]."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes=classes, image_shape=tuple(images.shape[1:])).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), device=images.device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model


def subject(ours: argparse.Namespace) -> tuple[nn.Module, dict[str, str], Tensor, Tensor]:
    """The network, what it is, and the images that are attacked with their labels."""
    info, images = load_test(ours.data, ours.data_dir, image_size=None, download=False)
    x, y = (images.images.float() / 255).to(ours.device), images.labels.to(ours.device)
    count = ours.num_images
    if ":" not in ours.run:
        model, sidecar = load_network((Path(ours.run) / ours.checkpoint).resolve() / "model.safetensors")
        about = {"architecture": sidecar.architecture, "method": sidecar.method}
        return model.to(ours.device), about, x[:count], y[:count]
    x = x.expand(-1, 3, -1, -1).contiguous()
    model = briefly_trained(
        ours.run, x[count:], y[count:], len(info.class_names), ours.train_steps, ours.seed
    )
    about = {"architecture": ours.run, "method": f"natural, {ours.train_steps} steps", "data": info.name}
    return model, about, x[:count], y[:count]


def sync(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def show(case: dict[str, Any]) -> None:
    table = Table(
        title=f"{case['architecture']}, {case['images']} images, {case['clean']} correct",
        title_justify="left",
    )
    for column in (
        "stage",
        "attacked",
        "ours s",
        "reference s",
        "ratio",
        "robust, ours",
        "reference",
        "images that differ",
    ):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    clock = case["clock"]
    for row in case["rows"]:
        a, b = row["ours"], row["reference"]
        numbers = (
            a["attacked"],
            a[clock],
            b[clock],
            row["ratio"],
            a["robust"],
            b["robust"],
            row["images_that_differ"],
        )
        table.add_row(row["stage"], *map(str, numbers))
    Console(width=130).print(table)
    print(
        f"all stages: {case['seconds']['ours']:.1f} s and {case['seconds']['reference']:.1f} s, "
        f"{case['ratio']:.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run directory, torchvision:NAME or timm:NAME")
    parser.add_argument("--train-steps", type=int, default=60, help="of a network by name")
    parser.add_argument("--checkpoint", default="last", choices=["best", "last"])
    parser.add_argument("--data", default="imagefolder")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--norm", default="Linf", choices=["Linf", "L2"])
    parser.add_argument("--eps", type=float, default=8 / 255)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="each stage on all correctly classified images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where the results go")
    ours = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, about, x, y = subject(ours)
    model.eval()  # its parameters need gradients, as those of most users' models
    clean = int(still_right(model, x, y, ours.batch_size).sum())
    rows = measure(model, x, y, ours)
    seconds = {name: sum(row[name][clock_of(x)] for row in rows) for name in ("ours", "reference")}
    case: dict[str, Any] = {**about, "images": len(x), "clean": clean, "clock": clock_of(x)}
    case |= {"rows": rows, "seconds": seconds, "ratio": round(seconds["reference"] / seconds["ours"], 2)}
    show(case)
    if ours.json:
        ours.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "format": "fastdynat-autoattack/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": describe_environment()
            | {"threads": torch.get_num_threads(), "load_average": os.getloadavg()},
            "norm": ours.norm,
            "eps": ours.eps,
            "seed": ours.seed,
            "batch_size": ours.batch_size,
            **case,
        }
        ours.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
