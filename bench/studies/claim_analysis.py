"""The hypotheses of the study, and what is said about each; written down before the first run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from claim_design import SEEDS
from claim_statistics import Estimate, holm, paired

SMALLEST = 1.0  # points: the smallest effect of interest
LEVEL = 0.05
# Correctness (N,) of each image under PGD-20 by (arm, seed, checkpoint).
Bits = Mapping[tuple[str, int, str], np.ndarray]
Contrast = Callable[[Bits, int], np.ndarray]


def difference(better: str, worse: str, checkpoint: str) -> Contrast:
    """Robust accuracy of one arm minus that of another."""

    def contrast(bits: Bits, seed: int) -> np.ndarray:
        first, second = bits[better, seed, checkpoint], bits[worse, seed, checkpoint]
        return first.astype(int) - second.astype(int)

    return contrast


def gap(arm: str) -> Contrast:
    """Best minus last: robust overfitting."""

    def contrast(bits: Bits, seed: int) -> np.ndarray:
        return bits[arm, seed, "best"].astype(int) - bits[arm, seed, "last"].astype(int)

    return contrast


def gap_difference(larger: str, smaller: str) -> Contrast:
    """How much larger one arm's robust overfitting is than another's."""
    return lambda bits, seed: gap(larger)(bits, seed) - gap(smaller)(bits, seed)


def cells(signs: Mapping[str, float]) -> Contrast:
    """A linear contrast of the last checkpoints of arms."""

    def contrast(bits: Bits, seed: int) -> np.ndarray:
        parts = [sign * bits[arm, seed, "last"].astype(float) for arm, sign in signs.items()]
        return np.sum(parts, axis=0)

    return contrast


# Label of the update, label of the attack: DYNAT (dynamic, dynamic), dynamic-update (dynamic, true),
# dynamic-attack (true, dynamic), true-labels (true, true).
LABEL_EFFECT = {"dynat": 0.5, "dynamic-update": 0.5, "dynamic-attack": -0.5, "true-labels": -0.5}
ATTACK_EFFECT = {"dynat": 0.5, "dynamic-update": -0.5, "dynamic-attack": 0.5, "true-labels": -0.5}
LABEL_MINUS_ATTACK = {arm: LABEL_EFFECT[arm] - ATTACK_EFFECT[arm] for arm in LABEL_EFFECT}
# Only arms whose weight is not 0 are needed; the text of each says what is expected to be above 0.
PRIMARY: dict[str, tuple[str, Contrast]] = {
    "H1-best": ("DYNAT - Madry, equal epochs, best", difference("dynat", "madry", "best")),
    "H1-last": ("DYNAT - Madry, equal epochs, last", difference("dynat", "madry", "last")),
    "H2": ("Gap of Madry - gap of DYNAT, equal epochs", gap_difference("madry", "dynat")),
    "H3-best": ("DYNAT - Madry, equal seconds, best", difference("dynat", "madry-seconds", "best")),
    "H3-last": ("DYNAT - Madry, equal seconds, last", difference("dynat", "madry-seconds", "last")),
    "H3-gap": ("Gap of Madry - gap of DYNAT, equal seconds", gap_difference("madry-seconds", "dynat")),
    "H4": (
        "Dynamic label in the update - dynamic label in the attack, last",
        cells({arm: weight for arm, weight in LABEL_MINUS_ATTACK.items() if weight}),
    ),
    "H5-trades": ("DYNAT - TRADES, equal epochs, last", difference("dynat", "trades", "last")),
    "H5-lbgat": ("DYNAT - LBGAT, equal epochs, last", difference("dynat", "lbgat", "last")),
}
# Without a test.
DESCRIBED: dict[str, tuple[str, Contrast]] = {
    **{
        f"gap-{arm}": (f"Gap of {name}", gap(arm))
        for arm, name in (
            ("madry", "Madry"),
            ("dynat", "DYNAT"),
            ("trades", "TRADES"),
            ("lbgat", "LBGAT"),
            ("madry-seconds", "Madry, equal seconds"),
        )
    },
    "label": ("Effect of dynamic labels in the update, last", cells(LABEL_EFFECT)),
    "attack": ("Effect of dynamic labels in the attack, last", cells(ATTACK_EFFECT)),
    "interaction": (
        "Interaction of the two, last",
        cells({"dynat": 1.0, "dynamic-update": -1.0, "dynamic-attack": -1.0, "true-labels": 1.0}),
    ),
    "H5-trades-best": ("DYNAT - TRADES, equal epochs, best", difference("dynat", "trades", "best")),
    "H5-lbgat-best": ("DYNAT - LBGAT, equal epochs, best", difference("dynat", "lbgat", "best")),
}
NEEDS_GAP = {"H2": "gap-madry", "H3-gap": "gap-madry-seconds"}


@dataclass(frozen=True)
class Finding:
    """A hypothesis, its estimate, and what is said about it."""

    name: str
    text: str
    seeds: int
    estimate: Estimate | None
    adjusted_p: float | None
    verdict: str

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def estimate(bits: Bits, contrast: Contrast, seeds: Sequence[int] = SEEDS) -> tuple[int, Estimate | None]:
    """The number of seeds that have all that `contrast` needs; the estimate where all seeds have."""
    found = []
    for seed in seeds:
        try:
            found.append(contrast(bits, seed))
        except KeyError:
            continue
    return len(found), paired(np.stack(found)) if len(found) == len(seeds) else None


def findings(bits: Bits, seeds: Sequence[int] = SEEDS) -> list[Finding]:
    """All primary hypotheses, corrected together, then what is only described.

    Hypotheses without enough runs count as p = 1 in Holm's correction: no p-value rises as runs come in.
    """
    estimates = {name: estimate(bits, contrast, seeds) for name, (_, contrast) in PRIMARY.items()}
    gaps = {name: estimate(bits, DESCRIBED[gap][1], seeds)[1] for name, gap in NEEDS_GAP.items()}
    adjusted = holm({name: 1.0 if found is None else found.p for name, (_, found) in estimates.items()})
    result = []
    for name, (count, found) in estimates.items():
        own = None if found is None else adjusted[name]
        said = verdict(found, own, overfits=name not in NEEDS_GAP or overfits(gaps[name]))
        result.append(Finding(name, PRIMARY[name][0], count, found, own, said))
    for name, (text, contrast) in DESCRIBED.items():
        count, found = estimate(bits, contrast, seeds)
        result.append(Finding(name, text, count, found, None, "described"))
    return result


def overfits(found: Estimate | None) -> bool:
    """True if there is robust overfitting that could be reduced."""
    return found is not None and found.mean >= SMALLEST and found.ci[0] > 0


def verdict(found: Estimate | None, adjusted: float | None, *, overfits: bool = True) -> str:
    """What is said about a hypothesis "the effect is above 0"."""
    if found is None or adjusted is None:
        return "not enough runs yet"
    if not overfits:
        return "not testable: Madry does not overfit"
    if found.mean >= SMALLEST and adjusted < LEVEL and found.same_sign:
        return "holds"
    if found.mean < 0 and adjusted < LEVEL and found.same_sign:
        return "the opposite holds"
    if found.ci[1] < SMALLEST:
        return "does not hold"
    return "undecided"
