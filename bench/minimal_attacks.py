"""C&W-L2 and DeepFool beside torchattacks' at equal settings, as a table and as JSON.

    python bench/minimal_attacks.py --checkpoint RUN/last/model.safetensors --images images.pt --json out.json

The images are a saved pair of (N, C, H, W) floats in [0, 1] and labels (N,). All rows take turns, so that a
slow spell of the machine meets all of them; medians, and ratios within a round. What an attack found is
judged by the network itself, not by the replica. Distances are of the images that both found, misclassified
ones, at distance 0, left out: they would hide differences.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchattacks
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attacks import CarliniL2, DeepFool
from fastdynat.attacks.interface import Attack as FastAttack
from fastdynat.commands.bench.stopwatch import Samples, Stopwatch
from fastdynat.runs import describe_environment, load_network, source_commit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Attack = Callable[[], Tensor]  # -> x_adv


def ours(net: nn.Module, x: Tensor, labels: Tensor, search: FastAttack) -> Tensor:
    """Our attack, the making of its replica included, as an evaluation pays for it."""
    return search(AttackEngine(net, x[:2]).ascent, x, labels).x_adv


def pairs(net: nn.Module, x: Tensor, labels: Tensor) -> dict[str, tuple[Attack, Attack]]:
    """By name: torchattacks' and ours."""
    carlini = CarliniL2(binary_steps=1, steps=50, c=1.0, lr=0.01, abort=False)
    return {
        "C&W-L2, c 1, 50 steps": (
            partial(torchattacks.CW(net, c=1, kappa=0, steps=50, lr=0.01), x, labels),
            partial(ours, net, x, labels, carlini),
        ),
        "DeepFool, 50 steps": (
            partial(torchattacks.DeepFool(net, steps=50, overshoot=0.02), x, labels),
            partial(ours, net, x, labels, DeepFool(steps=50, overshoot=0.02)),
        ),
    }


def compare(net: nn.Module, x: Tensor, labels: Tensor, both: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Success rates and distances of torchattacks' and our images."""
    with torch.no_grad():
        wrong = net(x).argmax(1) != labels
        found = [net(x_adv).argmax(1) != labels for x_adv in both]
    shared = found[0] & found[1] & ~wrong
    lengths = [torch.linalg.vector_norm(x_adv - x, dim=(1, 2, 3)) for x_adv in both]
    return {
        "misclassified_as_they_are": int(wrong.sum()),
        "found_by_both": int(shared.sum()),
        **{
            name: {
                "success": float(hit.double().mean()),
                "mean_l2": float(length[shared].mean()),
                "median_l2": float(length[shared].median()),
                "mean_l2_all_found": float(length[hit].mean()),
            }
            for name, hit, length in zip(("torchattacks", "fastdynat"), found, lengths, strict=True)
        },
        "largest_difference_of_l2": float((lengths[0] - lengths[1])[shared].abs().max()),
    }


def measure(net: nn.Module, x: Tensor, labels: Tensor, rounds: int) -> list[dict[str, Any]]:
    watch, rows = Stopwatch(DEVICE), []
    work = pairs(net, x, labels)
    for both in work.values():
        for call in both:
            call()  # warm-up: allocator, threads
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in work}
    for _ in range(rounds):
        for name, both in work.items():
            for call, samples in zip(both, seconds[name], strict=True):
                samples.append(watch.time(call))
    for name, (peer, mine) in work.items():
        theirs, own = (Samples(tuple(samples)) for samples in seconds[name])
        ratio = Samples(tuple(t / o for t, o in zip(theirs.seconds, own.seconds, strict=True)))
        row = {
            "name": name,
            "torchattacks_s": theirs.summary(),
            "fastdynat_s": own.summary(),
            "times_faster": ratio.summary(),
        }
        rows.append(row | compare(net, x, labels, (peer(), mine())))
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="torchattacks / fastdynat", title_justify="left")
    for column in ("", "seconds", "times faster", "success %", "mean L2", "median L2"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        pair = row["torchattacks"], row["fastdynat"]
        table.add_row(
            row["name"],
            f"{row['torchattacks_s']['median']:.2f} / {row['fastdynat_s']['median']:.2f}",
            f"{row['times_faster']['median']:.1f}",
            " / ".join(f"{100 * p['success']:.1f}" for p in pair),
            " / ".join(f"{p['mean_l2']:.4f}" for p in pair),
            " / ".join(f"{p['median_l2']:.4f}" for p in pair),
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of a run")
    parser.add_argument("--images", type=Path, required=True, help="torch.save of (images, labels)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="instead of torch's own number")
    parser.add_argument("--json", type=Path, help="where the results go")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    x, labels = (tensor.to(DEVICE) for tensor in torch.load(given.images))
    net, sidecar = load_network(given.checkpoint)
    net = net.to(DEVICE).eval()
    rows = measure(net, x, labels, given.rounds)
    show(rows)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "format": "fastdynat-minimal-attacks/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": describe_environment()
            | {"load_average_at_end": os.getloadavg(), "threads": torch.get_num_threads()},
            "torchattacks": version("torchattacks"),
            "network": {
                "architecture": sidecar.architecture,
                "method": sidecar.method,
                "dataset": sidecar.dataset,
            },
            "images": len(x),
            "rows": rows,
        }
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
