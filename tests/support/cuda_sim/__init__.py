"""CUDA simulator: .cu files compiled as C++, each thread a fiber, every memory access watched.

`cuda_runtime.h` takes the place of the toolkit's header, `simulator.cpp` runs the blocks and lists what it
finds wrong. A test that has ``SIMULATED_CUDA`` from conftest among its backends runs with backend="cuda" on
CPU tensors:

    ON_CPU = ["eager", ..., SIMULATED_CUDA]

For its time the operators of namespace `fastdynat` have the simulated kernels as their CPU kernels, so that
autograd, torch.compile and torch.ops run them as well; backend "cpp" is refused, which they replace. Every
.cu file takes part, and so does every operator that fastdynat.ops registers.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from fastdynat.ops import _select

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
TORCH = Path(torch.__file__).parent
WATCH = "-fsanitize=thread,alignment,bounds"  # served by simulator.cpp, not by the sanitizers' libraries
FLAGS = [
    *(
        "-std=c++20",
        "-O1",
        "-g1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
    ),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}", f"-isystem{TORCH / 'include'}"),
]
SIMULATE = ["-xc++", "-DFASTDYNAT_SIMULATE", "-DFASTDYNAT_LIBRARY=fastdynat_sim", "-DFASTDYNAT_KEY=CPU"]


def compiler() -> str:
    """GCC, whose sanitizer calls are the ones that the simulator answers."""
    return shutil.which("g++") or os.environ.get("CXX", "c++")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}"
    return done.stdout


@cache
def fingerprint() -> str:
    """The dependencies of every object besides its own source and flags."""
    headers = sorted(path for folder in (CSRC, HERE) for path in folder.rglob("*.*h"))
    parts = [run(compiler(), "--version"), torch.__version__, *(path.read_text() for path in headers)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def build(
    folder: Path, name: str, objects: Sequence[tuple[Path, list[str]]], link: Sequence[str] = ()
) -> Path:
    """The shared library of `objects` (source, flags), in `folder`, which keeps what has not changed."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path, flags: list[str]) -> Path:
        key = "\0".join((fingerprint(), *FLAGS, *flags, source.name, source.read_text()))
        made = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.o"
        if not made.is_file():
            unfinished = made.with_suffix(f".{os.getpid()}.tmp")
            run(compiler(), *FLAGS, *flags, "-c", source, "-o", unfinished)
            unfinished.replace(made)
        return made

    # Another test process waits for what this one compiles.
    with (
        FileLock(folder / f"{name}.lock"),
        ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool,
    ):
        made = list(pool.map(lambda item: compile_one(*item), objects))
    library = (
        folder / f"{name}-{hashlib.sha256(' '.join(map(str, (*made, *link))).encode()).hexdigest()[:20]}.so"
    )
    if not library.is_file():
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        # Symbols stay inside: two such libraries in one process each have their own simulator.
        run(
            compiler(),
            "-shared",
            *made,
            *link,
            "-Wl,-Bsymbolic",
            f"-L{TORCH / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
            "-o",
            unfinished,
        )
        unfinished.replace(library)
    return library


def build_kernels(folder: Path, sanitize: Sequence[str] = (WATCH,)) -> Path:
    """The library with every kernel of csrc/cuda and a simulator."""
    kernels = [(path, [*SIMULATE, *sanitize]) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    # The simulator itself is not watched; AddressSanitizer it has to know, for its switches of stacks.
    own = [] if WATCH in sanitize else list(sanitize)
    return build(folder, "fastdynat_sim", [(HERE / "simulator.cpp", own), *kernels], own)


# Operators that have no CUDA kernel and no Triton kernel, on purpose: cuDNN has Winograd convolutions of its
# own.
CPU_ONLY = {"image_conv_grad", "winograd_conv3x3", "winograd_weights"}


def operators() -> list[str]:
    """The names of the operators that csrc implements for the CPU."""
    return sorted(_select.OPERATORS)  # not the dispatcher's, which keeps what a test has registered


def cuda_operators() -> list[str]:
    """Those that it implements for CUDA as well."""
    return [name for name in operators() if name not in CPU_ONLY]


@cache
def load(library: Path) -> torch.library.Library:
    """Load the kernels under ``fastdynat_sim``, with the schemas of ``fastdynat``."""
    definitions = torch.library.Library("fastdynat_sim", "DEF")
    for name in cuda_operators():
        schema = str(getattr(torch.ops.fastdynat, name).default._schema)
        definitions.define(schema.removeprefix("fastdynat::"))
    torch.ops.load_library(library)
    return definitions


def simulated(name: str) -> Any:
    """Operator `name` on the simulator, its outputs full of NaN until they are written."""
    operator = getattr(torch.ops.fastdynat_sim, name).default

    def call(*args: Any) -> Any:
        before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        # Fills what torch.empty returns. The public function would import Inductor.
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        try:
            return operator(*args)
        finally:
            torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])

    return call


@contextlib.contextmanager
def simulated_cuda(library: Path) -> Iterator[None]:
    """Run operators with backend="cuda" on CPU tensors for the body of a with statement."""
    load(library)
    real = _select.why_unavailable

    def why_not(name: str, device_type: str) -> str | None:
        if device_type == "cpu" and name in ("cuda", "cpp"):
            return None if name == "cuda" else "the simulated CUDA kernels are in its place"
        return real(name, device_type)

    overrides = torch.library.Library("fastdynat", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="(?s).*Overriding a previously registered kernel"
        )  # on purpose
        for name in cuda_operators():
            overrides.impl(name, simulated(name), "CPU", allow_override=True)
    _select.why_unavailable = why_not
    try:
        yield
    finally:
        _select.why_unavailable = real
        overrides._destroy()
