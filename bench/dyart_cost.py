"""Cost of DyART beside PGD training, and of its boundary search beside the released one, as table and JSON.

    python bench/dyart_cost.py --json bench/results/dyart_cost_cpu.json

CIFAR-shaped random images on the GPU if there is one, else on the CPU. All rows of a network take turns, so
that a slow spell of the machine meets all of them; medians. Work is counted in forward passes: F = 1, image
gradient = 1, weight gradient = 2.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.compiled_ascent import CompiledAscent
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks.boundary_search import BoundarySpec, boundary_start, run_boundary
from fastdynat.commands.bench.stopwatch import Samples, Stopwatch
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.execution.fallbacks import Fallbacks
from fastdynat.execution.graph_capture import CudaRecorder
from fastdynat.methods import Dyart, DyartOptions, Madry, MadryOptions, Method
from fastdynat.models import build_model
from fastdynat.ops import project_on_hyperplane, soft_margin
from fastdynat.runs import describe_environment, source_commit
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep
from fastdynat.tuning.devices import AMP_DTYPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
SHAPE = (3, 32, 32)
CASES = {"resnet18": 32, "small": 128}  # network: batch size
PUBLISHED, EQUAL = 20, 5  # iterations; 5 count about as many passes as a step of PGD-10
TEMPERATURE, EPS = 5.0, 8 / 255
TYPICAL_GAP = 3.0  # between the first two logits: a boundary to be found, as in training
Work = dict[str, tuple[Callable[[], object], int]]  # by name: the call, and the passes that it counts


def project_by_sorting(points: Tensor, w: Tensor, offset: Tensor) -> Tensor:
    """Moves to the planes w . z = offset inside [0, 1], flat rows, as the released code finds them: a sort of
    each row, sums along it, and a bisection over the sorted list that waits for the device in every round.
    """
    gap = (w * points).sum(1) - offset
    towards = -gap.sign()[:, None] * w.sign()
    room = torch.where(towards > 0, 1 - points, points) * (w != 0)
    rooms, order = room.sort(1)
    sizes = w.abs().gather(1, order)
    spent = (sizes * rooms).cumsum(1)
    left = sizes.sum(1, keepdim=True) - sizes.cumsum(1)
    need, last = gap.abs(), w.shape[1] - 1
    low, high = torch.zeros(len(w)), torch.full((len(w),), float(last))
    for _ in range(math.ceil(math.log2(last + 1))):
        middle = ((low + high) / 2).floor()
        at = middle.long().to(w.device)[:, None]
        reached = (spent.gather(1, at) + left.gather(1, at) * rooms.gather(1, at))[:, 0]
        short = reached < need
        below, above = short.nonzero()[:, 0].cpu(), (~short).nonzero()[:, 0].cpu()
        low[below], high[above] = middle[below], middle[above]
    at = low.long().to(w.device)[:, None]
    budget = (need[:, None] - spent.gather(1, at)) / left.gather(1, at).clamp_min(1e-12)
    reachable = (spent[:, -1:] > need[:, None]) & (left.gather(1, at) > 0)
    return towards * torch.where(reachable, torch.minimum(budget, room), room)


def search_as_released(net: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The published search in plain PyTorch: the images that are right, picked out; crossings by index."""
    with torch.no_grad():
        right = (soft_margin(net(x), labels, temperature=TEMPERATURE, backend="eager") > 1e-9).nonzero()[:, 0]
    x, labels = x[right], labels[right]
    z, best, nearest = boundary_start(x, EPS), x.clone(), torch.full((len(x),), 1e10, device=x.device)
    flat = x.flatten(1)
    for _ in range(steps):
        leaf = z.clone().requires_grad_()
        margin = soft_margin(net(leaf), labels, temperature=TEMPERATURE, backend="eager")
        w = torch.autograd.grad(margin.sum(), leaf)[0].flatten(1)
        with torch.no_grad():
            offset = (w * z.flatten(1)).sum(1) - margin
            moves = project_by_sorting(
                torch.cat((z.flatten(1), flat)), torch.cat((w, w)), torch.cat((offset, offset))
            )
            d1, d2 = moves[: len(x)].view_as(x), moves[len(x) :].view_as(x)
            lengths = moves.abs().amax(1).clamp_min(1e-8)
            a = (lengths[: len(x)] / (lengths[: len(x)] + lengths[len(x) :])).clamp_max(0.1)[
                :, None, None, None
            ]
            z = ((z + 1.05 * d1) * (1 - a) + (x + 1.05 * d2) * a).clamp(0, 1)
            crossed = (soft_margin(net(z), labels, temperature=TEMPERATURE, backend="eager") < 0).nonzero()[
                :, 0
            ]
            if len(crossed):
                away = (z[crossed] - x[crossed]).flatten(1).abs().amax(1)
                closer = crossed[away < nearest[crossed]]
                best[closer], nearest[closer] = z[closer], away[away < nearest[crossed]]
                z[crossed] = x[crossed] + 0.9 * (z[crossed] - x[crossed])
    with torch.no_grad():
        net(best)
    leaf = best.clone().requires_grad_()
    torch.autograd.grad(soft_margin(net(leaf), labels, temperature=TEMPERATURE, backend="eager").sum(), leaf)
    return nearest


