"""Attacks, one file each, and their registry.

- `registry`: `register`, the decorator by which an attack's file makes it known by name;
- `interface`: what an attack is called with and returns;
- `names`, `user_attacks`: from a name, or a user's file, to the attack;
- attacks in a ball: `fgsm`, `bim`, `mim`, `restarted_pgd`, `cw_linf`, `apgd`, `fab`, `square`;
- minimum-norm attacks: `carlini_wagner`, `deepfool`, `sigma_zero`, and `fab` again;
- `boundary_search`: the nearest point of the decision boundary, DyART's inner problem;
- `plane_search`: norms and moves of the boundary searches;
- `autoattack_versions`: the attacks of AutoAttack's versions.

`fastdynat.attack_engine` computes attacks fast; its public names can also be imported from here. Nothing here
needs torch until a name is used.
"""

from typing import TYPE_CHECKING

from fastdynat.attacks.registry import AttackEntry, Radii, register
from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.attack_engine.ascent import Ascent, Underflow
    from fastdynat.attack_engine.attack_result import AttackResult
    from fastdynat.attack_engine.attack_switches import AttackSwitches
    from fastdynat.attack_engine.engine import AttackEngine, Attacker
    from fastdynat.attack_engine.goal import (
        AttackGoal,
        kl_from_log_probs,
        margin,
        rival_loss,
        soft_cross_entropy,
        wide,
    )
    from fastdynat.attack_engine.network_modes import (
        NotCopyable,
        attack_mode,
        frozen_twin,
        set_attack_mode,
        unmoved_twin,
    )
    from fastdynat.attack_engine.pgd import pgd, run_pgd
    from fastdynat.attack_engine.pgd_spec import PGDSpec
    from fastdynat.attack_engine.shrinking_batch import Tick, no_tick
    from fastdynat.attack_engine.steps import diameter, pgd_step, start_point, usual_step
    from fastdynat.attacks.apgd import APGD, APGDResult, run_apgd
    from fastdynat.attacks.autoattack_versions import VERSIONS, stages
    from fastdynat.attacks.boundary_search import Boundary, BoundarySpec, boundary
    from fastdynat.attacks.carlini_wagner import CarliniL2
    from fastdynat.attacks.deepfool import DeepFool
    from fastdynat.attacks.fab import FAB
    from fastdynat.attacks.interface import Attack, Nearest
    from fastdynat.attacks.mim import MIM
    from fastdynat.attacks.names import NamedAttack, parse_attack
    from fastdynat.attacks.restarted_pgd import RestartedPGD
    from fastdynat.attacks.sigma_zero import SigmaZero
    from fastdynat.attacks.square import Square

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "fastdynat.attack_engine.ascent": (
            "Ascent",
            "Underflow",
        ),
        "fastdynat.attack_engine.attack_result": ("AttackResult",),
        "fastdynat.attacks.boundary_search": (
            "Boundary",
            "BoundarySpec",
            "boundary",
        ),
        "fastdynat.attack_engine.attack_switches": ("AttackSwitches",),
        "fastdynat.attack_engine.engine": (
            "AttackEngine",
            "Attacker",
        ),
        "fastdynat.attack_engine.goal": (
            "AttackGoal",
            "kl_from_log_probs",
            "margin",
            "rival_loss",
            "soft_cross_entropy",
            "wide",
        ),
        "fastdynat.attack_engine.network_modes": (
            "NotCopyable",
            "attack_mode",
            "frozen_twin",
            "set_attack_mode",
            "unmoved_twin",
        ),
        "fastdynat.attack_engine.pgd": (
            "pgd",
            "run_pgd",
        ),
        "fastdynat.attack_engine.pgd_spec": ("PGDSpec",),
        "fastdynat.attack_engine.shrinking_batch": (
            "Tick",
            "no_tick",
        ),
        "fastdynat.attack_engine.steps": (
            "diameter",
            "pgd_step",
            "start_point",
            "usual_step",
        ),
        "apgd": (
            "APGD",
            "APGDResult",
            "run_apgd",
        ),
        "autoattack_versions": (
            "VERSIONS",
            "stages",
        ),
        "carlini_wagner": ("CarliniL2",),
        "deepfool": ("DeepFool",),
        "fab": ("FAB",),
        "interface": (
            "Attack",
            "Nearest",
        ),
        "mim": ("MIM",),
        "names": (
            "NamedAttack",
            "parse_attack",
        ),
        "restarted_pgd": ("RestartedPGD",),
        "sigma_zero": ("SigmaZero",),
        "square": ("Square",),
    },
)

__all__ = [
    "APGD",
    "FAB",
    "MIM",
    "VERSIONS",
    "APGDResult",
    "Ascent",
    "Attack",
    "AttackEngine",
    "AttackEntry",
    "AttackGoal",
    "AttackResult",
    "AttackSwitches",
    "Attacker",
    "Boundary",
    "BoundarySpec",
    "CarliniL2",
    "DeepFool",
    "NamedAttack",
    "Nearest",
    "NotCopyable",
    "PGDSpec",
    "Radii",
    "RestartedPGD",
    "SigmaZero",
    "Square",
    "Tick",
    "Underflow",
    "attack_mode",
    "boundary",
    "diameter",
    "frozen_twin",
    "kl_from_log_probs",
    "margin",
    "no_tick",
    "parse_attack",
    "pgd",
    "pgd_step",
    "register",
    "rival_loss",
    "run_apgd",
    "run_pgd",
    "set_attack_mode",
    "soft_cross_entropy",
    "stages",
    "start_point",
    "unmoved_twin",
    "usual_step",
    "wide",
]
