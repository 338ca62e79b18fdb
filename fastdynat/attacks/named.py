"""Attack names of the evaluation: clean, fgsm, pgd20, pgd50-10, cw20-k50, pgd20@least."""

from dataclasses import dataclass

from fastdynat.attacks.normball_names import EXAMPLES as NORMBALL
from fastdynat.attacks.normball_names import parse_normball
from fastdynat.attacks.search import Parser, Radii, Search
from fastdynat.errors import UserError, unknown_name

# Whoever adds an attack adds its parser here, and its name to the names that a misspelt one is compared with.
PARSERS: tuple[Parser, ...] = (parse_normball,)
_KNOWN = ("clean", *NORMBALL)


@dataclass(frozen=True)
class NamedAttack:
    """One column of an evaluation table; `search` is None for clean accuracy."""

    name: str
    search: Search | None = None


def parse_attack(name: str, *, eps: float, step_size: float, norm: str = "linf") -> NamedAttack:
    """The attack called `name`, radii in [0, 1] pixel units.

    - ``clean``: no attack.
    - ``fgsm``: one step of size eps from the image (Goodfellow et al. 2015; torchattacks, foolbox, most tables). Three attacks
      of very different strength are published as "FGSM"; this is the original, the other two have names of their own:
    - ``fgsm-rs``: one step of size eps from a uniform start (DYNAT's and Rice et al.'s evaluation; the training attack of Wong
      et al. 2020 with 1 in place of 1.25 eps);
    - ``fgsm-small``: one step of size `step_size` from the image, hardly an attack. The "FGSM" rows near clean accuracy in the
      tables of TRADES and LBGAT can only be this, with 0.003.
    - ``bimK``: K steps of `step_size` from the image, 10 unless given (Kurakin et al. 2017): PGD without its random start.
    - ``mimK``: the same with momentum 1 over ``g / mean|g|`` (Dong et al. 2018), 10 unless given; L-inf and L2.
    - ``pgdK``, ``pgdK-R``: K steps of `step_size` on the cross-entropy from a uniform start (Madry et al. 2018), R restarts.
      L1: along the 1 % largest gradient entries (SLIDE, Tramer & Boneh 2019); L0: `eps` is how many pixels may change, and the
      start is the image (Croce & Hein 2019).
    - ``cwK``, ``cwK-R``: the same on the margin ``max_{k != y} z_k - z_y``, K = 20 unless given: the "C&W-inf" of the
      adversarial-training literature (DYNAT, TRADES, MART). ``cwK-kC``, ``cwK-kC-R``: an image is driven on only until its
      margin is C, that is ``max(z_y - max_{k != y} z_k + C, 0)`` is descended (GAIRAT, MAIL: ``cw20-k50``).

    The last iterate of each run counts, not its best one; a restart is made only for images that no run before it has broken.

    Any of them but clean with ``@`` and a target drives each image towards a class in place of away from its own: ``@second``
    and ``@least``, the most and the least likely other class; ``@random``; ``@next``, label + 1 mod K; ``@all``, every other
    class in turn, the likeliest first, as long as the image stands. An image counts as robust if it still gets its true
    label, whether or not the target was reached.

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
