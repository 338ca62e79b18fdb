"""Training methods: one file each behind the interface of `fastdynat.methods.base`."""

from typing import Any

from fastdynat.errors import unknown_name
from fastdynat.methods.base import AttackDefaults, Inner, Method, Network, Networks, Outer
from fastdynat.methods.dynat import Dynat, DynatOptions
from fastdynat.methods.fgsm_rs import FgsmRs, FgsmRsOptions
from fastdynat.methods.free import Free, FreeOptions
from fastdynat.methods.madry import Madry, MadryOptions
from fastdynat.methods.n_fgsm import NFgsm, NFgsmOptions
from fastdynat.methods.natural import Natural, NaturalOptions
from fastdynat.methods.vat import Vat, VatOptions

METHODS: dict[str, type[Method[Any]]] = {m.name: m for m in (Dynat, Madry, Natural, FgsmRs, NFgsm, Free, Vat)}


def method_class(name: str) -> type[Method[Any]]:
    """The method called `name`, with the nearest names in the error if there is none."""
    if name.lower() not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name.lower()]


__all__ = [
    "METHODS",
    "AttackDefaults",
    "Dynat",
    "DynatOptions",
    "FgsmRs",
    "FgsmRsOptions",
    "Free",
    "FreeOptions",
    "Inner",
    "Madry",
    "MadryOptions",
    "Method",
    "NFgsm",
    "NFgsmOptions",
    "Natural",
    "NaturalOptions",
    "Network",
    "Networks",
    "Outer",
    "Vat",
    "VatOptions",
    "method_class",
]
