"""Attacks: goals, steps, PGD and the names an evaluation uses."""

from fastdynat.attacks.ascent import Ascent, PGDSpec, Underflow
from fastdynat.attacks.autoattack.apgd import APGD, APGDResult, run_apgd
from fastdynat.attacks.autoattack.standard import VERSIONS, stages
from fastdynat.attacks.boundary import Boundary, BoundarySpec, boundary
from fastdynat.attacks.engine import AttackEngine, Attacker, AttackSwitches
from fastdynat.attacks.fidelity import Fidelity, check_fidelity
from fastdynat.attacks.goal import AttackGoal, kl_from_log_probs, margin, rival_loss, soft_cross_entropy, wide
from fastdynat.attacks.mim import MIM
from fastdynat.attacks.minimal import CarliniL2, DeepFool, SigmaZero
from fastdynat.attacks.modes import NotCopyable, attack_mode, frozen_twin, set_attack_mode, unmoved_twin
from fastdynat.attacks.named import NamedAttack, parse_attack, parse_attacks
from fastdynat.attacks.normball import PGD
from fastdynat.attacks.pgd import pgd, run_pgd
from fastdynat.attacks.rebatch import Tick, no_tick
from fastdynat.attacks.search import AttackResult, Nearest, Radii, Search
from fastdynat.attacks.steps import diameter, pgd_step, start_point, usual_step

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
    "Fidelity",
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
    "check_fidelity",
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
