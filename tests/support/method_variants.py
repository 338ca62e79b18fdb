"""Every registered method, with the flags that train it on a few digits."""

from pathlib import Path
from typing import Any

import pytest

from fastdynat.commands.main import main
from fastdynat.methods import METHODS, Method, method_class

# Options that make another computation of a method; every method stands here with its defaults too.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "lbgat-0": ("lbgat", {"alpha": 0.0}),
    "lbgat-frozen": ("lbgat", {"freeze_guide": True, "alp_weight": 1.0}),
    "iad-2": ("iad", {"variant": "II", "begin": 0.5}),
    "free-2": ("free", {"replays": 2}),
    "madry-prior": ("madry", {"prior_epochs": 2}),
    "fgsm_rs-prior": ("fgsm_rs", {"prior_epochs": 2}),
    "vat-pgd": ("vat", {"search": "pgd"}),
    "mail-trades": ("mail", {"base": "trades", "weight_from": 0.5}),
    "mart-released": ("mart", {"floor": 1e-4}),
    "arda-quarter": ("arda", {"adversarial_share": 0.25}),
    "dynat-no-inner": ("dynat", {"inner_loss": "kl_self", "extra_kl_weight": 1.0, "beta": 0.2}),
    "dynat-soft-eval": ("dynat", {"label_type": "soft", "temperature": 2.0, "guide_mode": "eval"}),
    "dynat-gairat": ("dynat", {"weighting": "gairat"}),
    "dynat-mail": ("dynat", {"weighting": "mail", "weight_from": 0.5}),
}


def make_method(variant: str) -> Method[Any]:
    name, options = VARIANTS[variant]
    method = method_class(name)
    return method(method.options_type(**options))


TINY = ["--train-size", "96", "--val-size", "20", "--batch-size", "32", "--epochs", "2", "--quiet"]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert main(["train", "--method", "natural", "--run-dir", str(run), *TINY]) == 0
    return run


def flags(variant: str, teacher: Path) -> list[str]:
    name, options = VARIANTS[variant]
    method = make_method(variant)
    named = ((key.replace("_", "-"), value) for key, value in options.items())
    own = [f"--{key}" if value is True else f"--{key}={value}" for key, value in named]
    frozen = ["--guide-from", str(teacher)] if method.uses_guide and "guide" not in method.trains else []
    steps = ["--steps", "2"] if method.attack_defaults.steps > 2 else []
    return ["--method", name, *own, *frozen, *steps]
