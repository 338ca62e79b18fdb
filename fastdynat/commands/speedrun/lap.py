"""One lap: a training in a process of its own, timed.

    python -m fastdynat.commands.speedrun.lap LAP OUTCOME

LAP is a `Lap` as JSON text, OUTCOME the file that its `LapTimes` go to, or {"error": "..."}. The clock starts
when the images are in memory, decoded, and stops when training has ended and its weights are on the disk. All
that fastdynat does between is inside: choosing and timing of implementations, compilation, every update,
averaging of weights, checkpoints.
"""

import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastdynat.commands.message_flags import Level, printed_messages
from fastdynat.commands.speedrun.plain_loop import EPS, train_plainly
from fastdynat.commands.speedrun.race_rules import plain_settings, training_config
from fastdynat.data import TrainSplit, open_train
from fastdynat.data.read_ahead import set_digest
from fastdynat.data.sources import ReadOnceSplit
from fastdynat.distributed import joined_world
from fastdynat.documents import convert, parse_json
from fastdynat.errors import UserError
from fastdynat.freed_memory import freed_memory_is_kept, keep_freed_memory_without_gpu
from fastdynat.machine.capability import processor
from fastdynat.machine.cores import keep_to_own_cores
from fastdynat.runs import LAST, Sidecar, describe_environment, find_checkpoint, save_weights
from fastdynat.runs.atomic_files import write_text
from fastdynat.runs.layout import METRICS
from fastdynat.terminal.consoles import error_console
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.training import Diverged, new_run, open_split


@dataclass(frozen=True, kw_only=True)
class Lap:
    """The training of a record with one seed. `run_dir` is the folder that it fills."""

    record: str
    loop: Literal["fastdynat", "plain"]
    train: dict[str, Any]
    seed: int
    data: str
    data_dir: str
    device: str
    run_dir: str
    quiet: bool
    log_level: Level = "warning"


@dataclass(frozen=True, kw_only=True)
class LapTimes:
    """Times of a lap.

    Attributes:
        seconds: by the clock of the race.
        cpu_seconds: of all threads of this process over the same time. Much less than `seconds` times the
            threads tells of a machine that was busy with something else.
        preparation_seconds: of these, before the first epoch: networks are built, implementations are chosen.
        first_update_seconds: of these, from the first batch to the end of the first update, with compilation.
        epoch_seconds: of these, of each epoch's updates.
        reading_seconds: reading and decoding the images before the clock starts.
        train_images: number of training images.
        train_sha256: of these, whatever their order.
        weights: the file of the weights that are evaluated, in the lap's folder.
        environment: machine and versions.
        load_average: of the machine over the last minute, when the clock started.
    """

    seconds: float
    cpu_seconds: float
    preparation_seconds: float
    first_update_seconds: float
    epoch_seconds: list[float]
    reading_seconds: float
    train_images: int
    train_sha256: str
    weights: str
    environment: dict[str, Any] = field(default_factory=dict)
    load_average: float


def run_lap(lap: Lap) -> LapTimes | int:
    """Train. Returns the times, or the exit code where a signal stopped it.

    Raises:
        UserError: settings or data that cannot work.
        Diverged: the loss is not finite.
    """
    keep_to_own_cores()
    begin = time.perf_counter()
    return _plain(lap, begin) if lap.loop == "plain" else _fastdynat(lap, begin)


def _fastdynat(lap: Lap, begin: float) -> LapTimes | int:
    own = {key: getattr(lap, key) for key in ("data", "data_dir", "seed", "device", "run_dir", "quiet")}
    config = training_config(lap.train, {**own, "overwrite": True}, lap.record)
    with joined_world(config.engine.device, config.engine.rank_timeout):
        split = ReadOnceSplit.of(open_split(config))
        in_memory = config.data.loader in ("auto", "resident") or not split.in_files
        if in_memory:
            split.train_images()
        load, cpu, start = os.getloadavg()[0], time.process_time(), time.perf_counter()
        with new_run(config, split=split) as trainer:
            ready = time.perf_counter()
            outcome = trainer.fit()
            end, cpu = time.perf_counter(), time.process_time() - cpu
            path, first_update = trainer.run.path, trainer.first_update_seconds
    if not outcome.finished:
        return 128 + (outcome.signal or 0)
    rows = [json.loads(line) for line in (path / METRICS).read_text(encoding="utf-8").splitlines()]
    folder = find_checkpoint(path, LAST)
    assert folder is not None
    return LapTimes(
        seconds=end - start,
        cpu_seconds=cpu,
        preparation_seconds=ready - start,
        first_update_seconds=first_update or 0.0,
        epoch_seconds=[row["train_seconds"] for row in rows],
        reading_seconds=start - begin,
        train_images=len(split.train),
        train_sha256=set_digest(split.train_images() if in_memory else split.train_files()),
        weights=str((folder / "model.safetensors").resolve().relative_to(path.resolve())),
        environment=lap_environment(lap.device),
        load_average=load,
    )


