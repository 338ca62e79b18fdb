"""A context without compiled code and CUDA graphs, for input shapes too rare to be worth making them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_aside: ContextVar[bool] = ContextVar("aside", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which functions of `compile_whole` and `GraphedCall` run eagerly."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def is_uncompiled() -> bool:
    """True within `uncompiled`."""
    return _aside.get()
