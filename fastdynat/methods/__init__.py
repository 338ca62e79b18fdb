"""Training methods: one file each behind the interface of `fastdynat.methods.base`.

Every file of this folder that registers a class adds a method; `METHODS` finds them. The classes and their
options are public names of this package as well: ``from fastdynat.methods import Trades, TradesOptions``.
Nothing here needs torch until a method's class is used: the command line parses with the options alone.
"""

from typing import Any

from fastdynat.methods.base import (
    TRAINING_ATTACK,
    AttackDefaults,
    Inner,
    Method,
    Network,
    Networks,
    Outer,
    logged_mean,
)
from fastdynat.methods.method_registry import (
    METHODS,
    method_class,
    method_label,
    method_name,
    options_type,
    register_method,
)
from fastdynat.methods.options import (
    MOST,
    MethodOptions,
    check_given,
    check_numbers,
    check_options,
    check_positive,
)

__all__ = [
    "METHODS",
    "MOST",
    "TRAINING_ATTACK",
    "AttackDefaults",
    "Inner",
    "Method",
    "MethodOptions",
    "Network",
    "Networks",
    "Outer",
    "check_given",
    "check_numbers",
    "check_options",
    "check_positive",
    "logged_mean",
    "method_class",
    "method_label",
    "method_name",
    "options_type",
    "register_method",
]


def __getattr__(name: str) -> Any:
    """The class of a method, or its options, by its own name."""
    if not name.startswith("_"):
        for method in METHODS:
            found = METHODS.registered(method)
            if name == found.__name__:
                return METHODS[method]
            if name == found.options_type.__name__:
                return found.options_type
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    classes = [METHODS.registered(method) for method in METHODS]
    return sorted({*globals(), *(c.__name__ for c in classes), *(c.options_type.__name__ for c in classes)})
