"""Build the optional extension fastdynat._C from csrc/; everything else is declared in pyproject.toml.

FASTDYNAT_EXT   unset: build it, and install without it when that fails; 1: a failure is fatal; 0: do not
build it.
FASTDYNAT_CUDA  unset: with the CUDA half where a complete toolkit is found; 1: require that half; 0: CPU half
only.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

# The oldest torch that has to load the binary. Code that needs more than its stable ABI does not compile.
TORCH_TARGET = (2, 11)
EXT = os.environ.get("FASTDYNAT_EXT", "")
CUDA = os.environ.get("FASTDYNAT_CUDA", "")


def cuda_home() -> str | None:
    """The toolkit folder: CUDA_HOME, or where nvcc itself says it is (a wrapper on PATH misleads torch's
    guess).
    """
    if "CUDA_HOME" in os.environ or (nvcc := shutil.which("nvcc")) is None:
        return os.environ.get("CUDA_HOME")
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else None


def with_cuda() -> bool:
    """Whether to build the CUDA half. Raises RuntimeError when it is required and cannot be built."""
    import torch

    home = cuda_home()
    why_not = None
    if home is None:
        why_not = "no nvcc on PATH and CUDA_HOME is not set"
    elif not Path(home, "include", "cuda_runtime.h").is_file():
        why_not = f"{home} has no include/cuda_runtime.h: set CUDA_HOME to the toolkit's own folder"
    elif torch.version.cuda is None:
        why_not = f"torch {torch.__version__} is built without CUDA"
    if why_not and CUDA == "1":
        raise RuntimeError(f"FASTDYNAT_CUDA=1, but {why_not}")
    if why_not or CUDA == "0":
        return False
    os.environ["CUDA_HOME"] = str(home)
    return True


def gpu_targets() -> list[str]:
    """nvcc's flags for GPUs from sm_80 on, where torch has nothing to go by: no TORCH_CUDA_ARCH_LIST and no
    visible GPU.
    """
    import torch

    if torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ:
        return []
    # All from one intermediate code, the costly part of the compilation: no kernel asks for what came after
    # compute_80.
    return [f"-gencode=arch=compute_80,code={code}" for code in ("sm_80", "sm_90", "compute_80")]


def extension() -> dict[str, Any]:
    """The arguments of setup() that build fastdynat._C. Raises without torch, or if FASTDYNAT_CUDA=1 is not
    met.
    """
    cuda = with_cuda()
    from torch.utils.cpp_extension import (  # reads CUDA_HOME when imported
        BuildExtension,
        CppExtension,
        CUDAExtension,
    )

    if shutil.which(compiler := os.environ.get("CXX", "c++").split()[0]) is None:
        raise OSError(f"no C++ compiler: {compiler} is not on PATH, and CXX names no other")

    class OptionalBuild(BuildExtension):
        """Build the extension, or say in one line why the package goes without it."""

        def run(self) -> None:
            try:
                super().run()
            except (Exception, SystemExit) as error:  # distutils, ninja and torch raise unrelated types
                skip(error)
                self.extensions = self.distribution.ext_modules = []

    major, minor = TORCH_TARGET
    flags = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
    flags += ["-DUSE_CUDA", "-DFASTDYNAT_WITH_CUDA"] if cuda else []
    # No contraction into FMA anywhere: elementwise operators give the same bits in every implementation.
    # errno and trapping, which nothing here looks at, would keep square roots and selections from being
    # vectorised.
    cxx = [*flags, "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    # Operators run as fast as with -O3, whose other passes take as long again; Python's own -g adds a third
    # to that.
    cxx += ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-g0"]
    targets = gpu_targets() if cuda else []
    kernels = (
        "sm_80, sm_90 and later GPUs"
        if targets
        else os.environ.get("TORCH_CUDA_ARCH_LIST", "the visible GPUs")
    )
    what = (
        f"CPU operators and CUDA kernels for {kernels}; FASTDYNAT_CUDA=0 leaves these out"
        if cuda
        else "CPU operators"
    )
    print(f"fastdynat: building {what}", file=sys.stderr)
    csrc = sorted(path.as_posix() for path in Path("csrc").rglob("*.*"))
    module = (CUDAExtension if cuda else CppExtension)(
        "fastdynat._C",
        [path for path in csrc if path.endswith(".cpp") or (cuda and path.endswith(".cu"))],
        depends=csrc,
        extra_compile_args={"cxx": cxx, "nvcc": [*flags, "-O3", "-fmad=false", *targets]},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def skip(error: BaseException) -> None:
    """Go on without the extension; raises `error` where FASTDYNAT_EXT=1 or FASTDYNAT_CUDA=1 asks for it."""
    if "1" in (EXT, CUDA):
        raise error
    reason = " ".join(str(error).split())[:300]
    print(
        f"fastdynat: installed without the C++ extension ({type(error).__name__}: {reason})", file=sys.stderr
    )


def arguments() -> dict[str, Any]:
    """The arguments of setup(), empty where the extension is not to be built."""
    if EXT == "0":
        return {}
    try:
        return extension()
    except (ImportError, OSError, RuntimeError) as error:
        skip(error)
        return {}


class FreshBuild(build_py):
    """Copy into an empty build folder: a used one still holds the modules that were deleted since, and ships
    them.
    """

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


given = arguments()
commands = {"build_py": FreshBuild} | given.pop("cmdclass", {})
setup(**given, cmdclass=commands)
