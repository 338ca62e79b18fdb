"""The machine that a script runs on: versions, commit, missing packages, the prebuilt extension, the data."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACK = "gpu-pack"  # in the checkout: what --pack made
MANIFEST = "manifest.json"
FORMAT = "fastdynat-gpu-pack/1"
EXTENSION = "_C.abi3.so"

# Run by the Python that runs everything, in processes of their own: nothing here imports torch or holds the
# GPU. The first one takes no time; the second imports torch, which may take half a minute on a machine that
# has just started.
FIND = """
import importlib.util, json, sys
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
print(json.dumps({"missing": [name for name in sys.argv[1:] if not found(name)]}))
"""
LOOK = """
import importlib, json, platform, sys
from importlib.metadata import PackageNotFoundError, version
def about(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
out = {"python": platform.python_version(), "executable": sys.executable}
names = ("torch", "torchvision", "triton", "numpy", "pytest", "timm")
out["versions"] = {name: about(name) for name in names}
try:
    import torch
    out["versions"]["torch"], out["cuda"] = torch.__version__, torch.version.cuda
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        out["gpu"] = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory,
                      "multiprocessors": p.multi_processor_count}
    sys.path.insert(0, ".")
    try:
        out["extension"] = {"with_cuda": bool(importlib.import_module("fastdynat._C").WITH_CUDA)}
    except Exception as error:
        out["extension_error"] = f"{type(error).__name__}: {str(error)[:200]}"
except Exception as error:
    out["torch_error"] = f"{type(error).__name__}: {str(error)[:200]}"
print(json.dumps(out))
"""


def python_path(caller: str | None, packages: Sequence[Path] = ()) -> str:
    """PYTHONPATH of all subprocesses: this checkout, the caller's path, and the pack's packages."""
    kept = [os.path.abspath(entry) for entry in (caller or "").split(os.pathsep) if entry]
    return os.pathsep.join(dict.fromkeys([str(ROOT), *kept, *map(str, packages)]))


def missing(env: Mapping[str, str], modules: Sequence[str]) -> list[str]:
    """Those of `modules` that the Python of `env` does not find."""
    return _run(FIND, env, 60, *modules)["missing"]


def look(env: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """Versions of Python, torch, GPU and fastdynat._C; `torch_error`: the reason why torch does not load."""
    try:
        return _run(LOOK, env, seconds)
    except subprocess.TimeoutExpired:
        return {"torch_error": f"importing it took longer than {seconds:.0f} s", "versions": {}}
    except (OSError, ValueError, IndexError) as error:
        return {"torch_error": f"{type(error).__name__}: {str(error)[:200]}", "versions": {}}


def _run(program: str, env: Mapping[str, str], seconds: float, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=dict(env), cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    return json.loads(done.stdout.splitlines()[-1])


def read_manifest(pack: Path) -> dict[str, Any] | None:
    """The manifest of what was taken along, None where there is none.

    Raises:
        ValueError: it is none of ours.
    """
    path = pack / MANIFEST
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a manifest of format {FORMAT}: make another with bench/gpu_check.sh --pack"
        )
    return manifest


def digest(*patterns: str, root: Path = ROOT) -> str:
    """sha256 over names and contents of the files that match `patterns`."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
        total.update(
            path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest()
        )
    return total.hexdigest()


def extension_sources() -> str:
    """Digest of the sources that fastdynat._C is built from."""
    return digest("csrc/**/*", "setup.py")


def tree() -> str:
    """Digest of the files that decide what a check measures."""
    return digest(
        "fastdynat/**/*.py",
        "kernels/**/*.py",
        "csrc/**/*",
        "bench/**/*.py",
        "bench/*.sh",
        "tests/**/*.py",
        "pyproject.toml",
    )


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit(manifest: Mapping[str, Any] | None) -> str:
    """The commit of this checkout, or without git of the manifest, marked where files have changed."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if git("rev-parse", "--show-toplevel") == str(ROOT.resolve()):
            return git("rev-parse", "HEAD") + (
                "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
            )
    except (subprocess.CalledProcessError, OSError):
        pass
    if not manifest:
        return "unknown"
    packed = str(manifest["commit"]).removesuffix("-dirty")
    same = manifest["tree"] == tree()
    return str(manifest["commit"]) if same else f"{packed}-dirty"


def take_extension(
    pack: Path, manifest: Mapping[str, Any], found: Mapping[str, Any], *, cuda: bool
) -> tuple[bool, str]:
    """Install the prebuilt extension if the checkout's is missing, does not load or lacks the CUDA half.

    Returns whether it was, and a word.
    """
    own, target = found.get("extension"), ROOT / "fastdynat" / EXTENSION
    if own is not None and (own["with_cuda"] or not cuda):
        return False, "the checkout's own fastdynat._C loads" + (
            ", with its CUDA half" if own["with_cuda"] else ""
        )
    if own is None and "extension_error" not in found and target.is_file():
        return False, "whether the checkout's own fastdynat._C loads is not known"
    why = (
        "lacks its CUDA half"
        if own is not None
        else f"does not load ({found.get('extension_error', 'there is none')})"
    )
    packed = manifest.get("extension")
    if packed is None or not (pack / EXTENSION).is_file():
        return False, f"fastdynat._C {why}, and no prebuilt one was packed"
    if packed["sources"] != extension_sources():
        return False, f"fastdynat._C {why}, and the prebuilt one is of other sources: pack again"
    temporary = target.with_name(target.name + ".new")
    shutil.copyfile(pack / EXTENSION, temporary)
    os.replace(temporary, target)
    return True, f"fastdynat._C {why}: the prebuilt one was taken"


def graphics_card() -> str:
    """Name, driver, clocks and temperature as nvidia-smi tells; its settings are left alone."""
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=15).stdout.strip()
            or "nvidia-smi says nothing"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no nvidia-smi: {error}"
