"""Every check that needs a GPU, on a bare machine without network in 9 minutes: tests, timings, training.

    bench/gpu_check.sh [FOLDER]                  run; results go into FOLDER (default gpu-results)
    bench/gpu_check.sh --only tests,train        run these parts only, in their usual order
    bench/gpu_check.sh --pack [PACK]             make the folder to take along (default gpu-pack) and say what
                                                 is missing in it
    bench/gpu_check.sh --check-pack [PACK]       only say what is missing

FOLDER gets gpu_check.txt and gpu_check.json, up to date after every part, and gpu_check.tar.gz (under 16 MiB)
with logs and results of the parts. Each part has a limit, and what one leaves goes to the next, never the
other way; a part that fails or hangs does not keep the next from running; the exit status is 1 if one failed,
hung or found no time.

The caller's PYTHONPATH is kept. Where PACK lies in the checkout, packages that this Python lacks, a
fastdynat._C that the checkout lacks, and CIFAR-10 come from it. FASTDYNAT_CIFAR10_JPEG names CIFAR-10 as an
image folder, FASTDYNAT_GPU_PACK another PACK. FASTDYNAT_GPU_CHECK_DEVICE=cpu runs the same parts at tiny
sizes, to test this script.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu import keys
from gpu.archive import write_archive
from gpu.bare import Bare
from gpu.machine import PACK, ROOT
from gpu.parts import Check, Part, Stopped, stop_at_signals

TOTAL = 535.0  # seconds, of a call that may take 540
PREPARE = 30.0  # of these, before the parts


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
    loaders: tuple[str, ...] = ("--rounds", "3")


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
    trained=(
        "--train-size",
        "60",
        "--val-size",
        "20",
        "--batch-size",
        "20",
        "--steps",
        "1",
        "--epochs",
        "1",
        "--check-fidelity",
        "20",
    ),
    loaders=("--rounds", "1", "--num-images", "1000"),
)
TINY_TESTS = (
    "config/test_units.py",
    "training/test_update.py",
    "attack_engine/test_shrinking_batch.py",
)  # in place of those that need a GPU


def parts(bare: Bare, sizes: Sizes, work: Path) -> list[Part]:
    """Most important first; seconds are limits, of which a GPU needs a part."""
    python, device = sys.executable, bare.device
    fastdynat = [python, "-m", "fastdynat"]

    def bench(name: str, budget: float, model: str, guide: str, *flags: str) -> list[str]:
        setting = ["--device", device, "--model", model, "--guide", guide, *sizes.amp, *sizes.bench]
        limits = ["--budget", f"{budget * sizes.budget:g}", "--json", str(work / f"{name}.json")]
        return [*fastdynat, "bench", *setting, *limits, *flags]

    def bench_part(name: str, seconds: float, command: list[str]) -> Part:
        return Part(
            name=name,
            seconds=seconds,
            command=command,
            key=lambda folder: keys.bench(folder / f"{name}.json"),
        )

    files = [f"tests/{name}" for name in TINY_TESTS] if device == "cpu" else bare.gpu_tests()
    shards = [
        python,
        "bench/gpu/shards.py",
        "--processes",
        str(sizes.processes),
        "--out",
        str(work / "tests"),
    ]
    shards += ["--expression", sizes.expression, "--test-limit", "60", *files]
    run = bare.temporary / "run"

    def train(folder: Path) -> list[str]:
        data = bare.data_flags(sizes.resnet18)
        return [
            *fastdynat,
            "train",
            "--device",
            device,
            "--run-dir",
            str(folder),
            *data,
            *sizes.amp,
            *sizes.trained,
        ]

    evaluated = [
        "--attacks",
        "clean,pgd20",
        "--num-images",
        sizes.evaluated,
        "--json",
        str(work / "eval.json"),
    ]
    timing = {"FASTDYNAT_BENCH_SECONDS": sizes.operator_seconds, "FASTDYNAT_BENCH_DEVICE": device}
    full = bench("resnet18-full", 40, sizes.resnet18, sizes.guide, "--peers")
    switches = bench("resnet18-switches", 20, sizes.resnet18, sizes.resnet18, "--switches")
    wrn = bench("wrn-34-10", 20, sizes.wrn, sizes.guide)

    def warm_up() -> list[str]:
        """The tests, and beside them the compilations of later parts, which take a minute or more with empty
        caches. Their timings, made beside other work, are kept away from those parts.
        """
        cold = ["nice", "env", f"XDG_CACHE_HOME={bare.temporary / 'cold'}"]
        cold += ["OMP_NUM_THREADS=2", "TORCHINDUCTOR_COMPILE_THREADS=4"]
        out = work / "tests"
        commands = [("tests", shards), ("cold-train", [*cold, *train(bare.temporary / "cold-run")])]
        for name, command in (("resnet18-full", full), ("wrn-34-10", wrn)):
            moved = [word.replace(str(work), str(out)) for word in command]
            commands.append((f"cold-{name}", [*cold, *moved]))
        words = [word for name, command in commands for word in (":::", name, *command)]
        return [python, "bench/gpu/side_by_side.py", "--out", str(out), "--until", "125", *words]

    return [
        bare.build_part(45),
        Part(name="doctor", seconds=20, command=[*fastdynat, "doctor"]),
        Part(
            name="tests",
            seconds=150,
            command=warm_up,
            key=lambda folder: keys.tests(folder / "tests" / "tests.json"),
        ),
        bench_part("resnet18-full", 70, full),
        bench_part("resnet18-switches", 45, switches),
        bench_part("wrn-34-10", 40, wrn),
        Part(
            name="operators",
            seconds=35,
            command=[
                python,
                "bench/operators.py",
                "--without",
                "compiled",
                *sizes.operators,
                "--json",
                str(work / "operators.json"),
            ],
            env=timing,
            key=lambda folder: keys.operators(folder / "operators.json"),
            why_not=bare.lacks("pytest_benchmark"),
        ),
        sanitizer(bare, "memcheck", 25),
        Part(
            name="train",
            seconds=50,
            command=lambda: train(run),
            key=lambda folder: keys.train(folder / "train.jsonl"),
            tick=lambda: keep(run / "metrics.jsonl", work / "train.jsonl"),
        ),
        Part(
            name="eval",
            seconds=15,
            command=[*fastdynat, "eval", str(run), "--device", device, "--checkpoints", "last", *evaluated],
            key=lambda folder: keys.evaluation(folder / "eval.json"),
        ),
        # In what the others left:
        Part(
            name="doctor-check",
            seconds=0,
            command=[*fastdynat, "doctor", "--check"],
            key=lambda folder: keys.doctor(folder / "doctor-check.log"),
            ends_by_time=True,
        ),
        sanitizer(bare, "racecheck", 0),
        Part(
            name="loaders",
            seconds=0,
            command=lambda: [
                *(python, "bench/loaders.py", *sizes.loaders, "--json", str(work / "loaders.json")),
                *(["--data-dir", str(folder)] if (folder := bare.data()) is not None else []),
            ],
        ),
        Part(
            name="dyart-cost",
            seconds=0,
            command=[python, "bench/dyart_cost.py", "--rounds", "3", "--json", str(work / "dyart_cost.json")],
            why_not="minutes on a CPU" if device == "cpu" else "",
        ),
        race(bare, "speedrun-quick", work, "--seeds", "1", "--quick"),
        race(bare, "speedrun", work),
    ]


def race(bare: Bare, name: str, work: Path, *flags: str) -> Part:
    """The records of the track gpu-1. The second race goes on from the laps of the first."""
    records, out = ("gpu1-fgsm-rs", "gpu1-trades"), bare.temporary / "race"

    def command() -> Sequence[str]:
        if (folder := bare.data()) is None:
            raise ValueError("no CIFAR-10: FASTDYNAT_CIFAR10_JPEG names none, and the pack holds none")
        data = ["--data", "imagefolder", "--data-dir", str(folder)]
        own = [*data, "--out", str(out), *flags]
        return [sys.executable, "-m", "fastdynat", "speedrun", "--record", ",".join(records), *own]

    return Part(
        name=name,
        seconds=0,
        command=command,
        key=lambda folder: keys.race([folder / f"{record}.json" for record in records]),
        tick=lambda: [keep(out / f"{record}.json", work / f"{record}.json") for record in records],
        ends_by_time=True,
        good_codes=(0, 1),  # 1: a record does not count, as none does in a race of one seed
        why_not="needs a GPU" if bare.device == "cpu" else "",
    )


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


def sanitizer(bare: Bare, tool: str, seconds: float) -> Part:
    """The operators' calls under compute-sanitizer; on a CPU the calls alone."""
    calls = [sys.executable, "tests/support/sanitized_calls.py", "--on"]
    calls += ["cpu", "cpp"] if bare.device == "cpu" else ["cuda", "cuda"]
    calls += ["10"]  # seconds of calls: what they are watched by makes them many times slower
    program = shutil.which("compute-sanitizer") or "compute-sanitizer"
    watched = [program, "--tool", tool, "--error-exitcode", "9", *calls]
    missing = (
        ""
        if shutil.which("compute-sanitizer") or bare.device == "cpu"
        else "no compute-sanitizer on this machine"
    )
    return Part(
        name=tool,
        seconds=seconds,
        command=calls if bare.device == "cpu" else watched,
        # torch's allocator hands out parts of one large block, inside of which no tool sees an overrun.
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        key=lambda folder: keys.sanitizer(folder / f"{tool}.log"),
        unable=("Device not supported", "Unable to find injection library", "Failed to initialize"),
        ends_by_time=True,
        why_not=missing or bare.why_no_calls(),
    )


