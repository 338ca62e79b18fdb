"""C&W-inf of the adversarial training literature: PGD on the margin of the logits, ``cwK``."""

import re

from fastdynat.attacks.registry import Radii, register
from fastdynat.attacks.restarted_pgd import RestartedPGD, from_match


@register(
    r"cw(?P<steps>\d+)?(?:-k(?P<confidence>\d+(?:\.\d+)?))?(?:-(?P<restarts>\d+))?(?:@(?P<target>\w*))?",
    help={
        "cw": "cwK, K = 20 unless given: PGD on the margin of the logits, the C&W-inf of the literature; "
        "cwK-R",
        "cw20-k50": "cwK-kC: the same until the margin is C (GAIRAT, MAIL: 50)",
    },
    half_precision=True,
)
def cw_attack(match: re.Match[str], radii: Radii) -> RestartedPGD:
    """PGD on the margin; under L0 it starts at the image."""
    start = "none" if radii.norm == "l0" else "uniform"
    return from_match(match, radii, start=start, steps=20, loss="margin")