def _plain(lap: Lap, begin: float) -> LapTimes:
    import torchattacks  # noqa: F401 (extra `peer`; imports are not on the clock)

    settings = plain_settings(lap.train, lap.record)
    split: TrainSplit = open_train(lap.data, lap.data_dir, val_size=0, seed=lap.seed)
    read = split.train_images()
    images, info = read.images.float() / 255, split.info
    load, cpu, start = os.getloadavg()[0], time.process_time(), time.perf_counter()
    display = ProgressDisplay(error_console(), quiet=lap.quiet)
    run = train_plainly(images, read.labels, info.num_classes, settings, lap.seed, lap.device, display.line)
    about = Sidecar(
        architecture=settings.model,
        num_classes=info.num_classes,
        image_shape=info.image_shape,
        mean=None,
        std=None,
        dataset=info.name,
        class_names=info.class_names,
        role="model",
        method="madry",
        norm="linf",
        eps=EPS,
        eval_eps=EPS,
        epoch=settings.epochs,
        val_clean_acc=None,
        val_pgd10_acc=None,
    )
    folder = Path(lap.run_dir)
    shutil.rmtree(folder, ignore_errors=True)  # measurements of an earlier training, too
    folder.mkdir(parents=True)
    save_weights(folder / "model.safetensors", run.model.state_dict(), about)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return LapTimes(
        seconds=seconds,
        cpu_seconds=cpu,
        preparation_seconds=max(0.0, seconds - sum(run.epoch_seconds)),
        first_update_seconds=run.first_update_seconds,
        epoch_seconds=run.epoch_seconds,
        reading_seconds=start - begin,
        train_images=len(images),
        train_sha256=set_digest(read),
        weights="model.safetensors",
        environment=lap_environment(lap.device),
        load_average=load,
    )


def lap_environment(device: str) -> dict[str, Any]:
    """Machine and versions, with the public flags of the processor, and how freed memory is treated.

    A preloaded library (file names alone) may be an allocator, which keeps memory in its own way.
    """
    preloaded = re.split("[ :]+", os.environ.get("LD_PRELOAD", ""))
    own = {"processor": processor(torch.device(device)), "keeps_freed_memory": freed_memory_is_kept()}
    return {**describe_environment(), **own, "preloaded": [Path(name).name for name in preloaded if name]}


def lap_command(argv: list[str]) -> int:
    """Run the lap that `argv` describes; the exit code is 0, 2 with an error, or 128+n after signal n."""
    text, outcome = argv
    lap = convert(parse_json(text, dict[str, Any], origin="LAP", what="a lap"), Lap, origin="LAP")
    with printed_messages(lap.log_level, error_console(), quiet=lap.quiet):
        try:
            found = run_lap(lap)
        except (UserError, Diverged) as error:
            kind = "diverged" if isinstance(error, Diverged) else "error"
            write_text(Path(outcome), json.dumps({kind: str(error)}) + "\n")
            return 2
    if isinstance(found, int):
        return found
    rounded = {key: _rounded(value) for key, value in asdict(found).items()}
    write_text(Path(outcome), json.dumps(rounded) + "\n")
    return 0


def _rounded(value: Any) -> Any:
    """`value` with seconds to the millisecond."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def lap_program(argv: list[str]) -> int:
    """`lap_command` in a process of its own, with freed memory as `fastdynat train` keeps it.

    The plain loop runs as people run it: without.
    """
    if json.loads(argv[0]).get("loop") == "fastdynat":
        keep_freed_memory_without_gpu()
    return lap_command(argv)


if __name__ == "__main__":
    sys.exit(lap_program(sys.argv[1:]))
