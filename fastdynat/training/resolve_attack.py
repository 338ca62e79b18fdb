"""Inner attack of a `ResolvedConfig`: sizes in pixel units, and the method's usual values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdynat.attack_engine.steps import diameter
from fastdynat.config import AttackConfig
from fastdynat.config.attack_config import given_radii, norms_of
from fastdynat.config.value_ranges import size_notices
from fastdynat.data import DatasetInfo
from fastdynat.errors import UserError
from fastdynat.methods import AttackDefaults, Method
from fastdynat.training.resolved_config import EVAL_EPS, PUBLISHED_EPS, ResolvedAttack, filled_in
from fastdynat.units import check_step_width, describe_size, parse_size
from fastdynat.user_code import is_user_supplied

PUBLISHED_STEP = 0.007  # for PUBLISHED_EPS
# l1: 12 for CIFAR-10 (Croce & Hein 2021 and 2022), 10 for MNIST (Maini et al. 2020).
USUAL_EPS = {"linf": PUBLISHED_EPS, "l2": 0.5, "l1": 12.0}
EPS_OF_DATA = {
    "digits": {"linf": 0.1, "l2": 1.0, "l1": 10.0},
    "mnist": {"linf": 0.3, "l2": 2.0, "l1": 10.0},
}
RAMP_REMEDY = ", or let it use attack.eps and attack.step_size, and set follows_ramp = True"


def resolved_attack(
    attack: AttackConfig, info: DatasetInfo, method: Method[Any], notes: list[str]
) -> ResolvedAttack:
    """`attack` with the radii of the dataset and the steps of the method; `notes` gets it in one line.

    Raises:
        UserError: a size that is no radius of this image space, or an attack that the method cannot run.
    """
    norms, given = norms_of(attack), given_radii(attack)
    norm = norms[0]

    def size(what: str, value: float | str, automatic: float, norm: str = norm) -> float:
        if value == "auto":
            return automatic
        return parse_size(value, what, norm=norm, limit=diameter(norm, info.image_shape)).value

    notes += size_notices(attack)
    usual = EPS_OF_DATA.get(info.name, USUAL_EPS)
    radii = [
        size(f"norm_eps ({name})", eps, usual[name], name) for name, eps in zip(norms, given, strict=True)
    ]
    eps = size("eps", attack.eps, radii[0])
    if attack.norm_eps != "auto" and eps != radii[0]:
        raise UserError(f"eps {eps:g} is not the first of --norm-eps {attack.norm_eps}; leave --eps out")
    published, defaults = norm == "linf" and eps == PUBLISHED_EPS, method.attack_defaults
    usual_step = defaults.step_ratio * eps
    if published and defaults.step_ratio == AttackDefaults().step_ratio:
        usual_step = PUBLISHED_STEP
    resolved = filled_in(
        ResolvedAttack,
        attack,
        norm=norm,
        norm_eps="auto" if attack.norms is None else ",".join(map(repr, [eps, *radii[1:]])),
        eps=eps,
        step_size=size("step_size", attack.step_size, usual_step),
        eval_eps=size("eval_eps", attack.eval_eps, EVAL_EPS if published else eps),
        steps=defaults.steps if attack.steps is None else attack.steps,
        start=_start(attack, defaults),
    )
    if norm == "linf":
        asked = given[0] if attack.eps == "auto" else attack.eps
        wide = check_step_width(attack.step_size, asked, step_size=resolved.step_size, radius=eps)
        notes += [] if wide is None else [wide]
    _check(resolved, method)
    notes.append(f"{announcement(resolved, method)}; evaluated at eps {_described(resolved.eval_radii())}")
    notes += method.notes(resolved.specs()[0])
    notes += _unused(attack, method, usual_step)
    return resolved


def _described(radii: Mapping[str, float]) -> str:
    """Radii in words: without their norm where there is one only."""
    sizes = {norm: describe_size(eps, norm) for norm, eps in radii.items()}
    return ", ".join(sizes.values() if len(sizes) == 1 else (f"{norm} {eps}" for norm, eps in sizes.items()))


def _start(attack: AttackConfig, defaults: AttackDefaults) -> str:
    if attack.start != "auto":
        return attack.start
    # A gaussian start leaves a point where the gradient of the method's goal is 0; APGD needs it too.
    return "none" if attack.attack == "apgd" and defaults.start == "uniform" else defaults.start


def _check(attack: ResolvedAttack, method: Method[Any]) -> None:
    own = "has an attack of its own" if method.attacks else "has no attack in training"
    for key, usual in (("attack", "pgd"), ("norms", None)):
        value = getattr(attack, key)
        if value != usual and not (method.attacks and method.takes_any_attack):
            raise UserError(f"{key} {value}: method {method.name} {own}; leave --{key} out")
    if attack.targeted != "none" and not (
        method.attacks and method.takes_any_attack and method.takes_targets
    ):
        raise UserError(
            f"targeted {attack.targeted}: the attack of method {method.name} does not maximise the "
            "cross-entropy with the label alone, so no target class can replace the label; leave --targeted "
            "out, or use --method madry"
        )
    steps, early = attack.steps, attack.early_steps
    if early is not None and not 0 <= early <= steps:
        raise UserError(f"early_steps must be between 0 and steps ({steps}), got {early}")
    for count in (steps, steps if early is None else early):
        for spec in replace(attack, steps=count).specs():
            method.check_attack(spec, attack.attack_bn)
    _check_ramps(attack, method)
    if attack.awp > 0 and not method.searches:
        raise UserError(
            f"awp {attack.awp:g}: method {method.name} has no attack separate from its update; use --awp 0"
        )


def _check_ramps(attack: ResolvedAttack, method: Method[Any]) -> None:
    """Raise UserError for a ramp with an attack that does not follow it."""
    asked = [f"{name} {n}" for name in ("eps_ramp", "step_ramp") if (n := getattr(attack, name))]
    if not asked:
        return
    if attack.norms is not None:
        raise UserError(
            f"{asked[0]}: a ramp takes a single norm, got --norms {attack.norms}; leave one of them out"
        )
    if not method.attacks:
        raise UserError(f"{asked[0]}: method {method.name} has no attack in training; leave it out")
    if not method.takes_ramp():
        raise UserError(
            f"{asked[0]}: method {method.name} has an attack of its own that does not follow ramps; "
            f"leave it out{RAMP_REMEDY * is_user_supplied(method.name)}"
        )
    if attack.step_ramp and (attack.attack == "apgd" or "step_size" in method.unused_attack):
        own = "--attack apgd adapts its step size" if attack.attack == "apgd" else _own_attack(method)
        raise UserError(f"step_ramp {attack.step_ramp}: {own}; leave it out")


def check_ramps_end(attack: AttackConfig, epochs: int) -> None:
    """Raise UserError for a ramp that does not end within the method's `epochs` epochs."""
    for name in ("eps_ramp", "step_ramp"):
        if (ramp := getattr(attack, name) or 0) > epochs:
            raise UserError(
                f"{name} {ramp}: the ramp is longer than the {epochs} epochs of the method, and would not "
                f"reach its end; use --{name.replace('_', '-')} {epochs}"
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
    used = f"{attack.norm} eps {describe_size(attack.eps, attack.norm)}, "
    if attack.norms is not None:
        how = {
            "alternate": "one of {} per batch",
            "worst": "the worst of {} for each image",
            "average": "the mean loss under {}",
        }
        used = how[attack.norm_choice].format(_described(attack.radii())) + ", "
    if "steps" in method.unused_attack:
        return f"{used}{_own_attack(method)}"
    if "step_size" in method.unused_attack:
        used += f"{attack.steps} iterations of its own search"
    elif attack.attack == "apgd":
        used += f"{attack.steps} steps of APGD"
    else:
        used += f"{attack.steps} steps of {describe_size(attack.step_size, attack.norm)}"
    used += _ramps(attack)
    used += {"none": "", "random": " towards a random class", "least": " towards the least likely class"}[
        attack.targeted
    ]
    if attack.early_steps is not None:
        used += f" ({attack.early_steps} in the first {100 * attack.early_share:g} % of the epochs)"
    return used


def _ramps(attack: ResolvedAttack) -> str:
    """The ramps of the attack for its line."""
    alike = attack.step_ramp is None or attack.step_ramp == attack.eps_ramp
    ramped = {"both" if alike else "eps": attack.eps_ramp, "step size": 0 if alike else attack.step_ramp or 0}
    found = [f"{what} ramped over {epochs} epochs" for what, epochs in ramped.items() if epochs]
    return "".join(f", {text}" for text in found)


def _own_attack(method: Method[Any]) -> str:
    what = "uses its own search" if method.attacks else "has no attack in training"
    return f"method {method.name} {what}"
