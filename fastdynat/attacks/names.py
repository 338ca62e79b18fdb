"""Attack names of the evaluation: clean, fgsm, pgd20, pgd50-10, cw20-k50, pgd20@least, apgd-t, cwl2,
square.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fastdynat.attacks.apgd import parse_apgd
from fastdynat.attacks.ball_names import parse_normball
from fastdynat.attacks.base import Parser, Radii, Search
from fastdynat.attacks.catalog import ATTACKS
from fastdynat.attacks.fab import parse_fab
from fastdynat.attacks.nearest_names import parse_minimal
from fastdynat.attacks.square import parse_square
from fastdynat.errors import UserError, unknown_name

# Whoever adds an attack adds its parser here, and its names with one line each to `attack_names`.
PARSERS: tuple[Parser, ...] = (parse_normball, parse_minimal, parse_apgd, parse_fab, parse_square)


@dataclass(frozen=True)
class NamedAttack:
    """One column of an evaluation table; `search` is None for clean accuracy."""

    name: str
    search: Search | None = None


def parse_attack(
    name: str, *, eps: float, step_size: float, norm: str = "linf", known: Iterable[str] = ATTACKS
) -> NamedAttack:
    """The attack called `name`, one of `ATTACKS` or of their forms; radii in [0, 1] pixel units.

    With ``@`` and a target an image counts as robust if it still gets its true label, whether or not the
    target was reached.

    Args:
        known: names to suggest for one that is not.

    Raises:
        UserError: an unknown name (the nearest are suggested), zero steps or restarts, a norm that the attack
            has no form for.
    """
    name = name.strip().lower()
    if name == "clean":
        return NamedAttack(name)
    radii = Radii(eps=eps, step_size=step_size, norm=norm)
    for parse in PARSERS:
        if (search := parse(name, radii)) is not None:
            return NamedAttack(name, search)
    raise unknown_name("attack", name, list(known))


def parse_attacks(names: str, *, eps: float, step_size: float, norm: str = "linf") -> list[NamedAttack]:
    """`parse_attack` for a comma-separated list; duplicates are an error."""
    attacks = [
        parse_attack(n, eps=eps, step_size=step_size, norm=norm) for n in names.split(",") if n.strip()
    ]
    if not attacks:
        raise UserError(f"no attack named in {names!r}; for example clean,fgsm,pgd20,cw")
    seen = [a.name for a in attacks]
    if len(set(seen)) != len(seen):
        raise UserError(f"attacks named twice in {names!r}")
    return attacks
