"""A context without compiled code and captured graphs, for input shapes that do not repay making them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_aside: ContextVar[bool] = ContextVar("aside", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it what `compile_whole` and `GraphedCall` wrap runs as it is: nothing is compiled, captured or
    replayed.
    """
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def is_uncompiled() -> bool:
    """Whether the caller is within `uncompiled`."""
    return _aside.get()