def confident(name: str, x: Tensor) -> nn.Module:
    """A network with running statistics of `x` and margins of the size that training has."""
    net = build_model(name, num_classes=10, image_shape=SHAPE).to(DEVICE).train()
    with torch.no_grad():
        for _ in range(50):
            net(x)
        top = net.eval()(x).topk(2, 1).values
        last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        last.weight.mul_(TYPICAL_GAP / float((top[:, 0] - top[:, 1]).mean()))
    return net


def make_step(method: Method[Any], net: nn.Module, steps: int, ours: argparse.Namespace) -> TrainStep:
    dtype, layout = AMP_DTYPES[ours.amp], GPU or ours.amp != "off"
    networks = NetworkSet(
        net,
        None,
        image_shape=SHAPE,
        device=DEVICE,
        channels_last=layout,
        attack=AttackSwitches(dtype=dtype, channels_last=layout, compile=ours.compile),
        compile_mode=ours.compile,
        fallbacks=Fallbacks(),
    )
    spec = PGDSpec(EPS, EPS / 4, steps)
    recorder = CudaRecorder(DEVICE) if GPU else None
    # Rate 0: every round meets the same network.
    optim = OptimConfig(lr=0.0, epochs=1)
    return TrainStep(
        method,
        networks,
        spec,
        optim,
        Precision(ours.amp, DEVICE),
        lambda n: 1.0,
        recorder=recorder,
        fallbacks=Fallbacks(),
    )


def passes_alone(step: TrainStep, x: Tensor, labels: Tensor, ours: argparse.Namespace) -> Callable[[], None]:
    """The forward and backward passes of a published search, computed as there, and nothing between them."""
    network, dtype = step.networks.attack.replica.network, AMP_DTYPES[ours.amp]
    compiled = ours.compile != "off"
    ascent = (
        CompiledAscent(network, dtype=dtype, mode=ours.compile) if compiled else Ascent(network, dtype=dtype)
    )
    read = ascent.to_model_input(x)

    def test(read: Tensor) -> Tensor:
        with torch.no_grad():
            return soft_margin(ascent.logits(read), labels, temperature=TEMPERATURE)

    def passes(ascent: Ascent, read: Tensor) -> tuple[Tensor, ...]:
        return *ascent.margin_and_grad(read, labels, TEMPERATURE), test(read)

    iteration = ascent.compiled(passes, key="passes")

    def run() -> None:
        test(read)
        for _ in range(PUBLISHED):
            iteration(read)
        ascent.margin_and_grad(read, labels, TEMPERATURE)

    return run


