"""Every import that README has shown since 0.1.0 still works."""

import importlib

import pytest

import fastdynat
from fastdynat.attacks import parse_attack

# Imports in the README of 0.1.0: module, names.
IMPORTS = {
    "fastdynat": "PGD PGDL2 FGSM FFGSM BIM TPGD trades_loss mart_loss dynat_loss lbgat_loss compat ops",
    "fastdynat.attacks": "AttackGoal PGDSpec pgd wide",
    "fastdynat.evaluation": (
        "AutoAttack accuracy_over_eps margins transfer_matrix explain check_masking boundary_speed"
    ),
    "fastdynat.methods": "METHODS AttackDefaults Inner Method Outer",
    "fastdynat.compat": "refresh",
    "fastdynat.runs": "load_network",
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in IMPORTS.items() for name in names.split()]
)
def test_the_import_works(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("name", fastdynat._IN_EVALUATE)
def test_other_classes_of_torchattacks_are_named_in_evaluate(name: str) -> None:
    with pytest.raises(
        AttributeError, match=rf"no attribute '{name}'; for torchattacks' {name} use "
    ) as error:
        getattr(fastdynat, name)
    given: list[dict[str, object]] = []

    class Recorder:
        def evaluate(self, model: None, data: object, attack: str, *, eps: float, norm: str = "linf") -> None:
            parse_attack(attack, eps=eps, step_size=eps / 4, norm=norm)
            given.append({"attack": attack})

    call = str(error.value).partition(" use ")[2]
    eval(call, {"fastdynat": Recorder(), "model": None, "images": None, "labels": None})
    assert given
