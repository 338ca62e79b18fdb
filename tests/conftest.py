"""Test the installed package; without one, test this checkout."""

import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

if importlib.util.find_spec("fastdynat") is None:
    sys.path.insert(0, str(ROOT))
# Under nohup, or in the background of a script, these are ignored, and so they would be in what the tests start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers of `pytest -n` share the cores, as do the processes that tests start
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by @triton.jit, so set before fastdynat.kernels is imported


def available(what: str) -> bool:
    """Whether this machine has `what`: ext, gpu, triton, nvcc, cxx, dali, chromium, or an importable module."""
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
    """Which copy of the package is under test: an editable install of another checkout is easy to miss."""
    from fastdynat import kernels, ops

    usable = [name for name, why_not in ops.available_backends().items() if why_not is None]
    return f"fastdynat: {Path(ops.__file__).parents[1]}, kernels: {kernels.__path__[0]}, backends: {', '.join(usable)}"


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured under tests, beside other tests, is not for the user's own runs."""
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


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where tests compile C++: pytest's cache, so that the next session finds what has not changed."""
    cache = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("compiled") if cache is None else cache.mkdir("compiled")


@pytest.fixture(autouse=True)
def _simulation(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("simulated") is None:
        yield
        return
    import cuda_sim

    with cuda_sim.simulated_cuda(cuda_sim.build_kernels(request.getfixturevalue("compiled"))):
        yield
