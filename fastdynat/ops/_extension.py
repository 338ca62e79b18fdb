"""The compiled extension fastdynat._C, which may be absent; one that is present must load."""

import importlib
import importlib.util
from pathlib import Path

import torch

SIGNATURES = 5  # csrc/module.cpp has the same number; raised with every change to an operator's arguments
REBUILD = "pip install -e . --no-build-isolation"


def _load() -> tuple[bool, bool]:
    """Load fastdynat._C if it is built. Returns (loaded, built with CUDA kernels)."""
    spec = importlib.util.find_spec("fastdynat._C")
    if spec is None:
        return False, False
    try:
        extension = importlib.import_module("fastdynat._C")
    except ImportError as error:
        raise ImportError(
            f"fastdynat._C is built ({spec.origin}) but does not load in torch {torch.__version__}: {error}. "
            f"Rebuild it ({REBUILD}) or delete the file to go without it."
        ) from error
    if getattr(extension, "SIGNATURES", 1) != SIGNATURES:
        raise ImportError(
            f"fastdynat._C ({spec.origin}) was built from another version of csrc/, whose operators take "
            f"other arguments. Rebuild it ({REBUILD}) or delete the file to go without it."
        )
    return True, bool(extension.WITH_CUDA)


LOADED, WITH_CUDA = _load()


def files() -> tuple[Path, ...]:
    """The extension's file, or nothing without one. Verdicts depend on it."""
    spec = importlib.util.find_spec("fastdynat._C")
    return () if spec is None or spec.origin is None else (Path(spec.origin),)
