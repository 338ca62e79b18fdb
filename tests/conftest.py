"""Test the installed package; without one, test this checkout."""

import importlib.util
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

if importlib.util.find_spec("fastdynat") is None:
    sys.path.insert(0, str(ROOT))
# Under nohup, or in the background of a script, these are ignored, and so they would be in what the tests
# start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # the workers of `pytest -n` share the cores, as do the processes that tests start
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read by @triton.jit, so set before fastdynat.kernels is imported


def available(what: str) -> bool:
    """True if this machine has `what`: ext, gpu, triton, nvcc, cxx, dali, chromium, or a module."""
    if what == "gpu":
        return torch.cuda.is_available()
    if what == "nvcc":
        return shutil.which("nvcc") is not None
    if what == "chromium":
        return shutil.which("chromium") is not None
    if what == "cxx":
        return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++"))
    if what == "dali":  # find_spec raises where the parent is missing
        return all(importlib.util.find_spec(name) is not None for name in ("nvidia", "nvidia.dali"))
    return importlib.util.find_spec("fastdynat._C" if what == "ext" else what) is not None


def needs(*what: str) -> pytest.MarkDecorator:
    """Skip where one of `what` is missing, but run (and fail) where FASTDYNAT_REQUIRE lists it.

    CI sets FASTDYNAT_REQUIRE=ext,triton so that it cannot pass by skipping.
    """
    required = os.environ.get("FASTDYNAT_REQUIRE", "").split(",")
    missing = [name for name in what if name not in required and not available(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not available here: {', '.join(missing)}")


# Backend "cuda" for CPU tensors, through the simulator: see cuda_sim.
SIMULATED_CUDA = pytest.param("cuda", id="cuda-simulated", marks=[needs("cxx"), pytest.mark.simulated])


def pytest_report_header() -> str:
    """The copy of the package under test: an editable install of another checkout is easy to miss."""
    from fastdynat import kernels, ops

    usable = [name for name, why_not in ops.available_backends().items() if why_not is None]
    return (
        f"fastdynat: {Path(ops.__file__).parents[1]}, kernels: {kernels.__path__[0]}, backends: "
        f"{', '.join(usable)}"
    )


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Timings taken beside other tests must not reach the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """The package's log messages of the test so far, from level INFO on."""
    from fastdynat.terminal.messages import MessageCollector

    with MessageCollector() as collector:
        yield collector.texts


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Within it, whatever makes the host wait for the GPU raises; the mode is put back, whatever happens.

    torch warns, before it sets the mode, that this is a prototype: as an error that would leave the mode set.
    """
    before = torch.cuda.get_sync_debug_mode()

    def turn(mode: int | str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(mode)

    turn("error")
    try:
        yield
    finally:
        turn(before)


def _float32() -> Any:
    from fastdynat.execution.float32 import float32_flags

    return float32_flags()


def _put_float32(flags: Any) -> None:
    from fastdynat.execution.float32 import put_float32_flags

    put_float32_flags(flags)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _recompile_limit() -> int:
    import torch._dynamo

    limit: int = torch._dynamo.config.recompile_limit
    return limit


def _put_recompile_limit(limit: int) -> None:
    torch._dynamo.config.recompile_limit = limit


# Process-wide state that a test may change: its getter, and its setter.
CUDNN: Any = torch.backends.cudnn
PROCESS_WIDE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "determinism": (
        _determinism,
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "cudnn.enabled": (lambda: CUDNN.enabled, lambda value: setattr(CUDNN, "enabled", value)),
    "cudnn.benchmark": (lambda: CUDNN.benchmark, lambda value: setattr(CUDNN, "benchmark", value)),
    "cudnn.deterministic": (
        lambda: CUDNN.deterministic,
        lambda value: setattr(CUDNN, "deterministic", value),
    ),
    "float32 precision": (_float32, _put_float32),
    # timm.optim sets it to a million when it is imported.
    "recompilations of torch.compile": (_recompile_limit, _put_recompile_limit),
    "working directory": (os.getcwd, os.chdir),
}
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "FASTDYNAT_KERNELS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
)


@contextmanager
def process_state_restored() -> Iterator[None]:
    """Restore process-wide state after the block, however it ends: tests must not depend on their order."""
    kept = dict(PROCESS_WIDE)
    if torch.cuda.is_initialized():
        kept["sync debug mode"] = (torch.cuda.get_sync_debug_mode, torch._C._cuda_set_sync_debug_mode)
    before = {name: read() for name, (read, _) in kept.items()}
    variables = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, (read, write) in kept.items():
            if read() != before[name]:
                write(before[name])
        for name, value in variables.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    with process_state_restored():
        yield


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build folder for C++: pytest's cache, so that the next session rebuilds only what has changed."""
    cache = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("compiled") if cache is None else cache.mkdir("compiled")


@pytest.fixture(autouse=True)
def _simulation(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("simulated") is None:
        yield
        return
    from support import cuda_sim

    with cuda_sim.simulated_cuda(cuda_sim.build_kernels(request.getfixturevalue("compiled"))):
        yield


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, Any]]:
    pools: dict[int, Any] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks(_pools: dict[int, Any]) -> Callable[[int], Any]:
    """``ranks(W)``: a world of W gloo processes, a `support.ranks.RankPool`; all tests share them."""
    from support.ranks import RankPool

    def pool(size: int) -> RankPool:
        if size not in _pools or _pools[size].closed:
            _pools[size] = RankPool(size)
        return _pools[size]

    return pool
