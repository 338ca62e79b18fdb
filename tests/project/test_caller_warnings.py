"""Warnings name the user's line, through context managers and torch's decorators."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastdynat import caller_warnings
from fastdynat.caller_warnings import warn_caller

PACKAGED = """
@contextmanager
def opened():
    warn_caller("inside")
    yield

@torch.no_grad()
def work():
    with opened():
        pass
"""


def test_the_innermost_line_outside_of_the_package_is_named() -> None:
    names = {"contextmanager": contextmanager, "warn_caller": warn_caller, "torch": torch}
    exec(compile(PACKAGED, caller_warnings.__file__, "exec"), names)

    @contextmanager
    def own() -> Iterator[None]:
        names["work"]()  # type: ignore[operator]
        yield

    with pytest.warns(UserWarning, match="inside") as caught, own():
        pass
    (found,) = caught
    assert found.filename == __file__
    assert found.lineno == own.__wrapped__.__code__.co_firstlineno + 2  # type: ignore[attr-defined]
