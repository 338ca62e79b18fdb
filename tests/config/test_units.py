"""The unit rule of radii and step sizes."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdynat.commands.main import main
from fastdynat.config.attack_config import AttackConfig
from fastdynat.config.value_ranges import size_notices
from fastdynat.errors import UserError
from fastdynat.recipes import read_recipe, recipe_names
from fastdynat.units import check_step_width, describe_size, parse_number, parse_size


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


@pytest.mark.parametrize(
    ("step", "eps", "found"),
    [
        ("1", "8", "refused"),
        ("0.5", 8.0, "refused"),
        (0.5, "16", "refused"),
        ("20", "8", "said"),  # both in levels
        ("1/2", "8", "said"),
        ("1", "8/255", "said"),
        ("0.02", "0.005", "said"),
        ("2/255", "1/255", None),  # the width of the ball
        ("0.03", "8", None),
        ("10", "8", None),
        ("auto", "8", None),
    ],
)
def test_steps_beyond_the_ball(step: float | str, eps: float | str, found: str | None) -> None:
    step_size = 1.0 if step == "auto" else parse_size(step, "step_size").value
    sizes = {"step_size": step_size, "radius": parse_size(eps, "eps").value}
    if found == "refused":
        told = f"but eps {float(eps):g} is read as {float(eps):g}/255: write {step}/255 for a step in 8-bit"
        with pytest.raises(UserError, match=told):
            check_step_width(step, eps, **sizes)
    else:
        assert (check_step_width(step, eps, **sizes) is not None) == (found == "said")


def test_every_size_in_8_bit_levels_is_said() -> None:
    attack = AttackConfig(eps=8, step_size="2/255", eval_eps=0.03, norms="linf,l2", norm_eps="8, 2")
    assert [text.split(" is read as ")[0] for text in size_notices(attack)] == ["eps 8", "norm_eps (linf) 8"]
    assert size_notices(AttackConfig(eps=8, step_size=2, norm="l2")) == []


def test_no_recipe_steps_beyond_its_ball() -> None:
    for name in recipe_names():
        values = read_recipe(name).values
        if "step_size" in values and values.get("norm", "linf") == "linf":
            step, eps = values["step_size"], values.get("eps", 0.031)
            sizes = {"step_size": parse_size(step, "step_size").value, "radius": parse_size(eps, "eps").value}
            assert check_step_width(step, eps, **sizes) is None, name


def test_mixed_units_are_refused_by_train_and_eval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], messages: list[str]
) -> None:
    run = tmp_path / "run"
    told = "--step-size 1 is a share of the pixel range, but eps 8 is read as 8/255: write 1/255 for a step"
    train = ["train", "--method", "madry", "--train-size", "32", "--val-size", "20", "--batch-size", "16"]
    train += ["--steps", "1", "--epochs", "1", "--run-dir", str(run), "--quiet"]
    assert main([*train, "--eps", "8", "--step-size", "1"]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not run.exists()
    assert main([*train, "--eps", "8/255", "--step-size", "0.5"]) == 0
    assert "step_size 0.5 (127.50/255) is more than twice eps 0.0313725 (8.00/255)" in messages
    assert main(["eval", str(run), "--eps", "8", "--step-size", "1"]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
