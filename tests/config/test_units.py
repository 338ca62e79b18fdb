"""The unit rule of radii and step sizes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdynat.errors import UserError
from fastdynat.units import describe_size, parse_number, parse_size


@pytest.mark.parametrize(
    ("text", "value", "said"),
    [
        ("8/255", 8 / 255, False),
        ("0.031", 0.031, False),
        (0.031, 0.031, False),
        ("8", 8 / 255, True),
        (8.0, 8 / 255, True),
        ("1", 1.0, True),
        ("1/255", 1 / 255, False),
    ],
)
def test_the_three_spellings(text: float | str, value: float, said: bool) -> None:
    size = parse_size(text, "eps")
    assert size.value == value
    assert (size.notice is not None) is said
    if size.notice:
        assert ("write 1/255" if value == 1 else "8/255") in size.notice


@pytest.mark.parametrize(
    "text", ["0", "-0.1", "-8/255", "256", "300", "2/1000/3", "abc", "", "nan", "inf", "8/0", "1e999"]
)
def test_bad_radii_are_named(text: str) -> None:
    with pytest.raises(UserError, match="eps must be") as error:
        parse_size(text, "eps")
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_l2_radii_are_taken_as_they_stand_up_to_the_diameter() -> None:
    assert parse_size("3", "eps", norm="l2", limit=math.sqrt(3072)).value == 3.0
    assert parse_size("128/255", "eps", norm="l2", limit=math.sqrt(3072)).value == 128 / 255
    with pytest.raises(UserError, match=r"got 128; write 128 8-bit levels as 128/255$"):
        parse_size("128", "eps", norm="l2", limit=math.sqrt(3072))


@given(st.floats(1e-6, 1.0, exclude_max=True))
def test_a_resolved_value_resolves_to_itself(value: float) -> None:
    assert parse_size(value, "eps") == parse_size(str(value), "eps") == type(parse_size(value, "eps"))(value)


def test_describe_shows_both_readings() -> None:
    assert describe_size(8 / 255) == "0.0313725 (8.00/255)"
    assert parse_number("1/4", "x") == 0.25
