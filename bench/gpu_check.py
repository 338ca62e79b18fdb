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
import sys
import tempfile
from pathlib import Path

from gpu.archive import write_archive
from gpu.bare import Bare
from gpu.machine import PACK, ROOT
from gpu.parts import Check, Stopped, stop_at_signals
from gpu.plan import TINY, Plan, Sizes, chosen

TOTAL = 535.0  # seconds, of a call that may take 540
PREPARE = 30.0  # of these, before the parts


def check(ours: argparse.Namespace) -> int:
    out = Path(ours.folder or ROOT / "gpu-results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    stop_at_signals()
    device = os.environ.get("FASTDYNAT_GPU_CHECK_DEVICE", "cuda")
    with tempfile.TemporaryDirectory(prefix="fastdynat-gpu-check-") as temporary:
        work = Path(temporary) / "parts"
        work.mkdir()
        with Bare(device, Path(temporary)) as bare:
            plan = Plan(bare, TINY if device == "cpu" else Sizes(), work)
            try:
                chosen(plan.parts(), ours.only)
            except ValueError as error:
                print(f"gpu_check: error: {error}", file=sys.stderr)
                return 2
            return _check(plan, out, ours)


def _check(plan: Plan, out: Path, ours: argparse.Namespace) -> int:
    bare, work = plan.bare, plan.work
    bare.prepare(PREPARE)
    listed = chosen(plan.parts(), ours.only)
    run = Check("gpu_check", listed, total=ours.total, work=work, out=out, cwd=ROOT, env=bare.env)
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
