"""Attack names of the evaluation: clean, fgsm, pgd20, pgd50-10, cw, cw30, cwl2, deepfool, sigmazero."""

from dataclasses import dataclass

from fastdynat.attacks.minimal import parse_minimal
from fastdynat.attacks.pgd import parse_pgd
from fastdynat.attacks.search import Parser, Radii, Search
from fastdynat.errors import UserError, unknown_name

# Whoever adds an attack adds its parser here, and its name to the names that a misspelt one is compared with.
PARSERS: tuple[Parser, ...] = (parse_pgd, parse_minimal)
_KNOWN = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "pgd50-10", "cw", "cw20", "cwl2", "deepfool", "sigmazero")


@dataclass(frozen=True)
class NamedAttack:
    """One column of an evaluation table; `search` is None for clean accuracy."""

    name: str
    search: Search | None = None


def parse_attack(name: str, *, eps: float, step_size: float, norm: str = "linf") -> NamedAttack:
    """The attack called `name`, radii in [0, 1] pixel units.

    - ``clean``;
    - ``fgsm``: one step of size eps from the image, no random start (Goodfellow et al. 2015);
    - ``pgdK``, ``pgdK-R``: K steps of `step_size` on the cross-entropy, uniform start, R restarts, last iterate;
    - ``cwK``, ``cwK-R``: the same on the margin ``max_{k != y} z_k - z_y``, K = 20 unless given (the "C&W-inf" of the
      adversarial-training literature);
    - ``cwl2``, ``cwl2-BxK``: the nearest by the full L2 attack of Carlini & Wagner, B = 9 runs of K = 1000 steps unless
      given; B = 1 is a fixed c = 1;
    - ``deepfool``, ``deepfool-linf``, ``deepfoolK``: the nearest in L2 or L-inf by DeepFool, K = 50 steps unless given;
    - ``sigmazero``, ``sigmazeroK``: the fewest changed values by sigma-zero, K = 1000 steps unless given.

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
    raise unknown_name("attack", name, _KNOWN)


def parse_attacks(names: str, *, eps: float, step_size: float, norm: str = "linf") -> list[NamedAttack]:
    """`parse_attack` for a comma-separated list; duplicates are an error."""
    attacks = [parse_attack(n, eps=eps, step_size=step_size, norm=norm) for n in names.split(",") if n.strip()]
    if not attacks:
        raise UserError(f"no attack named in {names!r}; for example clean,fgsm,pgd20,cw")
    seen = [a.name for a in attacks]
    if len(set(seen)) != len(seen):
        raise UserError(f"attacks named twice in {names!r}")
    return attacks
