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


def check_step_width(step: float | str, eps: float | str, *, step_size: float, radius: float) -> str | None:
    """A warning where an L-inf step is longer than the ball is wide; None where it is not.

    Args:
        step, eps: as they were given; "auto" for what was not.
        step_size, radius: what they mean, in [0, 1] pixel units.

    Raises:
        UserError: `eps` was read as 8-bit levels and `step` as a part of the pixel range, as in 8 and 1.
    """
    if step == "auto" or step_size <= 2 * radius:
        return None
    levels = 0.0 if eps == "auto" else parse_number(eps, "eps")
    if levels > 1 and "/" not in str(step) and parse_number(step, "step_size") <= 1:
        raise UserError(
            f"step_size {step_size:g} is a share of the pixel range, but eps {levels:g} is read as "
            f"{levels:g}/255: write {step_size:g}/255 for a step in 8-bit levels"
        )
    return f"step_size {describe_size(step_size)} is more than twice eps {describe_size(radius)}"


def describe_size(value: float, norm: str = "linf") -> str:
    """`value`, under L-inf with its 8-bit reading: ``0.0313725 (8.00/255)``."""
    return f"{value:.6g} ({value * 255:.2f}/255)" if norm == "linf" else f"{value:.6g}"
