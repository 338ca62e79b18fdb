"""Attacks: goals, steps, PGD and the names an evaluation uses."""

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.boundary import Boundary, BoundarySpec, boundary
from fastdynat.attack_engine.engine import AttackEngine, Attacker, AttackSwitches
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
from fastdynat.attacks.ball_attacks import PGD
from fastdynat.attacks.base import Nearest, Radii, Search
from fastdynat.attacks.carlini_wagner import CarliniL2
from fastdynat.attacks.deepfool import DeepFool
from fastdynat.attacks.mim import MIM
from fastdynat.attacks.names import NamedAttack, parse_attack, parse_attacks
from fastdynat.attacks.sigma_zero import SigmaZero

__all__ = [
    "APGD",
    "MIM",
    "PGD",
    "VERSIONS",
    "APGDResult",
    "Ascent",
    "AttackEngine",
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
    "Search",
    "SigmaZero",
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
    "parse_attacks",
    "pgd",
    "pgd_step",
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
