"""Parts of `bench/gpu_check.sh`: their commands, limits and results."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu import keys
from gpu.bare import Bare
from gpu.parts import Part

NO_DATA = "no CIFAR-10"
FASTDYNAT = (sys.executable, "-m", "fastdynat")


@dataclass(frozen=True)
class Sizes:
    """Sizes that differ between a GPU and a test on a CPU."""

    resnet18: str = "resnet18"
    guide: str = "resnet18_s1122"
    wrn: str = "wrn-34-10"
    amp: tuple[str, ...] = ("--amp", "--compile")
    bench: tuple[str, ...] = ("--batch-size", "128", "--seconds", "1")
    budget: float = 1.0  # of what rows of bench may be prepared in
    processes: int = 8
    expression: str = "gpu"
    operators: tuple[str, ...] = ()
    operator_seconds: str = "0.1"
    evaluated: str = "1000"
    trained: tuple[str, ...] = ("--train-size", "10000", "--epochs", "2", "--check-fidelity", "512")
    trained_on_digits: tuple[str, ...] = ("--epochs", "2", "--check-fidelity", "100")
    loaders: tuple[str, ...] = ("--rounds", "3")


TINY_TRAINING = (
    *("--train-size=60", "--val-size=20", "--batch-size=20"),
    *("--steps=1", "--epochs=1", "--check-fidelity=20"),
)
TINY = Sizes(
    resnet18="small",
    guide="small",
    wrn="small",
    amp=("--amp", "bf16"),
    bench=("--batch-size", "8", "--steps", "2", "--repeats", "1"),
    budget=0.1,
    processes=2,
    expression="not slow and not simulated and not peer",
    operators=("--only", "soft_margin"),
    operator_seconds="0.05",
    evaluated="20",
    trained=TINY_TRAINING,
    trained_on_digits=TINY_TRAINING,
    loaders=("--rounds", "1", "--num-images", "1000"),
)
TINY_TESTS = (
    "config/test_units.py",
    "training/test_update.py",
    "attack_engine/test_shrinking_batch.py",
)  # in place of those that need a GPU


@dataclass(frozen=True)
class Plan:
    """All parts: on `bare`, at `sizes`, with their results in `work`."""

    bare: Bare
    sizes: Sizes
    work: Path

    def parts(self) -> list[Part]:
        """Most important first; seconds are limits, of which a GPU needs a part."""
        full = self.bench("resnet18-full", 40, self.sizes.resnet18, self.sizes.guide, "--peers")
        switches = self.bench("resnet18-switches", 20, self.sizes.resnet18, self.sizes.resnet18, "--switches")
        wrn = self.bench("wrn-34-10", 20, self.sizes.wrn, self.sizes.guide)
        run = self.bare.temporary / "run"
        return [
            self.bare.build_part(45),
            Part(name="doctor", seconds=20, command=[*FASTDYNAT, "doctor"]),
            self.tests([("resnet18-full", full), ("wrn-34-10", wrn)]),
            bench_part("resnet18-full", 70, full),
            bench_part("resnet18-switches", 45, switches),
            bench_part("wrn-34-10", 40, wrn),
            self.operators(),
            self.sanitizer("memcheck", 25),
            Part(
                name="train",
                seconds=50,
                command=lambda: self.train(run),
                key=lambda folder: keys.train(folder / "train.jsonl"),
                tick=lambda: keep(run / "metrics.jsonl", self.work / "train.jsonl"),
            ),
            self.evaluation(run),
            # In what the others left:
            Part(
                name="doctor-check",
                seconds=0,
                command=[*FASTDYNAT, "doctor", "--check"],
                key=lambda folder: keys.doctor(folder / "doctor-check.log"),
                ends_by_time=True,
            ),
            self.sanitizer("racecheck", 0),
            self.loaders(),
            self.dyart_cost(),
            self.race("speedrun-quick", "--seeds", "1", "--quick"),
            self.race("speedrun"),
        ]

    def tests(self, benches: Sequence[tuple[str, list[str]]]) -> Part:
        """The tests, and beside them the compilations of `benches` and of training.

        With empty caches these take a minute or more. What they timed beside other work is not read by the
        parts that measure: fastdynat's timings are in a folder of their own, and the choices of Inductor's
        autotuner are removed in the end (torch 2.11 has no variable that keeps them from being stored).
        """
        out = self.work / "tests"
        files = (
            [f"tests/{name}" for name in TINY_TESTS] if self.bare.device == "cpu" else self.bare.gpu_tests()
        )
        shards = [sys.executable, "bench/gpu/shards.py", "--processes", str(self.sizes.processes)]
        shards += ["--out", str(out), "--expression", self.sizes.expression, "--test-limit", "60", *files]

        def command() -> list[str]:
            cold = ["nice", "env", f"XDG_CACHE_HOME={self.bare.temporary / 'cold'}"]
            cold += ["OMP_NUM_THREADS=2", "TORCHINDUCTOR_COMPILE_THREADS=4"]
            commands = [("tests", shards)]
            commands.append(("cold-train", [*cold, *self.train(self.bare.temporary / "cold-run")]))
            for name, words in benches:
                moved = [word.replace(str(self.work), str(out)) for word in words]
                commands.append((f"cold-{name}", [*cold, *moved]))
            listed = [word for name, words in commands for word in (":::", name, *words)]
            return [sys.executable, "bench/gpu/side_by_side.py", "--out", str(out), "--until", "125", *listed]

        return Part(
            name="tests",
            seconds=150,
            command=command,
            key=lambda folder: keys.tests(folder / "tests" / "tests.json"),
            end=self.bare.forget_choices,
        )

    def bench(self, name: str, budget: float, model: str, guide: str, *flags: str) -> list[str]:
        """Command of `fastdynat bench`; `budget` is in seconds."""
        setting = ["--device", self.bare.device, "--model", model, "--guide", guide]
        setting += [*self.sizes.amp, *self.sizes.bench]
        limits = ["--budget", f"{budget * self.sizes.budget:g}", "--json", str(self.work / f"{name}.json")]
        return [*FASTDYNAT, "bench", *setting, *limits, *flags]

    def operators(self) -> Part:
        """Every operator's implementations, timed."""
        flags = ["--without", "compiled", *self.sizes.operators, "--json", str(self.work / "operators.json")]
        return Part(
            name="operators",
            seconds=35,
            command=[sys.executable, "bench/operators.py", *flags],
            env={
                "FASTDYNAT_BENCH_SECONDS": self.sizes.operator_seconds,
                "FASTDYNAT_BENCH_DEVICE": self.bare.device,
            },
            key=lambda folder: keys.operators(folder / "operators.json"),
            why_not=self.bare.lacks("pytest_benchmark"),
        )

    def train(self, folder: Path) -> list[str]:
        """Command that trains into `folder`."""
        data = self.bare.data_flags(self.sizes.resnet18)
        own = ["--device", self.bare.device, "--run-dir", str(folder)]
        sizes = self.sizes.trained if data else self.sizes.trained_on_digits
        return [*FASTDYNAT, "train", *own, *data, *self.sizes.amp, *sizes]

    def evaluation(self, run: Path) -> Part:
        """Evaluation of what `train` left in `run`."""
        flags = ["--device", self.bare.device, "--checkpoints", "last", "--attacks", "clean,pgd20"]
        flags += ["--num-images", self.sizes.evaluated, "--json", str(self.work / "eval.json")]
        return Part(
            name="eval",
            seconds=15,
            command=[*FASTDYNAT, "eval", str(run), *flags],
            key=lambda folder: keys.evaluation(folder / "eval.json"),
        )

    def loaders(self) -> Part:
        """Loaders, on CIFAR-10 where it is at hand."""

        def command() -> list[str]:
            data = ["--data-dir", str(folder)] if (folder := self.bare.data()) is not None else []
            own = [*self.sizes.loaders, "--json", str(self.work / "loaders.json")]
            return [sys.executable, "bench/loaders.py", *own, *data]

        return Part(name="loaders", seconds=0, command=command)

    def dyart_cost(self) -> Part:
        """Cost of DyART's step beside Madry's."""
        own = ["--rounds", "3", "--json", str(self.work / "dyart_cost.json")]
        return Part(
            name="dyart-cost",
            seconds=0,
            command=[sys.executable, "bench/dyart_cost.py", *own],
            why_not="minutes on a CPU" if self.bare.device == "cpu" else "",
        )

    def race(self, name: str, *flags: str) -> Part:
        """The records of the track gpu-1. The second race goes on from the laps of the first."""
        records, out = ("gpu1-fgsm-rs", "gpu1-trades"), self.bare.temporary / "race"

        def command() -> Sequence[str]:
            if (folder := self.bare.data()) is None:
                raise ValueError(f"{NO_DATA}: FASTDYNAT_CIFAR10_JPEG names none, and the pack holds none")
            data = ["--data", "imagefolder", "--data-dir", str(folder)]
            own = [*data, "--out", str(out), *flags]
            return [*FASTDYNAT, "speedrun", "--record", ",".join(records), *own]

        return Part(
            name=name,
            seconds=0,
            command=command,
            key=lambda folder: keys.race([folder / f"{record}.json" for record in records]),
            tick=lambda: [keep(out / f"{record}.json", self.work / f"{record}.json") for record in records],
            ends_by_time=True,
            unable=(NO_DATA,),
            good_codes=(0, 1),  # 1: a record does not count, as none does in a race of one seed
            why_not="needs a GPU" if self.bare.device == "cpu" else "",
        )

    def sanitizer(self, tool: str, seconds: float) -> Part:
        """The operators' calls under compute-sanitizer; on a CPU the calls alone."""
        calls = [sys.executable, "tests/support/sanitized_calls.py", "--on"]
        calls += ["cpu", "cpp"] if self.bare.device == "cpu" else ["cuda", "cuda"]
        calls += ["10"]  # seconds of calls: what they are watched by makes them many times slower
        program = shutil.which("compute-sanitizer") or "compute-sanitizer"
        watched = [program, "--tool", tool, "--error-exitcode", "9", *calls]
        missing = (
            ""
            if shutil.which("compute-sanitizer") or self.bare.device == "cpu"
            else "no compute-sanitizer on this machine"
        )
        return Part(
            name=tool,
            seconds=seconds,
            command=calls if self.bare.device == "cpu" else watched,
            # torch's allocator hands out parts of one large block, inside of which no tool sees an overrun.
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            key=lambda folder: keys.sanitizer(folder / f"{tool}.log"),
            unable=("Device not supported", "Unable to find injection library", "Failed to initialize"),
            ends_by_time=True,
            bad=FOUND_BY_SANITIZER,
            why_not=missing or self.bare.why_no_calls(),
        )


