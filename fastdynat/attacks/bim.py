"""The basic iterative method (Kurakin et al. 2017, arXiv 1607.02533): PGD from the image itself."""

import re

from fastdynat.attacks.registry import Radii, register
from fastdynat.attacks.restarted_pgd import RestartedPGD, from_match


@register(
    r"bim(?P<steps>\d+)?(?:-k(?P<confidence>\d+(?:\.\d+)?))?(?:-(?P<restarts>\d+))?(?:@(?P<target>\w*))?",
    help={
        "bim": "bimK, K = 10 unless given: PGD from the image itself, without a random start (Kurakin et al. "
        "2017)"
    },
    half_precision=True,
)
def bim_attack(match: re.Match[str], radii: Radii) -> RestartedPGD:
    """PGD on the cross-entropy from the image."""
    return from_match(match, radii, start="none", steps=10)
