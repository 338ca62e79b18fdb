"""AutoAttack's versions: their attacks in order, with their numbers (Croce & Hein 2020, 2021)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastdynat.attack_engine.steps import usual_step
from fastdynat.attacks.names import NamedAttack, parse_attack
from fastdynat.errors import UserError, unknown_name

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
CUSTOM = "custom"


def stages(norm: str, eps: float, version: str = "standard", names: Sequence[str] = ()) -> list[NamedAttack]:
    """The attacks of `version`, in order; of "custom", those called `names`, with the numbers of "plus".

    Args:
        norm: linf, l2 or l1.
        eps: radius in [0, 1] pixel units.

    Raises:
        UserError: an unknown version or attack; names for a version that has its own, or none for "custom".
    """
    if version != CUSTOM and version not in VERSIONS:
        raise unknown_name("version of AutoAttack", version, (*VERSIONS, CUSTOM))
    if (version == CUSTOM) != bool(names):
        given = f"got {', '.join(names)}" if names else "got none"
        raise UserError(
            f"version {version!r}: attacks are named for version='custom' and for no other, {given}"
        )
    if len(set(names)) != len(names):
        raise UserError(f"attacks named twice in {', '.join(names)}")
    known = VERSIONS.get(version, tuple(names))
    parsed = [parse_attack(name, eps=eps, step_size=usual_step(norm, eps), norm=norm) for name in known]
    if any(a.search is None for a in parsed):
        raise UserError(f"clean is not an attack and is measured anyway; leave it out of {', '.join(known)}")
    return [NamedAttack(a.name, _with(a.search, **_numbers(a.name, norm, version))) for a in parsed]


def _numbers(name: str, norm: str, version: str) -> dict[str, Any]:
    """The version's numbers that differ from the standard ones of that name."""
    l1 = norm == "l1" and version == "standard"
    many = version in ("plus", CUSTOM)
    if name in ("apgd-ce", "apgd-dlr"):
        return {"restarts": 5 if many or l1 else 1, "larger_eps": l1, "eot": 20 if version == "rand" else 1}
    if name == "apgd-t":
        return {"targets": 5 if l1 else 9, "larger_eps": l1}
    return {"restarts": 5} if name == "fab" and many else {}


def _with(search: Any, **numbers: Any) -> Any:
    return replace(search, **numbers) if numbers else search
