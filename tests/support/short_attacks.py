"""Registered attacks by name, with few steps where the name sets none."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from fastdynat.attacks import NamedAttack, parse_attack
from fastdynat.attacks.registry import entries

USUAL_STEPS = 100  # of attacks whose names set no number of steps, such as FAB


def short_attack(name: str, norm: str, *, eps: float, steps: int) -> NamedAttack:
    """The attack called `name` with `steps` in place of the usual 100, and a third of `eps` as its step."""
    attack = parse_attack(name, eps=eps, step_size=eps / 3, norm=norm)
    search: Any = attack.search
    short = replace(search, steps=steps) if getattr(search, "steps", 0) == USUAL_STEPS else search
    return replace(attack, search=short)


def missing_attacks(names: Collection[str]) -> list[str]:
    """The patterns of the package's own registered attacks that none of `names` matches."""
    own = (entry for entry in entries() if entry.module.startswith("fastdynat."))
    return [str(entry.pattern) for entry in own if not any(entry.match(name) for name in names)]
