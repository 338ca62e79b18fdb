"""Training methods: one file each behind the interface of `fastdynat.methods.base`."""

from typing import Any

from fastdynat.errors import unknown_name
from fastdynat.methods.adagat import Adagat, AdagatOptions
from fastdynat.methods.alp import Alp, AlpOptions
from fastdynat.methods.ard import Ard, ArdOptions
from fastdynat.methods.arda import Arda, ArdaOptions
from fastdynat.methods.base import AttackDefaults, Inner, Method, Network, Networks, Outer
from fastdynat.methods.burn_in import BurnIn
from fastdynat.methods.distillation import Distillation, DistillationOptions
from fastdynat.methods.dyart import Dyart, DyartOptions
from fastdynat.methods.dynat import Dynat, DynatOptions
from fastdynat.methods.fgsm_rs import FgsmRs, FgsmRsOptions
from fastdynat.methods.free import Free, FreeOptions
from fastdynat.methods.gairat import Gairat, GairatOptions
from fastdynat.methods.hat import Hat, HatOptions
from fastdynat.methods.iad import Iad, IadOptions
from fastdynat.methods.lbgat import Lbgat, LbgatOptions
from fastdynat.methods.madry import Madry, MadryOptions
from fastdynat.methods.mail import Mail, MailOptions
from fastdynat.methods.mart import Mart, MartOptions
from fastdynat.methods.n_fgsm import NFgsm, NFgsmOptions
from fastdynat.methods.natural import Natural, NaturalOptions
from fastdynat.methods.rslad import Rslad, RsladOptions
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
        Lbgat,
        Adagat,
        Hat,
        Ard,
        Rslad,
        Iad,
        Distillation,
    )
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
    "Alp",
    "AlpOptions",
    "Ard",
    "ArdOptions",
    "Arda",
    "ArdaOptions",
    "AttackDefaults",
    "BurnIn",
    "Distillation",
    "DistillationOptions",
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
    "Hat",
    "HatOptions",
    "Iad",
    "IadOptions",
    "Inner",
    "Lbgat",
    "LbgatOptions",
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
    "Rslad",
    "RsladOptions",
    "Trades",
    "TradesOptions",
    "Vat",
    "VatOptions",
    "method_class",
]
