"""The methods by name: found in their folder, registered by a decorator or by hand, refused with a reason."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import fastdynat.methods
from fastdynat.errors import UserError
from fastdynat.methods import (
    METHODS,
    Method,
    MethodOptions,
    method_class,
    method_name,
    options_type,
    register_method,
)
from fastdynat.methods.base import check_method
from fastdynat.methods.madry import Madry

FOLDER = Path(fastdynat.methods.__file__).parent


def test_every_file_that_registers_a_class_is_a_method() -> None:
    files = {path.stem for path in FOLDER.glob("*.py") if "\n@register_method(" in path.read_text()}
    assert len(files) > 20
    assert set(METHODS) == files
    assert len(METHODS) == len(files)


def test_names_in_any_case_and_unknown_ones() -> None:
    assert method_name("TRADES") == "trades"
    assert method_class("Trades") is METHODS["trades"]
    with pytest.raises(UserError, match="did you mean 'trades'"):
        method_name("trade")
    for name in ("base", "registry", "../trades", "", "a.b"):
        assert name not in METHODS
        with pytest.raises(KeyError):
            METHODS[name]


def test_classes_and_options_are_names_of_the_package() -> None:
    assert fastdynat.methods.Trades is METHODS["trades"]
    assert fastdynat.methods.TradesOptions is options_type("trades")
    assert {"Trades", "TradesOptions", "METHODS", "register_method"} <= set(dir(fastdynat.methods))
    with pytest.raises(AttributeError, match="no attribute 'Tradse'"):
        fastdynat.methods.Tradse  # noqa: B018


@dataclass(frozen=True, kw_only=True)
class SqueezeOptions(MethodOptions):
    """Options of nothing."""

    squeeze: float = 0.5
    """A number."""


@dataclass
class LooseOptions:
    """Options that can be changed."""


def test_a_method_of_ones_own_is_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Squeeze(Madry):
        name = "squeeze"
        options_type = SqueezeOptions

    monkeypatch.setitem(METHODS, "squeeze", Squeeze)
    assert method_class("squeeze") is Squeeze
    assert options_type("squeeze") is SqueezeOptions
    monkeypatch.delitem(METHODS, "squeeze")
    assert "squeeze" not in METHODS


def test_a_method_of_ones_own_is_registered() -> None:
    try:

        @register_method("squeeze")
        class Squeeze(Madry):
            options_type = SqueezeOptions

        assert Squeeze.name == "squeeze"
        assert METHODS["squeeze"] is Squeeze
        assert "squeeze" in list(METHODS)
    finally:
        del METHODS["squeeze"]


def test_a_method_without_options_has_no_flags() -> None:
    bare: Any = type("Bare", (Method,), {"inner": Madry.inner, "outer": Madry.outer})
    check_method(bare)
    assert bare.options_type is MethodOptions
    assert not fields(MethodOptions)


def undecorated() -> object:
    options = type("Undecorated", (SqueezeOptions,), {"__annotations__": {"weight": float}, "weight": 1.0})
    return type("Plain", (Madry,), {"options_type": options})


def loose() -> object:
    return type("Loose", (Madry,), {"options_type": LooseOptions})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: int, "int is not a subclass of fastdynat.methods.Method"),
        (lambda: 3, "3 is not a subclass"),
        (loose, "Loose.options_type must be a frozen dataclass, got LooseOptions: decorate it"),
        (undecorated, "Plain.options_type must be a frozen dataclass, got Undecorated: decorate it"),
    ],
)
def test_what_is_no_method_is_refused(make: object, says: str) -> None:
    for add in (register_method("squeeze"), lambda method: METHODS.__setitem__("squeeze", method)):
        with pytest.raises(UserError, match=says):
            add(make())  # type: ignore[operator]
    assert "squeeze" not in METHODS


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"method trades is fastdynat\.methods\.trades\.Trades: choose another"
    ):
        register_method("trades")(type("Mine", (Madry,), {"options_type": SqueezeOptions}))
    assert METHODS["trades"].__name__ == "Trades"
