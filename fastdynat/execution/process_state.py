"""Contexts that restore the process's global state: generators, determinism, threads, warnings."""

import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from fastdynat.execution.float32 import float32_flags, put_float32_flags

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Restore, however the block ends, the generators of Python, NumPy and torch (CPU, CUDA), the
    determinism flags of torch and cuDNN, TF32 and float32 precision, the number of threads, cuBLAS' workspace
    variable and the warning filters.

    Also a decorator.
    """
    put_back: list[Callable[[], Any]] = [
        _generators(),
        _torch_flags(),
        partial(put_float32_flags, float32_flags()),
        _cublas(),
    ]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for restore in put_back:
            restore()


def keeping_process_state(
    make: Callable[Parameters, AbstractContextManager[Value]],
) -> Callable[Parameters, AbstractContextManager[Value]]:
    """Return `make` with its context inside `process_state_kept`."""

    @wraps(make)
    @contextmanager
    def kept(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Iterator[Value]:
        with process_state_kept(), make(*args, **kwargs) as value:
            yield value

    return kept


def _generators() -> Callable[[], None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Reading the states of CUDA's generators would initialise CUDA.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():
            # Their initial state: the seed of the CPU's generator.
            torch.cuda.manual_seed_all(torch.initial_seed())

    return restore


def _torch_flags() -> Callable[[], None]:
    cudnn, names = torch.backends.cudnn, ("enabled", "benchmark", "deterministic")
    flags: list[tuple[Callable[[], Any], Callable[[Any], Any]]]
    flags = [(partial(getattr, cudnn, name), partial(setattr, cudnn, name)) for name in names]
    flags += [
        (torch.get_num_threads, torch.set_num_threads),
        (_determinism, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    ]
    before = [(read, write, read()) for read, write in flags]

    def restore() -> None:
        for read, write, value in before:
            if read() != value:
                write(value)

    return restore


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _cublas() -> Callable[[], None]:
    before = os.environ.get(CUBLAS)

    def restore() -> None:
        if before is None:
            os.environ.pop(CUBLAS, None)
        else:
            os.environ[CUBLAS] = before

    return restore
