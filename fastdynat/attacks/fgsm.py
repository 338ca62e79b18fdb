"""The fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572): one step of PGD."""

import re

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks.registry import Radii, register
from fastdynat.attacks.restarted_pgd import RestartedPGD, target_rule


@register(
    r"fgsm(?P<variant>-rs|-small)?(?:@(?P<target>\w*))?",
    help={
        "fgsm": "one step of size eps from the image (Goodfellow et al. 2015; torchattacks, foolbox, most "
        "tables)",
        "fgsm-rs": "one step of size eps from a uniform start (the FGSM of DYNAT's and Rice et al.'s "
        "evaluation)",
        "fgsm-small": "one step of --step-size from the image, a weak attack (the FGSM of TRADES' and "
        "LBGAT's tables: 0.003)",
    },
    norms=("linf", "l2", "l1"),  # under l0 one step has no length
    half_precision=True,
)
def fgsm_attack(match: re.Match[str], radii: Radii) -> RestartedPGD:
    """One step on the cross-entropy."""
    size = radii.step_size if match["variant"] == "-small" else radii.eps
    start = "uniform" if match["variant"] == "-rs" else "none"
    spec = PGDSpec(radii.eps, size, steps=1, norm=radii.norm, start=start)
    return RestartedPGD("ce", spec, target_rule(match))
