"""Images per second of a training step on several processes beside one, and the bytes that they communicate.

    python bench/scaling.py --json bench/results/scaling_cpu.json
    python bench/scaling.py --backend nccl --json scaling_gpus.json
    torchrun --nnodes 2 --nproc-per-node 8 ... bench/scaling.py --backend nccl --json scaling_16.json

The global batch is the same for every row. On the CPU: two processes of one thread each beside one process of
one and of two threads; with NCCL: 1, 2, 4, ... GPUs of this machine. All rows are set up first and take turns
step by step, so that a slow spell of the machine meets all of them; medians. Under torchrun only the world
that it started is measured. Bytes are the tensors handed to collectives in the first step, counted in
PyTorch's dispatcher; beside the ideal, in which a ring sends 2 (W-1)/W of each parameter once.
"""

import argparse
import json
import multiprocessing
import os
import re
import socket
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GLOO_ROWS = ((1, 1), (1, 2), (2, 1))  # processes, threads of each
CASES = {"small": 128, "resnet18": 32}  # network: global batch
LIMIT = 1800.0  # seconds for an answer: compilation and capture are in it
PRODUCTS = "avx|fma|amx|f16c"  # flags of a processor that matter here


@dataclass(frozen=True)
class Rank:
    """What a process is told when it starts."""

    rank: int
    size: int
    threads: int
    port: int
    ours: argparse.Namespace


def count_collectives() -> Any:
    """A mode under which collectives are counted: calls and bytes of their tensors, by name and dtype."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Collectives(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Counter[str] = Counter()
            self.bytes: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
                dtypes = ",".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
                name = f"{func._overloadpacket.__name__.rstrip('_')} {dtypes}".strip()
                self.calls[name] += 1
                self.bytes[name] += sum(tensor.nbytes for tensor in tensors)
            return func(*args, **(kwargs or {}))

    return Collectives()


class Worker:
    """The training step of one rank."""

    def __init__(self, ours: argparse.Namespace) -> None:
        from fastdynat.config import override
        from fastdynat.data import dataset_info
        from fastdynat.data.random_images import random_split
        from fastdynat.distributed import world
        from fastdynat.methods.configs import default_config
        from fastdynat.training import build_parts
        from fastdynat.training.resolve import resolve

        info = dataset_info("cifar10")
        assert info is not None
        device = f"cuda:{world().local_rank}" if ours.backend == "nccl" else "cpu"
        values = {
            "data": "cifar10",
            "model": ours.model,
            "batch_size": ours.batch_size,
            "steps": ours.steps,
            "val_size": 0.0,
            "loader": "resident",
            "device": device,
            "amp": ours.amp,
            "compile": ours.compile,
        }
        # What a machine would time for itself, each process anew, is fixed: all rows run the same step.
        values |= {} if ours.backend == "nccl" else {"channels_last": "off", "winograd": "off"}
        config = resolve(override(default_config(ours.method), values, "bench"), info, announce=False)
        self.gpu = ours.backend == "nccl"
        split = random_split(info, ours.batch_size, seed=1, batches=2)
        parts = build_parts(config, split)
        self.step, self.world = parts.step, world()
        self.batches = list(islice(parts.loader.epoch(0), 2))
        self.step.start_epoch(0)
        trained = [parts.networks.raw[name] for name in self.step.method.trains]
        self.about = {
            "trained_bytes": sum(p.nbytes for net in trained for p in net.parameters()),
            "trained_networks": len(trained),
            "updates": self.step.method.replays,
            "path": self.step.path,
            "amp": config.engine.amp,
            "attack_steps": config.attack.steps,
        }
        mode = count_collectives()
        with mode:
            self.step(self.batches[0])
        self.about["collectives"] = {"calls": dict(mode.calls), "bytes": dict(mode.bytes)}
        for number in range(ours.warm_up):
            self.step(self.batches[number % 2])

    def seconds(self, steps: int) -> float:
        """Seconds per step of `steps` steps, with the device done at both ends."""
        import torch

        self.world.barrier()
        if self.gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for number in range(steps):
            self.step(self.batches[number % 2])
        if self.gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps


def serve(place: Rank, end: Connection) -> None:
    """A process of a row: joins its world, and steps when it is asked to."""
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.rank),
        "LOCAL_WORLD_SIZE": str(place.size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(place.port),
    }
    try:
        import torch

        from fastdynat.distributed import join_world, leave_world

        torch.set_num_threads(place.threads)
        if place.size > 1:
            join_world("cuda" if place.ours.backend == "nccl" else "cpu")
        worker = Worker(place.ours)
        end.send(worker.about)
        while (steps := end.recv()) is not None:
            end.send(worker.seconds(steps))
        leave_world()
    except EOFError:
        return
    except BaseException:
        end.send(traceback.format_exc())


class Row:
    """The processes of one row."""

    def __init__(self, size: int, threads: int, ours: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        self.size, self.threads = size, threads
        self.ends, self.processes = [], []
        # Read by OpenMP when it is loaded, which is before a process runs any line of ours.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        for rank in range(size):
            near, far = spawn.Pipe()
            process = spawn.Process(target=serve, args=(Rank(rank, size, threads, port, ours), far))
            process.start()
            far.close()
            self.ends.append(near)
            self.processes.append(process)
        self.about = [self._answer(end) for end in self.ends]
        self.samples: list[float] = []

    def _answer(self, end: Connection) -> Any:
        found = end.recv() if end.poll(LIMIT) else f"no answer within {LIMIT:.0f} s"
        if isinstance(found, str):
            raise SystemExit(found)
        return found

    def time(self, steps: int) -> None:
        for end in self.ends:
            end.send(steps)
        self.samples.append(max(self._answer(end) for end in self.ends))

    def close(self) -> None:
        for end in self.ends:
            with suppress(OSError):  # a process that has failed
                end.send(None)
        for process in self.processes:
            process.join(30)
            process.kill()


def row_values(
    size: int, threads: int, about: dict[str, Any], samples: list[float], ours: argparse.Namespace
) -> dict[str, Any]:
    """One row for JSON."""
    from fastdynat.commands.bench.stopwatch import Samples

    seconds = Samples(tuple(samples))
    counted = about["collectives"]["bytes"]
    ideal = about["trained_bytes"] * about["updates"]
    return {
        "processes": size,
        "threads_of_each": threads,
        "images_per_s": float(f"{ours.batch_size / seconds.median:.5g}"),
        "seconds": seconds.summary(),
        **{name: value for name, value in about.items() if name != "collectives"},
        "collectives": about["collectives"],
        "bytes_handed_over": sum(counted.values()),
        "ideal_bytes_handed_over": ideal if size > 1 else 0,
        "ideal_bytes_sent": round(2 * ideal * (size - 1) / size),
        "share_of_ideal": round(sum(counted.values()) / ideal, 5) if size > 1 else None,
    }


def compared(rows: list[dict[str, Any]]) -> None:
    """Add each row's speed beside one process of one thread, and beside one with as many threads in all."""
    single = {row["threads_of_each"]: row["images_per_s"] for row in rows if row["processes"] == 1}
    for row in rows:
        cores = row["processes"] * row["threads_of_each"]
        if 1 in single:
            row["speedup"] = round(row["images_per_s"] / single[1], 4)
        if row["processes"] > 1 and cores in single:
            row["beside_threads"] = round(row["images_per_s"] / single[cores], 4)


