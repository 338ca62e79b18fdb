"""Attacks by name: clean, fgsm, pgd50-10, cw20-k50, pgd20@least, apgd-t, cwl2, my_attack.py:MyAttack."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastdynat.attacks.interface import Attack
from fastdynat.attacks.registry import CLEAN, Radii, find
from fastdynat.attacks.user_attacks import build_user_attack
from fastdynat.user_code import is_user_code


@dataclass(frozen=True)
class NamedAttack:
    """One column of an evaluation table.

    Attributes:
        search: the attack; None for clean accuracy.
        half_precision: the attack was shown to be as strong in half precision.
    """

    name: str
    search: Attack | None = None
    half_precision: bool = field(default=False, compare=False)

    def check_classes(self, classes: int) -> None:
        """Raise UserError where the attack is not defined for so few classes."""
        check = getattr(self.search, "check_classes", None)
        if check is not None:
            check(classes)


def parse_attack(
    name: str, *, eps: float, step_size: float, norm: str = "linf", known: Iterable[str] = ()
) -> NamedAttack:
    """The attack called `name`, of the registry or of a user's file; radii in [0, 1] pixel units.

    With ``@`` and a target an image counts as robust if it still gets its true label, whether or not the
    target was reached.

    Args:
        known: names to suggest beside those of the registry.

    Raises:
        UserError: an unknown name (the nearest are suggested), zero steps or restarts, a norm that the attack
            has no form for, a user's file or class that is no attack.
    """
    name = name.strip()
    radii = Radii(eps=eps, step_size=step_size, norm=norm)
    if is_user_code(name):
        attack, half_precision = build_user_attack(name, radii)
        return NamedAttack(attack.name, attack, half_precision)
    name = name.lower()
    if name == CLEAN:
        return NamedAttack(name, half_precision=True)
    entry, match = find(name, known)
    return NamedAttack(name, entry.build(match, radii), entry.half_precision)
