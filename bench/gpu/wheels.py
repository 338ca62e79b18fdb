"""The packages of a pack: wheels for the target machine's Python, each unpacked into its own folder."""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from gpu.machine import file_digest

# Distributions: with what each is for. Without the needed ones nothing starts.
NEEDED = {"tyro": "command line", "msgspec": "stored documents"}
WANTED = {
    "torchattacks": "the peer in bench's tables",
    "pyautoattack": "the peer of bench/autoattack.py",
    "pytest-benchmark": "timings of the operators",
    "hypothesis": "tests that draw their inputs",
    "filelock": "tests that compile in common",
}
# What the bare machine has: never taken along, so that its own builds are used.
THERE = {
    *(
        "torch",
        "torchvision",
        "triton",
        "numpy",
        "scipy",
        "scikit-learn",
        "timm",
        "rich",
        "safetensors",
        "pyyaml",
        "pytest",
    ),
    *(
        "typing-extensions",
        "tqdm",
        "requests",
        "setuptools",
        "packaging",
        "pillow",
        "sympy",
        "jinja2",
        "networkx",
        "fsspec",
    ),
}
TOO_LARGE = "nvidia-dali-cuda130 (over 100 MiB): its loader is not checked; images decode with torchvision"
PRUNED = {"pyautoattack": ("pyautoattack/examples/",)}  # 44 MB of weights for its demonstrations
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 17, 12, 5)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def fetch_packages(folder: Path, python: str) -> list[dict[str, Any]]:
    """Download and unpack wheels for `python` on Linux with their dependencies, each into its own folder."""
    asked, found, entries = [*NEEDED, *WANTED], set(), []
    with tempfile.TemporaryDirectory() as temporary:
        while asked:
            name = canonical(asked.pop(0))
            if name in found or name in THERE:
                continue
            found.add(name)
            wheel = download(name, python, Path(temporary) / name)
            if wheel is None:
                continue
            entry = _unpack(name, wheel, folder)
            entries.append(entry)
            asked += requirements(folder / entry["folder"], python)
    return sorted(entries, key=lambda entry: entry["name"])


def download(name: str, python: str, folder: Path) -> Path | None:
    """The wheel of the installed version, else of the newest; None (and pip's message) if there is none."""
    try:
        pinned = f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        pinned = name
    abi = "cp" + python.replace(".", "")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [
        "--python-version",
        python,
        "--implementation",
        "cp",
        *(f"--abi={a}" for a in (abi, "abi3", "none")),
    ]
    command += [*(f"--platform={p}" for p in PLATFORMS), "--dest", str(folder)]
    for asked in dict.fromkeys([pinned, name]):
        done = subprocess.run([*command, asked], capture_output=True, text=True)
        if done.returncode == 0:
            return next(folder.glob("*.whl"))
    print(f"{name}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}", file=sys.stderr)
    return None


def _unpack(name: str, wheel: Path, folder: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        version = wheel.name.split("-")[1]
        target = folder / f"{name}-{version}"
        members = [
            m
            for m in archive.namelist()
            if not m.startswith(PRUNED.get(name, ("\0",))) and not m.endswith(".pyi")
        ]
        if any(Path(m).is_absolute() or ".." in Path(m).parts for m in members):
            raise ValueError(f"{wheel.name} has members outside its own folder")
        archive.extractall(target, members)
    tops = {
        path.name.partition(".")[0]
        for path in target.iterdir()
        if not path.name.endswith((".dist-info", ".data"))
    }
    native = any(target.rglob("*.so"))
    return {
        "name": name,
        "version": version,
        "folder": target.name,
        "imports": sorted(top for top in tops if top.isidentifier()),
        "native": native,
        "wheel": wheel.name,
        "files": {
            p.relative_to(target).as_posix(): file_digest(p) for p in sorted(target.rglob("*")) if p.is_file()
        },
        "for": NEEDED.get(name) or WANTED.get(name) or "required by another",
    }


def requirements(package: Path, python: str) -> list[str]:
    """The distributions that an unpacked one requires under `python` on Linux, extras aside."""
    from packaging.requirements import Requirement

    here = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "extra": "",
    }
    here |= {
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_machine": "x86_64",
    }
    metadata = next(package.glob("*.dist-info/METADATA")).read_text(errors="replace")
    found = []
    for line in metadata.partition("\n\n")[0].splitlines():
        if line.startswith("Requires-Dist:"):
            required = Requirement(line.partition(":")[2].strip())
            if required.marker is None or required.marker.evaluate(here):
                found.append(canonical(required.name))
    return found
