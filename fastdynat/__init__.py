"""Fast dynamic-label adversarial training."""

import importlib
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


def __getattr__(name: str) -> Any:
    """The attacks and losses, imported where they are used: the command line and `import fastdynat` do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "losses" if name.endswith("_loss") else "torchattacks"
    return getattr(importlib.import_module(f"fastdynat.compat.{module}"), name)
