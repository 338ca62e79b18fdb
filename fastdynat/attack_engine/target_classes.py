"""Target classes of targeted attacks."""

import torch
from torch import Tensor

from fastdynat.errors import unknown_name
from fastdynat.ops.image_draws import ImageDraws, Randomness

RULES = ("least", "random", "second", "next", "all")


def check_rule(rule: str) -> str:
    """`rule`, or UserError for an unknown one."""
    if rule not in RULES:
        raise unknown_name("target", rule, RULES)
    return rule


def target_classes(rule: str, logits: Tensor, labels: Tensor, *, generator: Randomness = None) -> Tensor:
    """(N, T) int64, never the label: the target classes of each image, in order.

    Args:
        rule: "second" and "least": the most and least likely class other than the label; "random": uniform
            over the others; "next": ``label + 1 mod K`` (the convention of JSMA and C&W); "all": the T = K -
            1 others, most likely first.
        logits: (N, K) of the network on the images.
        labels: (N,) int64.
    """
    classes = logits.shape[1]
    if check_rule(rule) == "next":
        return ((labels + 1) % classes)[:, None]
    if rule == "random":
        if isinstance(generator, ImageDraws):
            drawn = generator.integers(classes - 1)
        else:
            drawn = torch.randint(classes - 1, labels.shape, generator=generator, device=labels.device)
        return (drawn + (drawn >= labels))[:, None]
    # NaN would sort first; the label goes last.
    behind = logits.nan_to_num(0.0).scatter(1, labels[:, None], float("-inf"))
    others = behind.argsort(dim=1, descending=True, stable=True)[:, :-1]
    return {"second": others[:, :1], "least": others[:, -1:], "all": others}[rule]
