"""Inner attack of a `ResolvedConfig`: sizes in pixel units, and the method's usual values."""

import math
from dataclasses import replace
from typing import Any

from fastdynat.config import AttackConfig
from fastdynat.data import DatasetInfo
from fastdynat.errors import UserError
from fastdynat.methods import AttackDefaults, Method
from fastdynat.training.resolved_config import ResolvedAttack, filled_in
from fastdynat.units import describe_size, parse_size

# TRADES, LBGAT and DYNAT train at 0.031 and are evaluated at 8/255.
PUBLISHED_EPS, PUBLISHED_STEP, EVAL_EPS = 0.031, 0.007, 8 / 255
LINF_EPS = {"digits": 0.1, "mnist": 0.3}
L2_EPS = {"digits": 1.0, "mnist": 2.0}
USUAL_L2_EPS = 0.5


def resolved_attack(
    attack: AttackConfig, info: DatasetInfo, method: Method[Any], notes: list[str]
) -> ResolvedAttack:
    """`attack` with the radii of the dataset and the steps of the method; `notes` gets it in one line.

    Raises:
        UserError: a size that is no radius of this image space, or an attack that the method cannot run.
    """
    limit = 1.0 if attack.norm == "linf" else math.sqrt(math.prod(info.image_shape))

    def size(what: str, value: float | str, automatic: float) -> float:
        if value == "auto":
            return automatic
        parsed = parse_size(value, what, norm=attack.norm, limit=limit)
        if parsed.notice:
            notes.append(parsed.notice)
        return parsed.value

    radii, usual_eps = (LINF_EPS, PUBLISHED_EPS) if attack.norm == "linf" else (L2_EPS, USUAL_L2_EPS)
    eps = size("eps", attack.eps, radii.get(info.name, usual_eps))
    published, defaults = attack.norm == "linf" and eps == PUBLISHED_EPS, method.attack_defaults
    usual_step = defaults.step_ratio * eps
    if published and defaults.step_ratio == AttackDefaults().step_ratio:
        usual_step = PUBLISHED_STEP
    resolved = filled_in(
        ResolvedAttack,
        attack,
        eps=eps,
        step_size=size("step_size", attack.step_size, usual_step),
        eval_eps=size("eval_eps", attack.eval_eps, EVAL_EPS if published else eps),
        steps=defaults.steps if attack.steps is None else attack.steps,
        start=_start(attack, defaults),
    )
    _check(resolved, method)
    notes.append(f"{announcement(resolved, method)}; evaluated at eps {describe_size(resolved.eval_eps)}")
    notes += _unused(attack, method, usual_step)
    return resolved


def _start(attack: AttackConfig, defaults: AttackDefaults) -> str:
    if attack.start != "auto":
        return attack.start
    # A gaussian start leaves a point where the gradient of the method's goal is 0; APGD needs it too.
    return "none" if attack.attack == "apgd" and defaults.start == "uniform" else defaults.start


def _check(attack: ResolvedAttack, method: Method[Any]) -> None:
    if attack.attack != "pgd" and not (method.attacks and method.takes_any_attack):
        own = "makes its attack itself" if method.attacks else "attacks nothing in training"
        raise UserError(f"attack {attack.attack}: method {method.name} {own}; leave --attack out")
    steps, early = attack.steps, attack.early_steps
    if early is not None and not 0 <= early <= steps:
        raise UserError(f"early_steps must be between 0 and steps ({steps}), got {early}")
    for count in (steps, steps if early is None else early):
        method.check_attack(replace(attack, steps=count).spec(), attack.attack_bn)
    if attack.awp > 0 and not method.searches:
        raise UserError(
            f"awp {attack.awp:g}: method {method.name} does not attack the current weights; use --awp 0"
        )


def _unused(attack: AttackConfig, method: Method[Any], usual_step: float) -> list[str]:
    """Notes on the options that the user changed although the method does not use them."""
    defaults = method.attack_defaults
    usual = {
        "steps": (None, defaults.steps),
        "step_size": ("auto", usual_step),
        "start": ("auto", defaults.start),
    }
    return [
        f"{name} {getattr(attack, name)} has no effect: {_own_attack(method)}"
        for name in method.unused_attack
        if getattr(attack, name) not in usual.get(name, (getattr(AttackConfig(), name),))
    ]


def announcement(attack: ResolvedAttack, method: Method[Any]) -> str:
    """The attack of training in one line."""
    if not method.attacks:
        return f"no attack in training ({attack.norm})"
    used = f"{attack.norm} eps {describe_size(attack.eps)}, "
    if "steps" in method.unused_attack:
        return f"{used}{_own_attack(method)}"
    if "step_size" in method.unused_attack:
        used += f"{attack.steps} iterations of its own search"
    elif attack.attack == "apgd":
        used += f"{attack.steps} steps of APGD"
    else:
        used += f"{attack.steps} steps of {describe_size(attack.step_size)}"
    if attack.early_steps is not None:
        used += f" ({attack.early_steps} in the first {100 * attack.early_share:g} % of the epochs)"
    return used


def _own_attack(method: Method[Any]) -> str:
    what = "uses its own search" if method.attacks else "attacks nothing in training"
    return f"method {method.name} {what}"
