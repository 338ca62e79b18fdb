"""A real training on a bare machine without network in 9 minutes: seconds per epoch, time to accuracy.

    bench/gpu_train.sh FOLDER [TARGET [FLAGS...]]

Trains CIFAR-10 (JPEG) until the validation PGD-10 accuracy reaches TARGET (a share, default 0.45), or until
time is up; FLAGS go to `fastdynat train`. Then the best checkpoint is attacked on the spot, because its
weights are larger than what is easily taken home. The images are those of FASTDYNAT_CIFAR10_JPEG (an image
folder) or of what bench/gpu_check.sh --pack made.

FOLDER gets, after every epoch, gpu_train.json and gpu_train.txt with the rows of metrics.jsonl; in the end
also time_to_accuracy.json, gpu_train.tar.gz (logs, metrics, evaluation, and the best weights where they fit
below 16 MiB) or else the weights in pieces, best.model.safetensors.0 and so on, for `cat` to join. The exit
status is 0 if the target was reached.

With --run-dir DIR among FLAGS the run stays there, and a second call with the same DIR goes on where the
first was stopped; its result then has no wall time. FASTDYNAT_TRAIN_SECONDS bounds the training,
FASTDYNAT_TRAIN_TOTAL (default 535) the whole.
FASTDYNAT_GPU_CHECK_DEVICE=cpu trains a tiny network on digits, to test this script.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu import keys
from gpu.archive import LIMIT, split_file, write_archive
from gpu.bare import Bare
from gpu.machine import ROOT
from gpu.parts import Check, Part, Stopped, stop_at_signals

TOTAL = 535.0
PREPARE = 30.0
SAVE = 25.0  # seconds in which a stopped training writes its checkpoint


class Training:
    """The run directory, and what is brought out of it."""

    def __init__(
        self, bare: Bare, run: Path, work: Path, out: Path, target: str, flags: Sequence[str]
    ) -> None:
        self.bare, self.run, self.work, self.out, self.target, self.flags = (
            bare,
            run,
            work,
            out,
            target,
            list(flags),
        )
        self.check: Check | None = None
        self.continued = (run / "config.yaml").is_file()

    def command(self) -> list[str]:
        """Begin the run, or go on with it."""
        bare, gpu = self.bare, self.bare.device != "cpu"
        command = [
            sys.executable,
            "-m",
            "fastdynat",
            "train",
            "--device",
            bare.device,
            "--stop-at",
            self.target,
        ]
        data = bare.data_flags("resnet18") if gpu else []
        if gpu and not data:
            raise ValueError(
                "no images: FASTDYNAT_CIFAR10_JPEG names no folder, and bench/gpu_check.sh --pack made none"
            )
        if self.continued:
            folder = data[data.index("--data-dir") : data.index("--data-dir") + 2] if data else []
            return [*command, "--resume", str(self.run), *folder]
        usual = [*data, "--amp", "--compile", "--epochs", "30", "--schedule", "onecycle"]
        tiny = ["--train-size", "200", "--batch-size", "50", "--epochs", "3", "--steps", "2"]
        return [*command, "--run-dir", str(self.run), *(usual if gpu else tiny), *self.flags]

    def keep(self) -> None:
        """Bring out the rows so far."""
        assert self.check is not None
        source, target = self.run / "metrics.jsonl", self.work / "metrics.jsonl"
        if not source.is_file() or (target.is_file() and target.read_bytes() == source.read_bytes()):
            return
        shutil.copyfile(source, target)
        self.check.about["rows"] = [json.loads(line) for line in target.read_text().splitlines()]
        self.check.about["so far"] = keys.train(target)
        self.check.store()

    def wall(self) -> list[str]:
        """The flag with the seconds of the training command; none for a run that this call went on with."""
        assert self.check is not None
        seconds = next(outcome.seconds for outcome in self.check.outcomes if outcome.name == "train")
        return [] if self.continued else ["--wall", f"{seconds:.1f}"]

    def bring(self) -> None:
        """Bring out configuration and best weights: into the archive where they fit, else in pieces."""
        for name in ("config.yaml", "environment.json"):
            if (self.run / name).is_file():
                shutil.copyfile(self.run / name, self.work / name)
        best, target = self.run / "best", self.work / "best"
        if not (best / "model.safetensors").is_file():
            return
        target.mkdir(exist_ok=True)
        shutil.copyfile(best / "model.json", target / "model.json")
        if (best / "model.safetensors").stat().st_size < LIMIT // 2:
            shutil.copyfile(best / "model.safetensors", target / "model.safetensors")
            return
        named = self.work.parent / "best.model.safetensors"
        shutil.copyfile(best / "model.safetensors", named)
        pieces = split_file(named, self.out)
        assert self.check is not None
        self.check.say(f"weights in {len(pieces)} pieces: cat {named.name}.* > best/model.safetensors")


def parts(bare: Bare, training: Training, most: float) -> list[Part]:
    python, work, run = sys.executable, training.work, training.run
    evaluate = [python, "-m", "fastdynat", "eval", str(run), "--device", bare.device, "--checkpoints", "best"]

    def summary() -> list[str]:
        told = ["--target", training.target, "--json", str(training.out / "time_to_accuracy.json")]
        return [python, "bench/time_to_accuracy.py", str(run), *told, *training.wall()]

    def attack(name: str, seconds: float, attacks: str, images: int) -> Part:
        few = 20 if bare.device == "cpu" else images
        command = [
            *evaluate,
            "--attacks",
            attacks,
            "--num-images",
            str(few),
            "--json",
            str(work / f"{name}.json"),
        ]
        why_not = "minutes on a CPU" if bare.device == "cpu" and not seconds else ""
        key = partial(keys.evaluation, work / f"{name}.json")
        return Part(name=name, seconds=seconds, command=command, key=lambda folder: key(), why_not=why_not)

    return [
        bare.build_part(45),
        Part(
            name="train",
            seconds=310,
            command=training.command,
            key=lambda folder: keys.train(folder / "metrics.jsonl"),
            tick=training.keep,
            grace=SAVE,
            ends_by_time=True,
            most=most,
        ),
        Part(
            name="time-to-accuracy",
            seconds=20,
            command=summary,
            key=lambda folder: keys.last_line(folder / "time-to-accuracy.log"),
        ),
        attack("eval", 90, "clean,pgd20", 10_000),
        attack("autoattack", 0, "fast-autoattack", 500),
    ]


def main(arguments: Sequence[str]) -> int:
    try:
        return start(arguments)
    except Stopped as stopped:  # what had been stored stands
        print(f"gpu_train: stopped by {stopped}", file=sys.stderr)
        return 130


def start(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    out, target, flags = Path(arguments[0]).resolve(), (*arguments, "0.45")[1], list(arguments[2:])
    out.mkdir(parents=True, exist_ok=True)
    stop_at_signals()
    with tempfile.TemporaryDirectory(prefix="fastdynat-gpu-train-") as temporary:
        run = Path(temporary) / "run"
        flags = [
            part
            for flag in flags
            for part in (flag.split("=", 1) if flag.startswith("--run-dir=") else [flag])
        ]
        if "--run-dir" in flags[:-1]:
            place = flags.index("--run-dir")
            run = Path(flags[place + 1]).resolve()
            del flags[place : place + 2]
        work = Path(temporary) / "parts"
        work.mkdir()
        with Bare(os.environ.get("FASTDYNAT_GPU_CHECK_DEVICE", "cuda"), Path(temporary)) as bare:
            return train(bare, Training(bare, run, work, out, target, flags))


def train(bare: Bare, training: Training) -> int:
    total, most = (
        float(os.environ.get("FASTDYNAT_TRAIN_TOTAL", TOTAL)),
        float(os.environ.get("FASTDYNAT_TRAIN_SECONDS", "inf")),
    )
    bare.prepare(PREPARE)
    listed = parts(bare, training, most)
    check = Check(
        "gpu_train", listed, total=total, work=training.work, out=training.out, cwd=ROOT, env=bare.env
    )
    check.begin = bare.begin  # what was prepared counts
    training.check, check.about = check, bare.about
    for word in bare.words:
        check.say(word)
    check.run(training.keep)
    training.bring()
    for word in write_archive(training.work, training.out / "gpu_train.tar.gz"):
        check.say(word)
    check.store()
    print(f"\n{check.table()}")
    return 0 if reached(training.out / "time_to_accuracy.json") and bad(check) <= {"time-to-accuracy"} else 1


def bad(check: Check) -> set[str]:
    return {outcome.name for outcome in check.outcomes if not outcome.good}


def reached(path: Path) -> bool:
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return bool(document.get("reached"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
