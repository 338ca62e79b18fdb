"""Units of perturbation sizes: everything inside the package is in [0, 1] pixel units.

Published scripts write the same radius as ``8/255``, ``0.031`` or ``8``; a silent mix-up of the three is the
most common reason for robust accuracies that do not compare. So one parser reads them all, and what it read
is printed and stored.
"""

from dataclasses import dataclass

from fastdynat.errors import UserError


@dataclass(frozen=True)
class Size:
    """A resolved radius or step size."""

    value: float  # [0, 1] pixel units
    notice: str | None = None  # what was assumed, to be said aloud; None if nothing was


def parse_number(text: float | str, what: str) -> float:
    """Read ``0.031``, ``"0.031"`` or ``"8/255"``.

    Raises:
        UserError: not a finite number or a fraction of two.
    """
    try:
        if isinstance(text, str):
            numerator, slash, denominator = text.partition("/")
            value = float(numerator) / float(denominator) if slash else float(numerator)
        else:
            value = float(text)
    except (ValueError, ZeroDivisionError, TypeError):
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"{what} must be a number or a fraction such as 8/255, got {text!r}")
    return value


def parse_size(text: float | str, what: str, *, norm: str = "linf", limit: float = 1.0) -> Size:
    """Read a radius or step size by the unit rule.

    Under L-inf a value above 1 is in 8-bit levels: ``8`` is 8/255. 1 is the whole pixel range, with a notice,
    as it may be meant as one level. Under other norms every value is taken as it stands, because radii above
    1 are ordinary there.

    Args:
        text: ``8/255``, ``0.031`` or ``8``.
        what: the option's name, for messages.
        norm: "linf" or another.
        limit: the largest sensible value: the image space's diameter, 1 under L-inf.

    Raises:
        UserError: not a number, not positive, or above `limit` after the rule.
    """
    value, notice = parse_number(text, what), None
    if norm == "linf" and value > 1:
        levels = f"{value:g}/255 = {value / 255:.6g}"
        notice = f"{what} {text} is read as {levels} (8-bit levels, because it is above 1)"
        value /= 255
    elif norm == "linf" and value == 1:
        notice = f"{what} {text} is read as 1, the whole pixel range; write 1/255 for one 8-bit level"
    if value <= 0:
        raise UserError(f"{what} must be above 0 (pixel range [0, 1]), got {text}")
    if value > limit:
        got = str(text) if str(text) == f"{value:g}" else f"{text} = {value:g}"
        remedy = "write it as 8/255" if norm == "linf" else f"write {text} 8-bit levels as {text}/255"
        raise UserError(f"{what} must be at most {limit:g} in [0, 1] pixel units, got {got}; {remedy}")
    return Size(value, notice)


def describe_size(value: float, norm: str = "linf") -> str:
    """`value`, under L-inf with its 8-bit reading: ``0.0313725 (8.00/255)``."""
    return f"{value:.6g} ({value * 255:.2f}/255)" if norm == "linf" else f"{value:.6g}"
