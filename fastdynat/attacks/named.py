"""Attack names of the evaluation: clean, fgsm, pgd20, pgd50-10, cw20-k50, pgd20@least, apgd-t, cwl2, square."""

from collections.abc import Iterable
from dataclasses import dataclass

from fastdynat.attacks.autoattack.apgd import parse_apgd
from fastdynat.attacks.autoattack.fab import parse_fab
from fastdynat.attacks.autoattack.square import parse_square
from fastdynat.attacks.minimal import parse_minimal
from fastdynat.attacks.normball_names import parse_normball
from fastdynat.attacks.search import Parser, Radii, Search
from fastdynat.errors import UserError, unknown_name

# Whoever adds an attack adds its parser here, and its names with one line each below.
PARSERS: tuple[Parser, ...] = (parse_normball, parse_minimal, parse_apgd, parse_fab, parse_square)
# What `fastdynat eval --list-attacks` prints, and what a misspelt name is compared with.
ATTACKS = {
    "clean": "no attack",
    "fgsm": "one step of size eps from the image (Goodfellow et al. 2015; torchattacks, foolbox, most tables)",
    "fgsm-rs": "one step of size eps from a uniform start (the FGSM of DYNAT's and Rice et al.'s evaluation)",
    "fgsm-small": "one step of --step-size from the image, hardly an attack (the FGSM of TRADES' and LBGAT's tables: 0.003)",
    "bim": "bimK, K = 10 unless given: PGD from the image itself, without a random start (Kurakin et al. 2017)",
    "mim": "mimK, K = 10 unless given: the same with momentum 1 over g / mean|g| (Dong et al. 2018); linf and l2",
    "pgd20": "pgdK: K steps on the cross-entropy from a uniform start (Madry et al. 2018); l1 is SLIDE; l0 counts pixels",
    "pgd50-10": "pgdK-R: with R restarts, each on what still stands; the last iterate of each counts",
    "cw": "cwK, K = 20 unless given: PGD on the margin of the logits, the C&W-inf of the literature; cwK-R",
    "cw20-k50": "cwK-kC: the same until the margin is C (GAIRAT, MAIL: 50)",
    "pgd20@second": "any of these @second, @least (likely other class), @random, @next, @all: towards a class, not away",
    "cwl2": "the nearest in L2 by Carlini & Wagner 2017: 9 runs of 1000 steps; cwl2-BxK; cwl2-1xK has a fixed c = 1",
    "deepfool": "the nearest in L2 by DeepFool (Moosavi-Dezfooli et al. 2016), 50 steps; deepfoolK",
    "deepfool-linf": "the same in L-inf",
    "sigmazero": "the fewest changed pixels by sigma-zero (Cina et al. 2024), 1000 steps; sigmazeroK",
    "apgd-ce": "APGD on the cross-entropy (Croce & Hein 2020), 100 steps; apgd-ceK, apgd-ceK-R",
    "apgd-dlr": "APGD on the difference of logits ratio",
    "apgd-t": "APGD on the targeted difference of logits ratio, towards nine classes",
    "fab": "FAB (Croce & Hein 2020) towards the nearest boundary, ended at eps; fab-R",
    "fab-t": "FAB towards nine classes; fab-t-R",
    "fab-min": "the nearest by FAB at any distance; fab-t-min",
    "square": "Square Attack (Andriushchenko et al. 2020), 5000 queries, no gradients; squareQ",
}


@dataclass(frozen=True)
class NamedAttack:
    """One column of an evaluation table; `search` is None for clean accuracy."""

    name: str
    search: Search | None = None


def parse_attack(name: str, *, eps: float, step_size: float, norm: str = "linf", known: Iterable[str] = ATTACKS) -> NamedAttack:
    """The attack called `name`, one of `ATTACKS` or of their forms; radii in [0, 1] pixel units.

    With ``@`` and a target an image counts as robust if it still gets its true label, whether or not the target was reached.

    Args:
        known: names to suggest for one that is not.

    Raises:
        UserError: an unknown name (the nearest are suggested), zero steps or restarts, a norm that the attack has no form for.
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
    attacks = [parse_attack(n, eps=eps, step_size=step_size, norm=norm) for n in names.split(",") if n.strip()]
    if not attacks:
        raise UserError(f"no attack named in {names!r}; for example clean,fgsm,pgd20,cw")
    seen = [a.name for a in attacks]
    if len(set(seen)) != len(seen):
        raise UserError(f"attacks named twice in {names!r}")
    return attacks
