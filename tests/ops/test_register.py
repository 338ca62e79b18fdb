"""Registration: schemas come from the eager forms, and the launchers in kernels/ take their arguments."""

import hashlib
import importlib
import inspect
import os

import pytest
import torch
from conftest import needs
from torch import Tensor

from fastdynat.ops import _extension
from fastdynat.ops._register import register_operator
from fastdynat.ops._select import OPERATORS

CPU_ONLY = ("image_conv_grad", "winograd_conv3x3", "winograd_weights")


def test_the_schema_is_that_of_the_eager_form() -> None:
    schema = str(torch.ops.fastdynat.pgd_step_linf.default._schema)
    assert schema == (
        "fastdynat::pgd_step_linf(Tensor x_adv, Tensor grad, Tensor x0, float step_size, float eps, "
        "float lo, float hi, ScalarType? low_dtype=None, bool count=False, Tensor? device_step_size=None, "
        "Tensor? device_eps=None) -> (Tensor, Tensor, Tensor)"
    )
    weights = torch.ops.fastdynat.winograd_weights.default._schema
    assert [argument.is_write for argument in weights.arguments] == [False, True, True]


def test_other_arguments_are_another_number_of_signatures() -> None:
    """A library of older arguments must be refused: the dispatcher would name numbers of arguments only."""
    schemas = [str(getattr(torch.ops.fastdynat, name).default._schema) for name in sorted(OPERATORS)]
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16]
    assert (_extension.SIGNATURES, digest) == (5, "e8f8092776571b3f"), (
        "the arguments of an operator have changed: add 1 to SIGNATURES in fastdynat/ops/_extension.py and "
        "csrc/module.cpp, then put number and digest here"
    )


@needs("ext")
def test_an_extension_with_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastdynat._C as extension

    assert _extension.LOADED
    assert extension.SIGNATURES == _extension.SIGNATURES
    message = r"fastdynat\._C \(.*\) was built from another version of csrc/.*Rebuild it \(pip install"
    monkeypatch.setattr(extension, "SIGNATURES", _extension.SIGNATURES - 1)
    with pytest.raises(ImportError, match=message):
        _extension._load()
    monkeypatch.delattr(extension, "SIGNATURES")  # libraries of before the number
    with pytest.raises(ImportError, match=message):
        _extension._load()


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in CPU_ONLY])
def test_launchers_take_the_arguments_of_the_schema(name: str) -> None:
    pytest.importorskip("triton")
    launcher = getattr(importlib.import_module(f"fastdynat.kernels.{name}"), name)
    expected = getattr(torch.ops.fastdynat, name).default._schema.arguments
    taken = inspect.signature(launcher).parameters.values()
    assert [p.name for p in taken] == [argument.name for argument in expected]
    has_default = [p.default is not p.empty for p in taken]
    assert has_default == [argument.has_default_value() for argument in expected]


def test_a_fake_gets_every_argument_by_name() -> None:
    seen: list[dict[str, object]] = []

    def eager(x: Tensor, scale: float, dtype: torch.dtype | None = None, twice: bool = False) -> Tensor:
        return x * scale

    def fake(x: Tensor, **others: object) -> Tensor:
        seen.append(others)
        return torch.empty_like(x)

    name = f"test_fake_{os.getpid()}"
    try:
        register_operator(name, eager=eager, fake=fake, gpu=False)
        x = torch.empty(3, device="meta")
        getattr(torch.ops.fastdynat, name)(x, 2.0)
    finally:
        OPERATORS.remove(name)
    assert seen == [{"scale": 2.0, "dtype": None, "twice": False}]