def measure(ours: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network, which take turns."""
    rows: list[Row] = []
    try:
        for size, threads in worlds(ours):
            rows.append(Row(size, threads, ours))
        for _ in range(ours.rounds):
            for row in rows:
                row.time(ours.in_a_row)
        found = [row_values(row.size, row.threads, row.about[0], row.samples, ours) for row in rows]
    finally:
        for row in rows:
            row.close()
    compared(found)
    return found


def worlds(ours: argparse.Namespace) -> list[tuple[int, int]]:
    """Processes and threads of each row."""
    if ours.backend == "gloo":
        return list(GLOO_ROWS)
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise SystemExit("--backend nccl: there is no GPU here")
    sizes = sorted({2**power for power in range(count.bit_length()) if 2**power <= count} | {count})
    return [(size, 1) for size in sizes]


def measure_launched(ours: argparse.Namespace) -> list[dict[str, Any]]:
    """The row of the world that torchrun has started; empty on other ranks than the first."""
    import torch

    from fastdynat.distributed import join_world, leave_world

    here = join_world("cuda" if ours.backend == "nccl" else "cpu")
    worker, samples = Worker(ours), []
    for _ in range(ours.rounds):
        samples.append(max(here.gather(worker.seconds(ours.in_a_row))))
    row = row_values(here.size, torch.get_num_threads(), worker.about, samples, ours)
    leave_world()
    return [row] if here.first else []


def show(model: str, rows: list[dict[str, Any]], ours: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}, {ours.method}, global batch {ours.batch_size}", title_justify="left")
    for column in ("processes", "threads", "images/s", "ms", "p20 to p80", "times one", "MB", "of ideal"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            str(row["processes"]),
            str(row["threads_of_each"]),
            f"{row['images_per_s']:,.1f}",
            f"{1e3 * seconds['median']:.1f}",
            f"{1e3 * seconds['p20']:.1f} to {1e3 * seconds['p80']:.1f}",
            f"{row.get('speedup', 0) or '':}",
            f"{row['bytes_handed_over'] / 1e6:.2f}",
            "" if row["share_of_ideal"] is None else f"{row['share_of_ideal']:.4f}",
        )
    Console(width=120).print(table)


def processor_flags() -> list[str]:
    """The instruction sets of this processor that decide how fast it multiplies."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return sorted(word for word in line.split() if re.match(PRODUCTS, word))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--model", help="one network, instead of the usual ones")
    parser.add_argument("--method", default="dynat")
    parser.add_argument("--batch-size", type=int, help="images of the global batch, instead of the usual")
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16", "default"])
    parser.add_argument("--compile", default="off", choices=["off", "default"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--in-a-row", type=int, default=1, help="steps of a sample; 20 with NCCL")
    parser.add_argument("--warm-up", type=int, default=2)
    ours = parser.parse_args()
    if ours.backend == "nccl":
        ours.in_a_row, ours.warm_up = max(20, ours.in_a_row), max(10, ours.warm_up)
    return ours


def main() -> None:
    ours, load_before = arguments(), os.getloadavg()
    from fastdynat.distributed import launched
    from fastdynat.runs import describe_environment, source_commit

    sizes = CASES if ours.model is None else {ours.model: CASES.get(ours.model, 128)}
    sizes = {model: ours.batch_size or size for model, size in sizes.items()}
    cases, alone = [], not launched()
    for model, size in sizes.items():
        ours.model, ours.batch_size = model, size
        rows = measure(ours) if alone else measure_launched(ours)
        if not rows:
            return
        show(model, rows, ours)
        cases.append({"network": model, "method": ours.method, "global_batch": size, "rows": rows})
    if ours.json:
        ours.json.parent.mkdir(parents=True, exist_ok=True)
        about = describe_environment() | {"processor_flags": processor_flags()}
        about |= {"load_average_before": load_before, "load_average_at_end": os.getloadavg()}
        document = {
            "format": "fastdynat-scaling/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": about,
            "backend": ours.backend,
            "cases": cases,
        }
        ours.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
