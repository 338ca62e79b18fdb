"""Preparing a bare machine: the environment of child processes, and what is used of the pack."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gpu.machine import (
    EXTENSION,
    PACK,
    ROOT,
    commit,
    graphics_card,
    look,
    missing,
    python_path,
    read_manifest,
    take_extension,
)
from gpu.parts import Part, finish

# Modules that the parts import and that a machine may lack.
WANTED = (
    "tyro",
    "docstring_parser",
    "typeguard",
    "msgspec",
    "yaml",
    "rich",
    "safetensors",
    "sklearn",
    "timm",
)
WANTED += ("torchattacks", "pyautoattack", "pytest", "pytest_benchmark", "hypothesis", "filelock")
NOTHING_STARTS = {
    "tyro",
    "docstring_parser",
    "typeguard",
    "msgspec",
    "yaml",
    "rich",
    "safetensors",
    "sklearn",
}
FEW = 2000  # images that a test of the script on a CPU can decode


def inductor_folder() -> Path:
    """Inductor's cache of all parts, kept between checks: TORCHINDUCTOR_CACHE_DIR, or one of this user."""
    own = Path(tempfile.gettempdir()) / f"fastdynat-inductor-{os.getuid()}"
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or own)


class Bare:
    """The machine, while a script runs on it.

    Attributes:
        env: of everything that is started.
        about: machine, versions and commit, for the results.
        words: what was found, for the user.
        missing: modules of WANTED that are nowhere.
        capability: of the GPU ("9.0"), "" without one.
    """

    def __init__(self, device: str, temporary: Path) -> None:
        self.device, self.temporary = device, temporary
        self.pack = Path(os.environ.get("FASTDYNAT_GPU_PACK", ROOT / PACK)).resolve()
        self.env = dict(os.environ) | {
            "PYTHONPATH": python_path(os.environ.get("PYTHONPATH")),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(inductor_folder()),
        }
        self.env["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        )
        self.about: dict[str, Any] = {}
        self.words: list[str] = []
        self.missing: list[str] = []
        self.capability = ""
        self._manifest: dict[str, Any] | None = None
        self._extension: dict[str, Any] | None = None
        self._known = False
        self._unpacking: subprocess.Popen[bytes] | None = None
        self.begin = time.monotonic()

    def __enter__(self) -> "Bare":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unpacking is not None:
            finish(self._unpacking, 0)

    def forget_choices(self) -> None:
        """Remove the choices of Inductor's autotuner from its cache; compiled kernels stay."""
        for path in Path(self.env["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
            path.unlink(missing_ok=True)

    def seconds(self) -> float:
        """Since this object was made."""
        return time.monotonic() - self.begin

    def prepare(self, limit: float) -> None:
        """Look at the machine and take from the pack what it lacks. `limit`: seconds that this should take; a
        machine that has just started may need twice as many.
        """
        try:
            self._manifest = read_manifest(self.pack)
        except ValueError as error:
            self.words.append(f"no pack: {error}")
        self._unpack_data()
        self._take_packages()
        found = look(self.env, 2 * limit)
        took, word = False, ""
        if self._manifest is not None:
            took, word = take_extension(self.pack, self._manifest, found, cuda=self.device != "cpu")
            self.words.append(word)
        again = look(self.env, limit) if took else found
        if "torch_error" not in again:  # torch was seen before: a slow moment hides nothing of that
            found = again
        self._known = "torch_error" not in again
        self._extension = found.get("extension")
        if error := found.get("torch_error"):
            self.words.append(f"torch: {error}")
        gpu = found.get("gpu")
        if gpu is None and self.device != "cpu":
            self.words.append("torch sees no GPU here: the parts that need one will fail")
        self.capability = "" if gpu is None else gpu["capability"]
        self._describe(found, gpu)

    def _take_packages(self) -> None:
        """Put those of the pack's packages that this Python lacks behind what is on the path."""
        entries = [] if self._manifest is None else self._manifest["packages"]
        python, ours = (
            (self._manifest or {}).get("python"),
            f"{sys.version_info.major}.{sys.version_info.minor}",
        )
        lacking = set(
            missing(
                self.env, list(dict.fromkeys([*WANTED, *(name for e in entries for name in e["imports"])]))
            )
        )
        usable = []
        for entry in entries:
            if entry["imports"] and not lacking.intersection(entry["imports"]):
                continue
            if entry["native"] and python != ours:
                self.words.append(
                    f"{entry['name']} was packed for Python {python} and is compiled; "
                    f"this is {ours}: pack again"
                )
                continue
            usable.append(entry)
        folders = [self.pack / "packages" / entry["folder"] for entry in usable]
        self.env["PYTHONPATH"] = python_path(os.environ.get("PYTHONPATH"), folders)
        if usable:
            self.words.append(f"from {self.pack.name}: {', '.join(entry['name'] for entry in usable)}")
        self.missing = missing(self.env, WANTED)
        if (fatal := sorted(NOTHING_STARTS & set(self.missing))) != []:
            self.words.append(
                f"missing: {', '.join(fatal)}: fastdynat does not start; "
                "bench/gpu_check.sh --pack takes them along"
            )
        elif self.missing:
            self.words.append(f"missing: {', '.join(self.missing)}: parts that need them are skipped")

    def _describe(self, found: dict[str, Any], gpu: dict[str, Any] | None) -> None:
        torch = found["versions"].get("torch")
        self.env["FASTDYNAT_COMMIT"] = commit(self._manifest)
        name = "CPU only" if gpu is None else gpu["name"]
        self.about = {
            "commit": self.env["FASTDYNAT_COMMIT"],
            "device": f"{name} ({self.device} asked for), {os.cpu_count()} cores",
            "card": graphics_card() if self.device != "cpu" else "not asked",
            "software": f"Python {found.get('python')}, torch {torch}, "
            f"triton {found['versions'].get('triton')}",
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": found,
        }

    def why_no_build(self) -> str:
        """The reason why the extension is not built here; "" where it is."""
        if self._extension is not None and (self._extension["with_cuda"] or self.device == "cpu"):
            return f"a built {EXTENSION} loads"
        if not self._known and (ROOT / "fastdynat" / EXTENSION).is_file():
            return f"a built {EXTENSION} is there"
        if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
            return "no C++ compiler: eager and Triton operators only"
        if self.device != "cpu" and shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
            return "no nvcc: no CUDA operators"
        return ""

    def build_part(self, seconds: float) -> Part:
        """Build the extension where none loads; half a minute is enough on many processors."""
        env = {
            "FASTDYNAT_EXT": "1",
            "FASTDYNAT_CUDA": "0" if self.device == "cpu" else "1",
            "MAX_JOBS": str(os.cpu_count() or 1),
        }
        env |= {"TORCH_CUDA_ARCH_LIST": self.capability} if self.capability else {}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return Part(name="build", seconds=seconds, command=command, env=env, why_not=self.why_no_build())

    def why_no_calls(self) -> str:
        """The reason why the extension's operators cannot be called yet; a build may still provide them."""
        return (
            ""
            if self._extension is not None or not self._known or not self.why_no_build()
            else "no fastdynat._C"
        )

    def lacks(self, module: str) -> str:
        """A reason to leave out what imports `module`, "" where it is there."""
        return f"no {module} here" if module in self.missing else ""

    def gpu_tests(self) -> list[str]:
        """The files of tests that speak of a GPU; pytest's -m chooses in them."""
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        return [
            str(path.relative_to(ROOT))
            for path in files
            if re.search(r"\bgpu\b|ON_GPU", path.read_text(), re.IGNORECASE)
        ]

    def _unpack_data(self) -> None:
        named = os.environ.get("FASTDYNAT_CIFAR10_JPEG")
        packed = None if self._manifest is None else self._manifest["data"]
        if packed is None or (packed["images"]["train"] > FEW if self.device == "cpu" else named):
            return
        command = [
            sys.executable,
            "-m",
            "gpu.unpack",
            str(self.pack / packed["file"]),
            str(self.temporary / "cifar10-jpeg"),
        ]
        self._unpacking = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, cwd=ROOT / "bench", start_new_session=True
        )

    def data(self) -> Path | None:
        """CIFAR-10 as an image folder, where there is any: what the user names, else the pack's, which is
        waited for. In a test on a CPU only that of a small pack: even looking at 60,000 files takes too
        long.
        """
        if (named := os.environ.get("FASTDYNAT_CIFAR10_JPEG")) and self.device != "cpu":
            return Path(named).resolve()
        if self._unpacking is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            self._unpacking.wait(20)
        folder = self.temporary / "cifar10-jpeg"
        return folder if folder.is_dir() else None

    def data_flags(self, model: str) -> list[str]:
        """Flags of a training: on CIFAR-10 where it is at hand, else on the embedded digits."""
        folder = self.data()
        if folder is None:
            return []
        return [
            "--data",
            "imagefolder",
            "--data-dir",
            str(folder),
            "--model",
            model,
            "--guide",
            model,
            "--eps",
            "8/255",
        ]
