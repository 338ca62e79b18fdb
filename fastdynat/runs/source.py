"""The code that is running: its commit, and digests of its files."""

import hashlib
import importlib.util
import os
import subprocess
from functools import cache
from pathlib import Path

import fastdynat

# Parts of the package that decide what an attack finds.
MEASURING = ("attacks", "attack_engine", "evaluation", "kernels", "models", "ops")


def source_commit() -> str:
    """The commit of this package's checkout, with "-dirty" if tracked files differ from it.

    Without git: FASTDYNAT_COMMIT, else "unknown".
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a virtual environment may lie inside a checkout
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (subprocess.CalledProcessError, FileNotFoundError):
        return os.environ.get("FASTDYNAT_COMMIT", "unknown")


def package_digest(*, parts: tuple[str, ...] = (), compiled: bool = False) -> str:
    """A digest of the Python files of this package, Triton kernels included.

    Args:
        parts: names of the sub-packages that count; empty for the whole package.
        compiled: include the file of fastdynat._C, which differs between machines that built it themselves.
    """
    digest, package = hashlib.sha256(), Path(fastdynat.__file__).parent
    files = {
        name: path
        for path in package.rglob("*.py")
        if not (name := str(path.relative_to(package))).startswith("kernels/")
    }
    kernels = _kernels()  # beside the package in a checkout, inside it where it was installed
    files |= {f"kernels/{path.relative_to(kernels)}": path for path in kernels.rglob("*.py")}
    for name, path in sorted(files.items()):
        if parts and name.partition("/")[0] not in parts:
            continue
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    extension = importlib.util.find_spec("fastdynat._C") if compiled else None
    if extension is not None and extension.origin is not None:
        digest.update(Path(extension.origin).read_bytes())
    return digest.hexdigest()[:16]


@cache
def code_version() -> str:
    """The version of this package with a digest of the code that decides what an attack finds."""
    return f"{fastdynat.__version__}+{package_digest(parts=MEASURING)}"


def _kernels() -> Path:
    """Folder of `fastdynat.kernels`."""
    found = importlib.util.find_spec("fastdynat.kernels")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
