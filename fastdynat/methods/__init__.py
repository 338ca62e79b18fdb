"""Training methods: one file each behind the interface of `fastdynat.methods.base`."""

from typing import Any

from fastdynat.errors import unknown_name
from fastdynat.methods.adagat import Adagat, AdagatOptions
from fastdynat.methods.ard import Ard, ArdOptions
from fastdynat.methods.base import AttackDefaults, Inner, Method, Network, Networks, Outer
from fastdynat.methods.distillation import Distillation, DistillationOptions
from fastdynat.methods.dynat import Dynat, DynatOptions
from fastdynat.methods.hat import Hat, HatOptions
from fastdynat.methods.iad import Iad, IadOptions
from fastdynat.methods.lbgat import Lbgat, LbgatOptions
from fastdynat.methods.madry import Madry, MadryOptions
from fastdynat.methods.natural import Natural, NaturalOptions
from fastdynat.methods.rslad import Rslad, RsladOptions

METHODS: dict[str, type[Method[Any]]] = {
    m.name: m for m in (Adagat, Ard, Distillation, Dynat, Hat, Iad, Lbgat, Madry, Natural, Rslad)
}


def method_class(name: str) -> type[Method[Any]]:
    """The method called `name`, with the nearest names in the error if there is none."""
    if name.lower() not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name.lower()]


__all__ = [
    "METHODS",
    "Adagat",
    "AdagatOptions",
    "Ard",
    "ArdOptions",
    "AttackDefaults",
    "Distillation",
    "DistillationOptions",
    "Dynat",
    "DynatOptions",
    "Hat",
    "HatOptions",
    "Iad",
    "IadOptions",
    "Inner",
    "Lbgat",
    "LbgatOptions",
    "Madry",
    "MadryOptions",
    "Method",
    "Natural",
    "NaturalOptions",
    "Network",
    "Networks",
    "Outer",
    "Rslad",
    "RsladOptions",
    "method_class",
]
