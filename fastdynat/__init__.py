"""Fast dynamic-label adversarial training."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdynat.compat.losses import dynat_loss, lbgat_loss, mart_loss, trades_loss
    from fastdynat.compat.torchattacks import BIM, FFGSM, FGSM, PGD, PGDL2, TPGD

__all__ = [
    "BIM",
    "FFGSM",
    "FGSM",
    "PGD",
    "PGDL2",
    "TPGD",
    "__version__",
    "dynat_loss",
    "lbgat_loss",
    "mart_loss",
    "trades_loss",
]
__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

# What `import fastdynat` is enough for; the command line is no library.
_PARTS = (
    *(
        "attacks",
        "compat",
        "config",
        "data",
        "engine",
        "errors",
        "evaluation",
        "export",
        "methods",
        "models",
        "ops",
    ),
    *("recipes", "report", "runs", "units"),
)


def __getattr__(name: str) -> Any:
    """The attacks, losses and sub-packages, imported at their first use: `import fastdynat` takes no
    torch.
    """
    if name in _PARTS:
        return importlib.import_module(f"fastdynat.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "losses" if name.endswith("_loss") else "torchattacks"
    value = globals()[name] = getattr(importlib.import_module(f"fastdynat.compat.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
