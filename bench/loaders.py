"""Images per second of the loaders, as a table and JSON: images in memory, and a folder to stream.

    python bench/loaders.py --json bench/results/loaders_cpu.json --data-dir cifar10-jpeg

Whole epochs of crops and flips into float batches on the GPU if there is one, else on the CPU, with nobody
using the batches. Loaders take turns epoch by epoch, so that a slow spell of the machine meets all of them;
medians. A loader is timed only if its first epoch gave the resident loader's images, labels and (but for what
a decoder rounds) pixels.
"""

import argparse
import json
import os
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastdynat.data import ImageSet, TrainLoader, dali_problem, default_workers, make_loader, open_train
from fastdynat.runs import describe_environment, source_commit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOADERS = ("resident", "torch", "dali") if dali_problem() is None else ("resident", "torch")
DECODER_ROUNDS = 1 / 255  # mean difference that is taken for rounding; the wrong image or crop is far above


def epoch_seconds(loader: TrainLoader, epoch: int) -> tuple[float, float]:
    """Seconds until the first batch, and until the last is on the device."""
    begin = time.perf_counter()
    batches = loader.epoch(epoch)
    x = next(batches).x
    first = time.perf_counter() - begin
    for batch in batches:
        x = batch.x
    float(x[0, 0, 0, 0])  # waits for the device
    return first, time.perf_counter() - begin


def check(name: str, loader: TrainLoader, resident: TrainLoader) -> None:
    for ours, right in zip(loader.epoch(0), resident.epoch(0), strict=True):
        assert torch.equal(ours.indices, right.indices), name
        assert torch.equal(ours.labels, right.labels), name
        assert float((ours.x - right.x).abs().mean()) < DECODER_ROUNDS, f"{name}: other pixels"


def measure(case: str, loaders: dict[str, TrainLoader], rounds: int) -> list[dict[str, Any]]:
    """A row per loader; `loaders` begins with the resident one, which the others are compared with."""
    resident = next(iter(loaders.values()))
    for name, loader in loaders.items():
        check(f"{case}, {name}", loader, resident)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for epoch in range(1, rounds + 1):
        for name, loader in loaders.items():
            times[name].append(epoch_seconds(loader, epoch))
    rows = []
    for name, loader in loaders.items():
        rates = [round(loader.num_images / seconds) for _, seconds in times[name]]
        rows.append(
            {
                "case": case,
                "loader": name,
                "images": loader.num_images,
                "images_per_s": statistics.median(rates),
                "all_epochs": rates,
                "first_batch_ms": round(1000 * statistics.median(first for first, _ in times[name]), 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--data-dir", type=Path, help="folder that holds train/CLASS/*.jpg")
    parser.add_argument("--num-images", type=int, default=50_000, help="images in memory")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each loader")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="processes of torch, threads of dali"
    )
    ours = parser.parse_args()
    options = {
        "batch_size": ours.batch_size,
        "augment": "crop-flip",
        "seed": 1,
        "device": DEVICE,
        "workers": ours.workers,
    }

    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (ours.num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    arrays = ImageSet(pixels, torch.randint(10, (ours.num_images,), generator=generator))
    made = {name: make_loader(name, arrays, **options) for name in LOADERS}
    rows = measure(f"memory, {ours.num_images:,} of 32x32", made, ours.rounds)
    if ours.data_dir:
        split = open_train("imagefolder", ours.data_dir, val_size=0, seed=1)
        begin = time.perf_counter()
        decoded = split.train_images()
        decoding = time.perf_counter() - begin
        made = {"resident, decoded before": make_loader("resident", decoded, **options)}
        made |= {
            name: make_loader(name, split.train_files(), **options) for name in LOADERS if name != "resident"
        }
        height, width = split.info.image_shape[1:]
        found = measure(f"folder, {len(split.train):,} of {height}x{width}", made, ours.rounds)
        found[0]["decoding_before_s"] = round(decoding, 2)
        rows += found

    table = Table(title=f"images/s, batch {ours.batch_size}, {ours.workers} worker(s)", title_justify="left")
    for column in ("images", "loader", "images/s", "first batch, ms"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(row["case"], row["loader"], f"{row['images_per_s']:,}", f"{row['first_batch_ms']:,}")
    Console(width=120).print(table)
    if ours.json:
        ours.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "format": "fastdynat-loaders/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": describe_environment()
            | {"dali": dali_version(), "load_average_at_end": os.getloadavg()},
            "workers": ours.workers,
            "rows": rows,
        }
        ours.json.write_text(json.dumps(document, indent=1) + "\n")


def dali_version() -> str | None:
    try:
        return version("nvidia-dali-cuda130")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
