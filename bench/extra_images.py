"""Equal numbers of updates with and without extra images: metrics and test accuracies, as JSON.

    python bench/extra_images.py --data-dir FOLDER --json OUT.json --originals 5000 --extra 20000

FOLDER holds train/ and test/ with a folder of images per class. The first --originals training images, spread
evenly over the classes, are the data set of all runs; the --extra ones after them are extra data. A third run
has both as its data set, and as many updates: a mixture should come near it. What follows ``--`` are flags
of `fastdynat train`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdynat.runs import describe_environment, source_commit


def choose(folder: Path, begin: int, count: int) -> list[tuple[int, Path]]:
    """(class, file) of `count` training images, the same number of each class, after the first `begin`."""
    classes = sorted(path for path in (folder / "train").iterdir() if path.is_dir())
    first, each = begin // len(classes), count // len(classes)
    chosen = [
        (label, file)
        for label, path in enumerate(classes)
        for file in sorted(path.iterdir())[first : first + each]
    ]
    assert len(chosen) == count, f"{folder} has fewer than {begin + count} training images"
    return chosen


def link_folder(source: Path, chosen: list[tuple[int, Path]], target: Path) -> Path:
    """A folder of links to the `chosen` training images and to all test images."""
    shutil.rmtree(target, ignore_errors=True)
    for _, file in chosen:
        place = target / "train" / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / file.name).symlink_to(file.resolve())
    (target / "test").symlink_to((source / "test").resolve())
    return target


def write_npz(chosen: list[tuple[int, Path]], target: Path) -> Path:
    """The `chosen` images in the form of published generated data."""
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for _, file in chosen])
    np.savez(target, image=images, label=np.array([label for label, _ in chosen]))
    return target


def train(folder: Path, flags: list[str], test_images: int) -> dict[str, Any]:
    """A run and its accuracies on the test images."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    program = [sys.executable, "-m", "fastdynat"]
    subprocess.run([*program, "train", *flags, "--run-dir", str(folder)], check=True)
    seconds = time.perf_counter() - began
    results = folder.with_suffix(".json")
    attacks = ["--attacks", "clean,pgd20", "--num-images", str(test_images), "--json", str(results)]
    subprocess.run([*program, "eval", str(folder), *attacks, "--quiet"], check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "flags": flags,
        "seconds": round(seconds, 1),
        "metrics": rows,
        "test": json.loads(results.read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--originals", type=int, default=20_000)
    parser.add_argument("--extra", type=int, default=20_000)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--epoch-steps", type=int, required=True)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--work", type=Path, default=Path("extra-images"))
    parser.add_argument("flags", nargs="*", help="of fastdynat train, after --")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    originals, extra = (
        choose(given.data_dir, 0, given.originals),
        choose(given.data_dir, given.originals, given.extra),
    )
    small = link_folder(given.data_dir, originals, given.work / "data" / "originals")
    large = link_folder(given.data_dir, originals + extra, given.work / "data" / "all")
    npz = write_npz(extra, given.work / "extra.npz")
    steps = ["--data", "imagefolder", "--epoch-steps", str(given.epoch_steps), *given.flags]
    arms = {
        "originals": ["--data-dir", str(small)],
        "mixture": ["--data-dir", str(small), "--extra-data", str(npz), "--extra-share", str(given.share)],
        "all": ["--data-dir", str(large)],
    }
    runs = {}
    for name, data in arms.items():
        runs[name] = train(given.work / name, [*steps, *data], given.test_images)
        document = {
            "format": "fastdynat-extra-images/1",
            "images": {"originals": given.originals, "extra": given.extra, "share": given.share},
            "environment": describe_environment() | {"load_average": os.getloadavg()},
            "commit": source_commit(),
            "runs": runs,
        }
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
