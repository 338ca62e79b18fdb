"""Which class a targeted attack drives each image towards."""

import torch
from torch import Tensor

from fastdynat.errors import unknown_name

RULES = ("least", "random", "second", "next", "all")


def check_rule(rule: str) -> str:
    """`rule`, or UserError where there is none of this name."""
    if rule not in RULES:
        raise unknown_name("target", rule, RULES)
    return rule


def target_classes(
    rule: str, logits: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """(N, T) int64, never the label: the classes to be tried on each image, in this order.

    Args:
        rule: "second" and "least": the most and the least likely class but the label; "random": uniform over
            the others; "next": ``label + 1 mod K`` (the convention of JSMA and C&W); "all": the T = K - 1
            others, the likeliest first.
        logits: (N, K) of the network on the images.
        labels: (N,) int64.
    """
    classes = logits.shape[1]
    if check_rule(rule) == "next":
        return ((labels + 1) % classes)[:, None]
    if rule == "random":
        drawn = torch.randint(classes - 1, labels.shape, generator=generator, device=labels.device)
        return (drawn + (drawn >= labels))[:, None]
    # A NaN is sorted before everything else; the label is put behind everything.
    behind = logits.nan_to_num(0.0).scatter(1, labels[:, None], float("-inf"))
    others = behind.argsort(dim=1, descending=True, stable=True)[:, :-1]
    return {"second": others[:, :1], "least": others[:, -1:], "all": others}[rule]
