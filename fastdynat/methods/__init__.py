"""Training methods: one file each behind the interface of `fastdynat.methods.base`."""

from typing import Any

from fastdynat.errors import unknown_name
from fastdynat.methods.alp import Alp, AlpOptions
from fastdynat.methods.arda import Arda, ArdaOptions
from fastdynat.methods.base import AttackDefaults, Inner, Method, Network, Networks, Outer
from fastdynat.methods.dynat import Dynat, DynatOptions
from fastdynat.methods.gairat import Gairat, GairatOptions
from fastdynat.methods.madry import Madry, MadryOptions
from fastdynat.methods.mail import Mail, MailOptions
from fastdynat.methods.mart import Mart, MartOptions
from fastdynat.methods.natural import Natural, NaturalOptions
from fastdynat.methods.trades import Trades, TradesOptions

METHODS: dict[str, type[Method[Any]]] = {m.name: m for m in (Dynat, Madry, Natural, Trades, Mart, Alp, Arda, Gairat, Mail)}


def method_class(name: str) -> type[Method[Any]]:
    """The method called `name`, with the nearest names in the error if there is none."""
    if name.lower() not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name.lower()]


__all__ = [
    "METHODS",
    "Alp",
    "AlpOptions",
    "Arda",
    "ArdaOptions",
    "AttackDefaults",
    "Dynat",
    "DynatOptions",
    "Gairat",
    "GairatOptions",
    "Inner",
    "Madry",
    "MadryOptions",
    "Mail",
    "MailOptions",
    "Mart",
    "MartOptions",
    "Method",
    "Natural",
    "NaturalOptions",
    "Network",
    "Networks",
    "Outer",
    "Trades",
    "TradesOptions",
    "method_class",
]
