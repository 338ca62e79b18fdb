"""The pack for a bare machine: packages, CIFAR-10 as JPEG, the built extension and a manifest."""

import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.machine import (
    EXTENSION,
    FORMAT,
    MANIFEST,
    ROOT,
    commit,
    extension_sources,
    file_digest,
    read_manifest,
    tree,
)
from gpu.wheels import NEEDED, THERE, TOO_LARGE, WANTED, fetch_packages, requirements

LIMIT = 64 * 2**20  # of the pack and the checkout's own files together
ROOM = 2 * 2**20  # of that stays free: what travels is counted by others' rules
DATA = "cifar10-jpeg.tar.xz"


def find_data(named: Path | None) -> Path | None:
    """CIFAR-10 as JPEG: the user's folder, else the environment's, else the archive beside the checkout."""
    places = [os.environ.get("FASTDYNAT_CIFAR10_JPEG"), ROOT.parent / "shared" / "data" / DATA]
    found = (
        [named] if named is not None else [Path(place) for place in places if place and Path(place).exists()]
    )
    if named is not None and not named.exists():
        raise ValueError(f"{named} does not exist")
    return found[0] if found else None


def make_pack(folder: Path, *, python: str, data: Path | None, limit: int = LIMIT) -> None:
    """Fill `folder` for Python `python` ("3.12"), below `limit` bytes together with the checkout's own files.

    data: CIFAR-10 as JPEG: an archive or a folder with train/CLASS/* and test/CLASS/*.

    Raises:
        ValueError: the folder holds something else, the data are none, or this Python cannot load the built
            extension.
        OSError: something cannot be read or written.
    """
    if folder.exists() and any(folder.iterdir()) and read_manifest(folder) is None:
        raise ValueError(
            f"{folder} has files and no {MANIFEST}: it was not made by --pack; name another folder"
        )
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=folder.parent) as temporary:
        made = Path(temporary) / "pack"
        made.mkdir()
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "python": python,
            "commit": commit(None),
            "tree": tree(),
        }
        manifest["made"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        manifest["extension"] = _extension(made)  # before anything is downloaded
        manifest["packages"] = fetch_packages(made / "packages", python)
        room = limit - ROOM - checkout_bytes() - folder_bytes(made)
        manifest["data"] = None if data is None else _data(data, made / DATA, room)
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checkout_bytes() -> int:
    """Of the files that git tracks; they travel beside the pack."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True)
    names = [name for name in done.stdout.decode().split("\0") if name]
    return sum((ROOT / name).lstat().st_size for name in names if (ROOT / name).exists())


def _extension(made: Path) -> dict[str, Any] | None:
    """Copy this checkout's built extension; None where there is none.

    Raises:
        ValueError: this Python cannot load it, so that nobody knows what it holds.
    """
    source = ROOT / "fastdynat" / EXTENSION
    if not source.is_file():
        return None
    if (newer := sources_newer_than(source)) is not None:
        print(f"fastdynat._C is older than {newer}: build it again before packing; left out", file=sys.stderr)
        return None
    shutil.copyfile(source, made / EXTENSION)
    probe = "import torch, json, fastdynat._C as c; print(json.dumps([bool(c.WITH_CUDA), torch.__version__]))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(
            f"{sys.executable} cannot load fastdynat._C ({why}): pack with the Python that it was built for"
        )
    cuda, torch = json.loads(done.stdout)
    about = {"sha256": file_digest(source), "sources": extension_sources(), "with_cuda": cuda, "torch": torch}
    return about | {"architectures": architectures(source), "glibc": newest_glibc(source)}


def sources_newer_than(built: Path) -> str | None:
    """A source that was changed after `built`, by the files' times."""
    sources = [path for path in (*(ROOT / "csrc").rglob("*"), ROOT / "setup.py") if path.is_file()]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    return (
        newest.relative_to(ROOT).as_posix() if newest.stat().st_mtime > built.stat().st_mtime + 60 else None
    )


def architectures(binary: Path) -> list[str] | None:
    """The GPUs that `binary` holds machine code for; None where no cuobjdump is at hand."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        beside = importlib.util.find_spec("triton")
        tool = str(Path(beside.origin or "").parent / "backends/nvidia/bin/cuobjdump") if beside else ""
    if not Path(tool).is_file():
        return None
    done = subprocess.run([tool, "--list-elf", str(binary)], capture_output=True, text=True)
    return sorted(set(re.findall(r"\.(sm_\d+a?)\.", done.stdout)))


def newest_glibc(binary: Path) -> str | None:
    """The newest version of the C library that `binary` asks for."""
    found = {
        tuple(map(int, v.split(b".")))
        for v in re.findall(rb"GLIBC_(2\.\d+(?:\.\d+)?)\0", binary.read_bytes())
    }
    return ".".join(map(str, max(found))) if found else None


def _members(data: Path) -> Iterator[tuple[str, bytes]]:
    """(split/class/name, bytes) of every image of an archive or a folder."""
    pattern = re.compile(r"(?:^|/)((?:train|test)/[^/]+/[^/]+\.jpe?g)$", re.IGNORECASE)
    if data.is_dir():
        for path in sorted(data.rglob("*")):
            if (match := pattern.search(path.as_posix())) and path.is_file():
                yield match[1], path.read_bytes()
        return
    with tarfile.open(data) as archive:
        for member in archive:
            if member.isfile() and (match := pattern.search(member.name)):
                yield match[1], archive.extractfile(member).read()  # type: ignore[union-attr]


def _data(data: Path, target: Path, room: int) -> dict[str, Any]:
    """Store the images that fit into `room` bytes: all, or equally many of each class of either split."""
    classes: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for name, image in _members(data):
        classes[name.rpartition("/")[0]].append((name, image))
    if not classes:
        raise ValueError(f"{data} has no train/CLASS/*.jpg and test/CLASS/*.jpg")
    whole = {
        split: sum(len(i) for key, i in classes.items() if key.startswith(split))
        for split in ("train", "test")
    }
    about = {"file": target.name, "classes": len({key.partition("/")[2] for key in classes}), "of": whole}
    if data.is_file() and data.suffix == ".xz" and data.stat().st_size <= room:
        shutil.copyfile(data, target)
        return about | {"images": whole, "sha256": file_digest(target)}
    share = 1.0
    while True:
        chosen = {key: images[: max(1, round(share * len(images)))] for key, images in classes.items()}
        least = {split: _equal(chosen, split, share) for split in ("train", "test")}
        chosen = {key: images[: least[key.partition("/")[0]]] for key, images in chosen.items()}
        packed = _xz([pair for images in chosen.values() for pair in images])
        if len(packed) <= room:
            break
        if share < 0.01:
            raise ValueError(f"{room:,} bytes are left for the data, which is too little")
        share *= 0.95 * room / len(packed)
    target.write_bytes(packed)
    counts = {
        split: sum(len(i) for key, i in chosen.items() if key.startswith(split))
        for split in ("train", "test")
    }
    return about | {"images": counts, "sha256": file_digest(target)}


def _equal(chosen: dict[str, list[Any]], split: str, share: float) -> int:
    """Images per class: those of the smallest class of a subset; of the whole, every class keeps its own."""
    sizes = [len(images) for key, images in chosen.items() if key.startswith(split + "/")]
    return (max if share == 1.0 else min)(sizes, default=0)


def _xz(images: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with lzma.open(buffer, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, image in images:
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    return buffer.getvalue()


def check_pack(folder: Path, limit: int = LIMIT) -> list[str]:
    """The parts that a pack lacks, or that do not fit this checkout, in words; empty if it is complete."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder} has no {MANIFEST}"]
    have = {entry["name"]: entry for entry in manifest["packages"]}
    missing = [
        f"{name} ({what}), without which nothing can start"
        for name, what in NEEDED.items()
        if name not in have
    ]
    missing += [f"{name} ({what})" for name, what in WANTED.items() if name not in have and name not in THERE]
    for entry in have.values():
        package = folder / "packages" / entry["folder"]
        if broken := [n for n, digest in entry["files"].items() if not _is(package / n, digest)]:
            missing.append(f"{entry['name']}: {len(broken)} of its files, {broken[0]} among them")
            continue
        lacking = [r for r in requirements(package, manifest["python"]) if r not in have and r not in THERE]
        missing += [f"{r}, which {entry['name']} requires" for r in lacking]
    missing += _about_extension(folder, manifest) + _about_data(folder, manifest)
    if (size := folder_bytes(folder) + checkout_bytes()) > limit:
        missing.append(
            f"{size - limit:,} bytes of room: pack and checkout are {size:,} bytes, more than {limit:,}"
        )
    return missing


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _about_extension(folder: Path, manifest: dict[str, Any]) -> list[str]:
    packed = manifest["extension"]
    if packed is None:
        return ["the built fastdynat._C: python setup.py build_ext --inplace, where nvcc is, then pack again"]
    found = [] if _is(folder / EXTENSION, packed["sha256"]) else [f"{EXTENSION} as it was packed"]
    if packed["sources"] != extension_sources():
        found.append("fastdynat._C of this checkout's sources: the packed one is of others")
    if not packed["with_cuda"]:
        found.append("fastdynat._C with its CUDA half: the packed one has only operators for CPUs")
    elif packed["architectures"] is not None and "sm_90" not in packed["architectures"]:
        found.append(f"machine code for sm_90 in fastdynat._C, which has {packed['architectures']}")
    return found


