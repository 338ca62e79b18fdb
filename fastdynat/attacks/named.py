"""Attack names of the evaluation: clean, fgsm, pgd20, pgd50-10, cw, cw30."""

from collections.abc import Iterable
from dataclasses import dataclass

from fastdynat.attacks.pgd import parse_pgd
from fastdynat.attacks.search import Parser, Radii, Search
from fastdynat.errors import UserError, unknown_name

# Whoever adds an attack adds its parser here, and its names with one line each below.
PARSERS: tuple[Parser, ...] = (parse_pgd,)
# What `fastdynat eval --list-attacks` prints, and what a misspelt name is compared with.
ATTACKS = {
    "clean": "no attack",
    "fgsm": "one step of size eps along the gradient's sign, from the image (Goodfellow et al. 2015)",
    "pgd20": "pgdK or pgdK-R: K steps on the cross-entropy from a uniform start, R restarts (Madry et al. 2018)",
    "pgd50-10": "pgdK-R with 50 steps and 10 restarts",
    "cw": "cwK or cwK-R, K = 20 unless given: the same on the margin of the logits (the C&W-inf of the literature)",
}


@dataclass(frozen=True)
class NamedAttack:
    """One column of an evaluation table; `search` is None for clean accuracy."""

    name: str
    search: Search | None = None


def parse_attack(name: str, *, eps: float, step_size: float, norm: str = "linf", known: Iterable[str] = ATTACKS) -> NamedAttack:
    """The attack called `name`, radii in [0, 1] pixel units. `known`: names to suggest for one that is not.

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
    radii = Radii(eps=eps, step_size=step_size, norm=norm)
    for parse in PARSERS:
        if (search := parse(name, radii)) is not None:
            return NamedAttack(name, search)
    raise unknown_name("attack", name, known)


def parse_attacks(names: str, *, eps: float, step_size: float, norm: str = "linf") -> list[NamedAttack]:
    """`parse_attack` for a comma-separated list; duplicates are an error."""
    attacks = [parse_attack(n, eps=eps, step_size=step_size, norm=norm) for n in names.split(",") if n.strip()]
    if not attacks:
        raise UserError(f"no attack named in {names!r}; for example clean,fgsm,pgd20,cw")
    seen = [a.name for a in attacks]
    if len(set(seen)) != len(seen):
        raise UserError(f"attacks named twice in {names!r}")
    return attacks
