"""Attacks by name: clean, fgsm, pgd50-10, cw20-k50, pgd20@least, apgd-t, cwl2, my_attack.py:MyAttack."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult, as_attack_result
from fastdynat.attack_engine.shrinking_batch import Tick, no_tick
from fastdynat.attacks.interface import Attack
from fastdynat.attacks.registry import CLEAN, Radii, find
from fastdynat.attacks.user_attacks import UserAttack, build_user_attack
from fastdynat.ops.image_draws import ImageDraws
from fastdynat.user_code import is_user_code

PACKAGE = __name__.partition(".")[0]


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

    @property
    def draws_per_image(self) -> bool:
        """Its result for an image does not depend on how the images are batched.

        True of the attacks of this package, and of classes derived from them that do not override the call.
        """
        attack = self.search.attack if isinstance(self.search, UserAttack) else self.search
        call = type(attack).__call__
        return attack is None or getattr(call, "__module__", "").partition(".")[0] == PACKAGE

    def run(
        self, ascent: Ascent, x: Tensor, labels: Tensor, *, draws: ImageDraws, tick: Tick = no_tick
    ) -> AttackResult:
        """Call `search`, which must not be None, on images `x` (N, C, H, W) and their `draws`.

        Other packages' attacks are given a generator seeded from the draws and the first image: their results
        depend on the batch.

        Raises:
            UserError: it returns neither a result nor images.
        """
        assert self.search is not None
        search: Any = self.search  # the interface of other packages' attacks promises generators only
        source = draws if self.draws_per_image else draws.generator()
        return as_attack_result(search(ascent, x, labels, generator=source, tick=tick), x, self.name)

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
