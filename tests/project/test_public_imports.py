"""Every import that README has shown since 0.1.0 still works."""

import importlib

import pytest

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
