"""Training methods: one file each behind the interface of `fastdynat.methods.base`."""

from typing import Any

from fastdynat.errors import unknown_name
from fastdynat.methods.alp import Alp, AlpOptions
from fastdynat.methods.arda import Arda, ArdaOptions
from fastdynat.methods.base import AttackDefaults, Inner, Method, Network, Networks, Outer
from fastdynat.methods.burn_in import BurnIn
from fastdynat.methods.dyart import Dyart, DyartOptions
from fastdynat.methods.dynat import Dynat, DynatOptions
from fastdynat.methods.fgsm_rs import FgsmRs, FgsmRsOptions
from fastdynat.methods.free import Free, FreeOptions
from fastdynat.methods.gairat import Gairat, GairatOptions
from fastdynat.methods.madry import Madry, MadryOptions
from fastdynat.methods.mail import Mail, MailOptions
from fastdynat.methods.mart import Mart, MartOptions
from fastdynat.methods.n_fgsm import NFgsm, NFgsmOptions
from fastdynat.methods.natural import Natural, NaturalOptions
from fastdynat.methods.trades import Trades, TradesOptions
from fastdynat.methods.vat import Vat, VatOptions

METHODS: dict[str, type[Method[Any]]] = {
    method.name: method
    for method in (
        Natural,
        Madry,
        Dynat,
        Dyart,
        Trades,
        Mart,
        Alp,
        Vat,
        Arda,
        FgsmRs,
        NFgsm,
        Free,
        Gairat,
        Mail,
    )
}


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
    "BurnIn",
    "Dyart",
    "DyartOptions",
    "Dynat",
    "DynatOptions",
    "FgsmRs",
    "FgsmRsOptions",
    "Free",
    "FreeOptions",
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
    "NFgsm",
    "NFgsmOptions",
    "Natural",
    "NaturalOptions",
    "Network",
    "Networks",
    "Outer",
    "Trades",
    "TradesOptions",
    "Vat",
    "VatOptions",
    "method_class",
]