def work_of(name: str, batch_size: int, ours: argparse.Namespace) -> tuple[Work, dict[str, float]]:
    """The rows of one network, and what the two searches found."""
    torch.manual_seed(1)
    x = torch.rand(batch_size, *SHAPE, device=DEVICE)
    net = confident(name, x)
    labels = net(x).argmax(1)
    if GPU or ours.amp != "off":
        x = x.contiguous(memory_format=torch.channels_last)
    batch = Batch(x, labels, torch.arange(batch_size, device=DEVICE))
    madry = make_step(Madry(MadryOptions()), net, 10, ours)
    work: Work = {"step: Madry, PGD-10": (partial(madry, batch), 10 * 2 + 3)}
    for steps in (EQUAL, PUBLISHED):
        step = make_step(Dyart(DyartOptions()), net, steps, ours)
        work[f"step: DyART, {steps} iterations"] = (partial(step, batch), 3 * steps + 3 + 6)
    engine, spec = step.networks.attack, BoundarySpec(steps=PUBLISHED, eps_start=EPS)
    plain = confident(name, x)  # of the same seed's weights, without our replica
    plain.load_state_dict(net.state_dict())
    plain.eval()
    passes = 3 * PUBLISHED + 3
    search = partial(
        engine.captured,
        partial(run_boundary, spec=spec),
        x,
        labels,
        key=spec,
        passes=spec.steps,
    )
    work["search: ours"] = (search, passes)
    work["search: its passes alone"] = (passes_alone(step, x, labels, ours), passes)
    work["search: as released, float32"] = (
        lambda: search_as_released(plain, x, labels, PUBLISHED),
        passes + 1,
    )

    margin, w = engine.margin_and_grad(x, labels, TEMPERATURE)
    at, flat = boundary_start(x, EPS), w.flatten(1)
    offset = (flat * at.flatten(1)).sum(1) - margin
    work["projections of an iteration: ours"] = (
        lambda: [project_on_hyperplane(p, w, margin, at) for p in (at, x)],
        0,
    )
    pairs = (torch.cat((at.flatten(1), x.flatten(1))), torch.cat((flat, flat)), torch.cat((offset, offset)))
    work["projections of an iteration: by sorting"] = (lambda: project_by_sorting(*pairs), 0)

    sorted_move = project_by_sorting(*pairs)[batch_size:].view_as(x)
    assert float((project_on_hyperplane(x, w, margin, at) - x - sorted_move).abs().max()) < 1e-4, (
        "the projections differ"
    )
    found, released = search(), search_as_released(plain, x, labels, PUBLISHED)
    distances = {"ours": found.distance[found.found], "as released": released[released < 1e9]}
    return work, {key: round(float(value.mean()), 5) for key, value in distances.items()} | {
        f"found, {key}": len(value) for key, value in distances.items()
    }


def measure(name: str, batch_size: int, ours: argparse.Namespace) -> dict[str, Any]:
    work, found = work_of(name, batch_size, ours)
    watch, samples = Stopwatch(DEVICE), {key: [] for key in work}
    calls = {}
    for key, (call, _) in work.items():
        for _ in range(5):  # compilation and capture
            call()
        calls[key] = watch.calls_per_sample(watch.time(call))
    for _ in range(ours.rounds):
        for key, (call, _) in work.items():
            samples[key].append(watch.time(call, calls[key]))
    rows = []
    for key, (_, passes) in work.items():
        seconds = Samples(tuple(samples[key]))
        rows.append({"name": key, "seconds": seconds.summary(), "passes": passes})
        if passes:
            rows[-1]["ms_per_pass"] = float(f"{1000 * seconds.median / passes:.4g}")
    # Round by round, so that a slow spell is in both.
    other = Samples(
        tuple(
            1 - p / s
            for p, s in zip(samples["search: its passes alone"], samples["search: ours"], strict=True)
        )
    )
    return {
        "network": name,
        "batch_size": batch_size,
        "search_beside_passes": {key: round(value, 4) for key, value in other.summary().items()},
        "mean_distance": found,
        "rows": rows,
    }


def show(case: dict[str, Any]) -> None:
    table = Table(title=f"{case['network']}, batch {case['batch_size']}", title_justify="left")
    for column in ("", "ms", "passes", "ms per pass"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in case["rows"]:
        table.add_row(
            row["name"],
            f"{1000 * row['seconds']['median']:,.2f}",
            str(row["passes"]),
            str(row.get("ms_per_pass", "")),
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"of the search, not in its passes: {100 * case['search_beside_passes']['median']:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--only", choices=CASES, help="one network")
    parser.add_argument("--batch-size", type=int, help="instead of the usual")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amp", choices=["off", "bf16"], default="bf16" if GPU else "off")
    parser.add_argument("--compile", choices=["off", "default"], default="off")
    ours = parser.parse_args()
    cases = []
    for name, batch_size in CASES.items():
        if ours.only in (None, name):
            cases.append(measure(name, ours.batch_size or batch_size, ours))
            show(cases[-1])
    if ours.json:
        ours.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "format": "fastdynat-dyart-cost/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": describe_environment() | {"load_average_at_end": os.getloadavg()},
            "amp": ours.amp,
            "compile": ours.compile,
            "cases": cases,
        }
        ours.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
