"""Where the time of a float32 attack on the CPU goes, by kind of layer, and its speed beside torchattacks.

    python bench/attack_profile.py --json bench/results/attack_profile_cpu.json

PGD-10 on random images, one thread, eager, channels-last. Every network is measured once per instruction
set, each time in a process of its own, because libraries choose theirs when they start. Ratios are of
processor time, of calls in turns; shares come from torch's profiler. --only NAME takes one network.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchattacks
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.models import build_model
from fastdynat.runs import describe_environment, source_commit

# Network: batch size, side of the images, classes.
CASES = {"small": (128, 32, 10), "resnet18": (32, 32, 10), "torchvision:resnet50": (4, 224, 1000)}
INSTRUCTIONS = {"AVX-512": {}, "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
EPS, STEP, STEPS = 8 / 255, 2 / 255, 10
OPERATIONS = {
    "fastdynat::winograd_conv3x3": "3x3, Winograd",
    "fastdynat::winograd_weights": "filters of Winograd",
    "fastdynat::image_conv_grad": "first layer",
    "fastdynat::attack_logit_grad": "loss",
    "fastdynat::attack_step_linf": "attack step",
    "fastdynat::random_start": "attack step",
    "aten::threshold_backward": "ReLU",
    "aten::clamp_min": "ReLU",
    "aten::clamp_min_": "ReLU",
    "aten::add": "residual sums",
    "aten::add_": "residual sums",
}
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::convolution_backward")


def calls(network: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor], str]:
    """Our attack, as after an update of the weights, and that of torchattacks; ours in words."""
    torch.manual_seed(0)
    batch, side, classes = CASES[network]
    model = build_model(network, num_classes=classes, image_shape=(3, side, side)).eval()
    x, y = torch.rand(batch, 3, side, side), torch.randint(classes, (batch,))
    engine = AttackEngine(model, x[:2], switches=AttackSwitches(channels_last=True))
    spec, peer = PGDSpec(EPS, STEP, STEPS), torchattacks.PGD(model, EPS, STEP, STEPS)

    def ours() -> Tensor:
        engine.refresh()
        return engine.run(x, AttackGoal("ce", y), spec).x_adv

    return ours, lambda: peer(x, y), engine.path


def parts(attack: Callable[[], Tensor]) -> dict[str, float]:
    """Shares of the time of `attack` by kind of layer."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        attack()
    rows = found.key_averages(group_by_input_shape=True)
    # Of a convolution's stride only the backward pass shows a sign: both sizes.
    strided = {
        (str(shapes[1]), str(shapes[2])): shapes[0][2] < shapes[1][2]
        for shapes in (row.input_shapes for row in rows if row.key == CONVOLUTIONS[1])
    }
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        kind = OPERATIONS.get(row.key, "other")
        if row.key in CONVOLUTIONS:
            image, weight = row.input_shapes[row.key == CONVOLUTIONS[1] :][:2]
            kind = _convolution(image, weight, strided.get((str(image), str(weight)), False))
        seconds[kind] += row.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: round(part / total, 4) for kind, part in sorted(seconds.items(), key=lambda e: -e[1])}


def _convolution(image: list[int], weight: list[int], strided: bool) -> str:
    if image[1] == 3:
        return "first layer"
    return f"{weight[2]}x{weight[3]}" + (", stride 2" if strided else ", direct")


def measure(network: str, rounds: int) -> dict[str, Any]:
    """One network in this process, with the instructions that it was started with."""
    torch.set_num_threads(1)
    ours, peer, path = calls(network)
    taken: dict[str, list[float]] = {"ours": [], "torchattacks": []}
    for call in (ours, peer):
        call()
    for _ in range(rounds):
        for name, call in (("ours", ours), ("torchattacks", peer)):
            begin = time.process_time()
            call()
            taken[name].append(time.process_time() - begin)
    ratios = [theirs / own for own, theirs in zip(taken["ours"], taken["torchattacks"], strict=True)]
    return {
        "network": network,
        "batch_size": CASES[network][0],
        "side": CASES[network][1],
        "path": path,
        "rounds": rounds,
        "seconds": {name: float(f"{statistics.median(s):.4g}") for name, s in taken.items()},
        "ratio": round(statistics.median(ratios), 3),
        "shares": parts(ours),
    }


def measured_apart(network: str, rounds: int, limits: dict[str, str]) -> dict[str, Any]:
    """`measure` in a process limited to some instructions."""
    command = [sys.executable, __file__, "--only", network, "--rounds", str(rounds), "--here"]
    done = subprocess.run(command, env={**os.environ, **limits}, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    shown = Table("network", "instructions", "ours", "torchattacks", "ratio", "largest shares")
    for row in rows:
        largest = ", ".join(f"{kind} {share:.0%}" for kind, share in list(row["shares"].items())[:5])
        seconds = [f"{row['seconds'][who]:.3f} s" for who in ("ours", "torchattacks")]
        shown.add_row(row["network"], row["instructions"], *seconds, f"{row['ratio']:.2f}", largest)
    Console().print(shown)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.only, args.rounds)))
        return
    rows = []
    for network in [args.only] if args.only else CASES:
        for name, limits in INSTRUCTIONS.items():
            rows.append({"instructions": name, **measured_apart(network, args.rounds, limits)})
    show(rows)
    if args.json:
        values = {
            "format": "fastdynat-attack-profile/1",
            "command": f"python bench/attack_profile.py {' '.join(sys.argv[1:])}",
            "commit": source_commit(),
            "environment": {**describe_environment(), "threads": 1},
            "rows": rows,
        }
        args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
