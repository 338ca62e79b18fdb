"""Training methods: one file each behind the interface of `fastdynat.methods.base`.

Nothing here needs torch until a method's class is used: the command line parses with the options alone.
"""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdynat.errors import unknown_name
from fastdynat.lazy import lazy_names
from fastdynat.methods import options
from fastdynat.methods.options import (
    AdagatOptions,
    AlpOptions,
    ArdaOptions,
    ArdOptions,
    DistillationOptions,
    DyartOptions,
    DynatOptions,
    FgsmRsOptions,
    FreeOptions,
    GairatOptions,
    HatOptions,
    IadOptions,
    LbgatOptions,
    MadryOptions,
    MailOptions,
    MartOptions,
    NaturalOptions,
    NFgsmOptions,
    RsladOptions,
    TradesOptions,
    VatOptions,
)

if TYPE_CHECKING:
    from fastdynat.methods.adagat import Adagat
    from fastdynat.methods.alp import Alp
    from fastdynat.methods.ard import Ard
    from fastdynat.methods.arda import Arda
    from fastdynat.methods.base import AttackDefaults, Inner, Method, Network, Networks, Outer
    from fastdynat.methods.burn_in import BurnIn
    from fastdynat.methods.distillation import Distillation
    from fastdynat.methods.dyart import Dyart
    from fastdynat.methods.dynat import Dynat
    from fastdynat.methods.fgsm_rs import FgsmRs
    from fastdynat.methods.free import Free
    from fastdynat.methods.gairat import Gairat
    from fastdynat.methods.hat import Hat
    from fastdynat.methods.iad import Iad
    from fastdynat.methods.lbgat import Lbgat
    from fastdynat.methods.madry import Madry
    from fastdynat.methods.mail import Mail
    from fastdynat.methods.mart import Mart
    from fastdynat.methods.n_fgsm import NFgsm
    from fastdynat.methods.natural import Natural
    from fastdynat.methods.rslad import Rslad
    from fastdynat.methods.trades import Trades
    from fastdynat.methods.vat import Vat

# The built-in methods: the file of a method has its name.
BUILT_IN = {
    "natural": "Natural",
    "madry": "Madry",
    "dynat": "Dynat",
    "dyart": "Dyart",
    "trades": "Trades",
    "mart": "Mart",
    "alp": "Alp",
    "vat": "Vat",
    "arda": "Arda",
    "fgsm_rs": "FgsmRs",
    "n_fgsm": "NFgsm",
    "free": "Free",
    "gairat": "Gairat",
    "mail": "Mail",
    "lbgat": "Lbgat",
    "adagat": "Adagat",
    "hat": "Hat",
    "ard": "Ard",
    "rslad": "Rslad",
    "iad": "Iad",
    "distillation": "Distillation",
}


class _Methods(MutableMapping[str, "type[Method[Any]]"]):
    """The methods by name, each imported when it is looked up; a method of one's own is put in like in a
    dictionary.
    """

    def __init__(self) -> None:
        self.classes: dict[str, type[Method[Any]] | None] = dict.fromkeys(BUILT_IN)

    def __getitem__(self, name: str) -> "type[Method[Any]]":
        found = self.classes[name]
        if found is None:
            found = getattr(import_module(f"fastdynat.methods.{name}"), BUILT_IN[name])
            self.classes[name] = found
        return found

    def __setitem__(self, name: str, method: "type[Method[Any]]") -> None:
        self.classes[name] = method

    def __delitem__(self, name: str) -> None:
        del self.classes[name]

    def __contains__(self, name: object) -> bool:  # the inherited one would import the method
        return name in self.classes

    def __iter__(self) -> Iterator[str]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)


METHODS = _Methods()


def method_name(name: str) -> str:
    """The name in `METHODS` for `name` in any case, with the nearest names in the error if there is none."""
    if name.lower() not in METHODS:
        raise unknown_name("method", name, METHODS)
    return name.lower()


def method_class(name: str) -> "type[Method[Any]]":
    """The method called `name`, with the nearest names in the error if there is none."""
    return METHODS[method_name(name)]


def options_type(name: str) -> type:
    """The options of the method called `name`; a built-in method's are found without torch."""
    loaded = METHODS.classes[method_name(name)]
    return getattr(options, f"{BUILT_IN[name.lower()]}Options") if loaded is None else loaded.options_type


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "base": ("AttackDefaults", "Inner", "Method", "Network", "Networks", "Outer"),
        "burn_in": ("BurnIn",),
        **{file: (name,) for file, name in BUILT_IN.items()},
    },
)

__all__ = [
    "BUILT_IN",
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
    "method_name",
    "options_type",
]