# Lines of compute-sanitizer, which names each error where it happens and counts all at the end. That the
# process "didn't terminate successfully" is none of them: SIGINT at the limit says so too.
FOUND_BY_SANITIZER = (
    r"^=+ (Invalid|Misaligned|Out-of-range|Program hit|Hardware exception|Uninitialized|Barrier error)\b",
    r"^=+ Error: (Race|Potential)\b",
    r"ERROR SUMMARY: [1-9]",
    r"RACECHECK SUMMARY: .*\([1-9]\d* error",
)


def bench_part(name: str, seconds: float, command: list[str]) -> Part:
    """A part of `fastdynat bench`."""
    return Part(
        name=name,
        seconds=seconds,
        command=command,
        key=lambda folder: keys.bench(folder / f"{name}.json"),
    )


def keep(source: Path, target: Path) -> None:
    """Copy a small file where there is one."""
    if source.is_file():
        shutil.copyfile(source, target)


def chosen(listed: list[Part], only: str | None) -> list[Part]:
    """The parts that `only` names, or all.

    Raises:
        ValueError: it names no part, or one that does not exist.
    """
    if only is None:
        return listed
    names = [name for name in only.split(",") if name]
    known = [part.name for part in listed]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"--only {', '.join(unknown)}: no such part; parts are {', '.join(known)}")
    return [part for part in listed if part.name in names]
