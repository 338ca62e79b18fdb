"""The options of the built-in methods, which are their flags and keys. The command line reads them without
torch.
"""

from fastdynat.methods.options.dyart_options import DyartOptions
from fastdynat.methods.options.guided import AdagatOptions, DynatOptions, LbgatOptions
from fastdynat.methods.options.method_options import (
    MethodOptions,
    check_given,
    check_numbers,
    check_options,
    check_positive,
)
from fastdynat.methods.options.plain import (
    ArdaOptions,
    FgsmRsOptions,
    FreeOptions,
    MadryOptions,
    NaturalOptions,
    NFgsmOptions,
)
from fastdynat.methods.options.regularised import AlpOptions, MartOptions, TradesOptions, VatOptions
from fastdynat.methods.options.taught import (
    ArdOptions,
    DistillationOptions,
    HatOptions,
    IadOptions,
    RsladOptions,
)
from fastdynat.methods.options.weighted import GairatOptions, MailOptions

__all__ = [
    "AdagatOptions",
    "AlpOptions",
    "ArdOptions",
    "ArdaOptions",
    "DistillationOptions",
    "DyartOptions",
    "DynatOptions",
    "FgsmRsOptions",
    "FreeOptions",
    "GairatOptions",
    "HatOptions",
    "IadOptions",
    "LbgatOptions",
    "MadryOptions",
    "MailOptions",
    "MartOptions",
    "MethodOptions",
    "NFgsmOptions",
    "NaturalOptions",
    "RsladOptions",
    "TradesOptions",
    "VatOptions",
    "check_given",
    "check_numbers",
    "check_options",
    "check_positive",
]