def keep(source: Path, target: Path) -> None:
    """Copy a small file where there is one."""
    if source.is_file():
        shutil.copyfile(source, target)


def check(ours: argparse.Namespace) -> int:
    out = Path(ours.folder or ROOT / "gpu-results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    stop_at_signals()
    device = os.environ.get("FASTDYNAT_GPU_CHECK_DEVICE", "cuda")
    with tempfile.TemporaryDirectory(prefix="fastdynat-gpu-check-") as temporary:
        work = Path(temporary) / "parts"
        work.mkdir()
        with Bare(device, Path(temporary)) as bare:
            sizes = TINY if device == "cpu" else Sizes()
            try:
                chosen(parts(bare, sizes, work), ours.only)
            except ValueError as error:
                print(f"gpu_check: error: {error}", file=sys.stderr)
                return 2
            return _check(bare, sizes, work, out, ours)


def _check(bare: Bare, sizes: Sizes, work: Path, out: Path, ours: argparse.Namespace) -> int:
    total = ours.total
    bare.prepare(PREPARE)
    listed = chosen(parts(bare, sizes, work), ours.only)
    run = Check("gpu_check", listed, total=total, work=work, out=out, cwd=ROOT, env=bare.env)
    run.begin = bare.begin  # what was prepared counts
    run.about = bare.about
    for word in bare.words:
        run.say(word)
    archive = out / "gpu_check.tar.gz"

    def store() -> None:
        try:
            for word in write_archive(work, archive):
                print(f"gpu_check: {word}")
        except (OSError, ValueError) as error:
            run.say(f"no archive: {error}")

    good = run.run(store)
    print(f"\n{run.table()}")
    if archive.is_file():
        print(f"{archive}: {archive.stat().st_size:,} bytes")
    return 0 if good else 1


def pack(ours: argparse.Namespace) -> int:
    from gpu.pack import check_pack, describe, find_data, make_pack

    folder = Path(ours.folder or ROOT / PACK).resolve()
    try:
        limit = int(ours.limit_mib * 2**20)
        if ours.pack:
            make_pack(folder, python=ours.python_version, data=find_data(ours.data), limit=limit)
        missing = check_pack(folder, limit)
        print(describe(folder))
    except (ValueError, OSError) as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    for each in missing:
        print(f"  missing: {each}")
    print("complete" if not missing else f"{len(missing)} missing")
    return 1 if missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="folder of the results, or of the pack")
    parser.add_argument("--pack", action="store_true", help="make the folder that a bare machine needs")
    parser.add_argument("--check-pack", action="store_true", help="only say what is missing in the pack")
    parser.add_argument(
        "--python-version", default="3.12", help="Python version of the machine that the pack is for"
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 as JPEG, an archive or a folder, for the pack")
    parser.add_argument(
        "--limit-mib", type=float, default=64, help="limit on the pack and the checkout's files together"
    )
    parser.add_argument("--only", help="names of the parts to run, separated by commas")
    parser.add_argument("--total", type=float, default=TOTAL, help="time limit of the whole check in seconds")
    ours = parser.parse_args()
    try:
        return pack(ours) if ours.pack or ours.check_pack else check(ours)
    except Stopped as stopped:  # also while something was tidied up
        print(f"gpu_check: stopped by {stopped}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