def _about_data(folder: Path, manifest: dict[str, Any]) -> list[str]:
    packed = manifest["data"]
    if packed is None:
        return ["CIFAR-10 as JPEG: name it with --data; without it everything trains on the embedded digits"]
    return [] if _is(folder / packed["file"], packed["sha256"]) else [f"{packed['file']} as it was packed"]


def describe(folder: Path) -> str:
    """The pack as a table."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder}: no pack"
    lines = [f"{folder}: for Python {manifest['python']}, commit {manifest['commit']}"]
    for entry in manifest["packages"]:
        kind = "compiled" if entry["native"] else "pure Python"
        lines.append(f"  {entry['name']:<20} {entry['version']:<12} {kind:<12} {entry['for']}")
    if (extension := manifest["extension"]) is not None:
        lines.append(
            f"  {EXTENSION:<33} {extension['architectures']}, glibc >= {extension['glibc']}, torch "
            f"{extension['torch']}"
        )
    if (data := manifest["data"]) is not None:
        lines.append(f"  {data['file']:<33} {data['images']} of {data['of']} images")
    lines.append(f"  left out: {TOO_LARGE}")
    lines.append(
        f"  {folder_bytes(folder) / 2**20:.1f} MiB, and the checkout's own files "
        f"{checkout_bytes() / 2**20:.1f} MiB"
    )
    return "\n".join(lines)
