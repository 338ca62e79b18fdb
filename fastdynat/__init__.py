"""Fast adversarial training and evaluation of image classifiers.

The public API, imported at its first use: ``import fastdynat`` does not import torch.
"""

import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastdynat import (
        attacks,
        compat,
        config,
        data,
        errors,
        evaluation,
        methods,
        models,
        ops,
        recipes,
        runs,
        training,
        units,
    )
    from fastdynat.api.evaluation_table import Evaluation, evaluate
    from fastdynat.api.trained_run import TrainedRun, train
    from fastdynat.compat.losses import dynat_loss, lbgat_loss, mart_loss, trades_loss
    from fastdynat.compat.torchattacks import BIM, FFGSM, FGSM, PGD, PGDL2, TPGD
    from fastdynat.errors import UserError
    from fastdynat.evaluation.autoattack import AutoAttack
    from fastdynat.freed_memory import keep_freed_memory
    from fastdynat.runs.weights import load_network

# Public names by the module that has them.
_NAMES = {
    "api.evaluation_table": ("Evaluation", "evaluate"),
    "api.trained_run": ("TrainedRun", "train"),
    "compat.losses": ("dynat_loss", "lbgat_loss", "mart_loss", "trades_loss"),
    "compat.torchattacks": ("BIM", "FFGSM", "FGSM", "PGD", "PGDL2", "TPGD"),
    "errors": ("UserError",),
    "evaluation.autoattack": ("AutoAttack",),
    "freed_memory": ("keep_freed_memory",),
    "runs.weights": ("load_network",),
}
_ORIGIN = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [
    "BIM",
    "FFGSM",
    "FGSM",
    "PGD",
    "PGDL2",
    "TPGD",
    "AutoAttack",
    "Evaluation",
    "TrainedRun",
    "UserError",
    "__version__",
    "attacks",
    "compat",
    "config",
    "data",
    "dynat_loss",
    "errors",
    "evaluate",
    "evaluation",
    "keep_freed_memory",
    "lbgat_loss",
    "load_network",
    "mart_loss",
    "methods",
    "models",
    "ops",
    "recipes",
    "runs",
    "trades_loss",
    "train",
    "training",
    "units",
]

# Other classes of torchattacks: the arguments of `evaluate` that run their algorithm.
_LINF = "eps=8 / 255"
_L2 = 'norm="l2", eps=0.5'
_IN_EVALUATE = {
    "APGD": ("apgd-ce", _LINF),
    "APGDT": ("apgd-t", _LINF),
    "CW": ("cwl2", _L2),
    "DeepFool": ("deepfool", _L2),
    "FAB": ("fab", _LINF),
    "MIFGSM": ("mim", _LINF),
    "Square": ("square", _LINF),
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    import importlib

    if name not in __all__:
        instead = ""
        if name in _IN_EVALUATE:
            attack, size = _IN_EVALUATE[name]
            call = f'fastdynat.evaluate(model, (images, labels), "{attack}", {size})'
            instead = f"; for torchattacks' {name} use {call}"
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{instead}")
    if name not in _ORIGIN:
        return importlib.import_module(f"fastdynat.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"fastdynat.{_ORIGIN[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
