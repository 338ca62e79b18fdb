"""The processor, the dtypes it has instructions for, and the versions of the software that runs on it."""

import functools
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastdynat import __version__

# Flags of /proc/cpuinfo that decide which kernels run; x86 and Arm.
FLAGS = (
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx_ne_convert",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "sve",
    "bf16",
    "svebf16",
    "asimdhp",
)
# Of the environment; each makes oneDNN or ATen take other instructions or threads than the processor would
# suggest, or glibc treat freed memory in another way.
VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY",
    "OMP_PROC_BIND",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)
QUESTIONS = {"bf16": "_is_mkldnn_bf16_supported", "fp16": "_is_mkldnn_fp16_supported"}
# oneDNN says that it supports bf16 on every processor with AVX-512; where none of these is there, it emulates
# it.
INSTRUCTIONS = {
    "bf16": {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "avx_ne_convert", "asimdhp"},
}
# Limits of oneDNN's instructions under which it emulates bf16.
WITHOUT_BF16 = ("AVX512_CORE", "AVX512_CORE_VNNI")


def half_types(device: torch.device) -> dict[str, str]:
    """For each of "bf16" and "fp16", why `device` has no instructions for it; "" where it has."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {
            "bf16": ""
            if major >= 8
            else f"bf16 has no tensor cores on this GPU (compute capability {major}.{minor})",
            "fp16": ""
            if major >= 7
            else f"fp16 has no tensor cores on this GPU (compute capability {major}.{minor})",
        }
    return {name: "" if _on_cpu(name) else f"{name} has no instructions on this CPU" for name in QUESTIONS}


def _on_cpu(name: str) -> bool:
    """True if oneDNN supports `name`, within the limits set by the environment.

    False on a CPU that is known to lack instructions for it.
    """
    _, flags = _cpu_info()
    if flags and not flags & INSTRUCTIONS[name]:
        return False
    if name == "bf16" and _most_instructions() in WITHOUT_BF16:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    try:
        return bool(getattr(torch.ops.mkldnn, QUESTIONS[name])())
    except (AttributeError, RuntimeError):  # a build of torch without the question
        return False


def _most_instructions() -> str:
    """The limit that the environment sets to oneDNN's instructions; "" without one."""
    names = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    return next((os.environ[name].upper() for name in names if name in os.environ), "")


def vector_bits() -> int:
    """Width of the vectors that oneDNN's float32 convolutions compute with on this CPU; 512 where that is not
    known.
    """
    _, flags = _cpu_info()
    narrow = _most_instructions() in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")
    return 256 if "avx2" in flags and (narrow or "avx512f" not in flags) else 512


def processor(device: torch.device) -> dict[str, Any]:
    """Everything that a timing on `device` depends on, as plain values that two equal machines agree in."""
    if device.type == "cuda":
        found: dict[str, Any] = {"model": torch.cuda.get_device_name(device), "flags": []}
    else:
        model, flags = _cpu_info()
        found = {
            "model": model,
            "flags": [flag for flag in FLAGS if flag in flags],
            "threads": torch.get_num_threads(),
        }
        found["environment"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        found["onednn"] = bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
    return found | {"torch": torch.__version__}


def versions(device: torch.device) -> dict[str, Any]:
    """Of the software that makes and runs kernels on `device`: fastdynat, torch, Triton, and on a GPU CUDA
    and its driver.
    """
    found: dict[str, Any] = {"fastdynat": __version__, "torch": torch.__version__, "triton": _triton()}
    if device.type == "cuda":
        found |= {
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "capability": list(torch.cuda.get_device_capability(device)),
        }
    return found


@functools.lru_cache
def _triton() -> str | None:
    with suppress(PackageNotFoundError):
        return version("triton")
    return None


@functools.lru_cache
def _driver(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The driver's own line with its version; empty on systems without the file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    except OSError:
        return ""


@functools.lru_cache
def _cpu_info(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """Model name and flags of the first core; on systems without the file what Python knows, and no flags."""
    lines: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part")
    model = (
        " ".join(lines[name] for name in names if name in lines)
        or f"{platform.machine()} {platform.processor()}".strip()
    )
    return model, set((lines.get("flags") or lines.get("Features") or "").split())
