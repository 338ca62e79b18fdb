"""Base class of methods' options, and checks of their numbers."""

import math
from dataclasses import dataclass
from typing import Any

from fastdynat.errors import UserError

# Bound of every weight, temperature and exponent of a loss; a larger one is a typing error.
MOST = 1e9


@dataclass(frozen=True)
class MethodOptions:
    """Base of a method's options, a frozen dataclass. A method without options needs none."""

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""

    def idle(self) -> dict[str, str]:
        """Options without effect next to the values of the others, each with what it would need."""
        return {}


def check_numbers(options: Any, *names: str, least: float = 0.0, most: float = math.inf) -> None:
    """Raise UserError unless the options called `names` are finite and in [least, most]."""
    limits = (
        f"in [{least:g}, {most:g}]"
        if most < math.inf
        else f">= {least:g}"
        if least > -math.inf
        else "a finite number"
    )
    for name in names:
        value = getattr(options, name)
        if not max(least, -MOST) <= value <= min(most, MOST):  # written so that NaN fails too
            raise UserError(f"{name} must be {limits}{_at_most(value)}, got {value:g}")


def check_given(options: Any, *names: str, least: float = 0.0, most: float = math.inf) -> None:
    """`check_numbers` for those of the options called `names` that are not None."""
    check_numbers(
        options, *(name for name in names if getattr(options, name) is not None), least=least, most=most
    )


def check_positive(options: Any, *names: str) -> None:
    """Raise UserError unless the options called `names` are finite and above 0."""
    for name in names:
        value = getattr(options, name)
        if not 0 < value <= MOST:
            raise UserError(f"{name} must be above 0{_at_most(value)}, got {value:g}")


def _at_most(value: float) -> str:
    return f" and at most {MOST:g}" if MOST < abs(value) < math.inf else ""


def check_options(options: Any) -> None:
    """Raise UserError for options that their own `check`, if they have one, refuses."""
    if isinstance(options, MethodOptions):
        options.check()
