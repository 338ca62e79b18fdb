"""Attack names of the evaluation: clean, fgsm, pgd20, pgd50-10, cw, cw30."""

import re
from dataclasses import dataclass

from fastdynat.attacks.ascent import PGDSpec
from fastdynat.attacks.goal import AttackLoss
from fastdynat.errors import UserError, unknown_name

_PATTERN = re.compile(r"(?P<kind>pgd|cw)(?P<steps>\d+)?(?:-(?P<restarts>\d+))?")
_KNOWN = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "pgd50-10", "cw", "cw20")


@dataclass(frozen=True)
class NamedAttack:
    """One column of an evaluation table; `spec` is None for clean accuracy."""

    name: str
    loss: AttackLoss = "ce"
    spec: PGDSpec | None = None


def parse_attack(name: str, *, eps: float, step_size: float, norm: str = "linf") -> NamedAttack:
    """The attack called `name`, radii in [0, 1] pixel units.

    - ``clean``;
    - ``fgsm``: one step of size eps from the image, no random start (Goodfellow et al. 2015);
    - ``pgdK``, ``pgdK-R``: K steps of `step_size` on the cross-entropy, uniform start, R restarts, last iterate;
    - ``cwK``, ``cwK-R``: the same on the margin ``max_{k != y} z_k - z_y``, K = 20 unless given (the "C&W-inf" of the
      adversarial-training literature).

    Raises:
        UserError: an unknown name (the nearest are suggested), or zero steps or restarts.
    """
    name = name.strip().lower()
    if name == "clean":
        return NamedAttack(name)
    if name == "fgsm":
        return NamedAttack(name, spec=PGDSpec(eps, eps, steps=1, norm=norm, start="none"))
    match = _PATTERN.fullmatch(name)
    if match is None or (match["kind"] == "pgd" and match["steps"] is None):
        raise unknown_name("attack", name, _KNOWN)
    steps, restarts = int(match["steps"] or 20), int(match["restarts"] or 1)
    if steps < 1 or restarts < 1:
        raise UserError(f"attack {name!r}: steps and restarts must be >= 1")
    loss: AttackLoss = "margin" if match["kind"] == "cw" else "ce"
    return NamedAttack(name, loss, PGDSpec(eps, step_size, steps, norm=norm, restarts=restarts))


def parse_attacks(names: str, *, eps: float, step_size: float, norm: str = "linf") -> list[NamedAttack]:
    """`parse_attack` for a comma-separated list; duplicates are an error."""
    attacks = [parse_attack(n, eps=eps, step_size=step_size, norm=norm) for n in names.split(",") if n.strip()]
    if not attacks:
        raise UserError(f"no attack named in {names!r}; for example clean,fgsm,pgd20,cw")
    seen = [a.name for a in attacks]
    if len(set(seen)) != len(seen):
        raise UserError(f"attacks named twice in {names!r}")
    return attacks
