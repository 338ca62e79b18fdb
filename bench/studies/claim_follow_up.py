"""A question that the results raised, and the runs that answer it; not part of the plan.

Without augmentation DYNAT overfits less than Madry. But its attack also starts elsewhere, and its batch norm
also sees clean images; only the same method with true labels tells what the labels do.
"""

from claim_analysis import Bits, Finding, difference, estimate, gap
from claim_design import SEEDS, Block, rows

FOLLOW_UP = Block("follow-up", rows(("true-labels",), augment="none"))
CONTRASTS = {
    "labels-best": ("DYNAT - the same with true labels, best", difference("dynat", "true-labels", "best")),
    "labels-last": ("DYNAT - the same with true labels, last", difference("dynat", "true-labels", "last")),
    "rest-best": ("The same with true labels - Madry, best", difference("true-labels", "madry", "best")),
    "rest-last": ("The same with true labels - Madry, last", difference("true-labels", "madry", "last")),
    "gap-true-labels": ("Gap of DYNAT with true labels", gap("true-labels")),
}


def follow_up_findings(bits: Bits) -> list[Finding]:
    """The contrasts over the seeds that there are, from two on; none has a test.

    bits: of the runs without augmentation, those of the plan among them.
    """
    done = [seed for seed in SEEDS if ("true-labels", seed, "last") in bits]
    found = []
    for name, (text, contrast) in CONTRASTS.items():
        count, own = estimate(bits, contrast, done) if len(done) > 1 else (len(done), None)
        found.append(Finding(name, text, count, own, None, ""))
    return found
