"""Refusal of smoothed and mixed labels with a method whose losses do not take them."""

from typing import Any

from fastdynat.errors import UserError
from fastdynat.methods import Method

OWN = "a method of your own computes its losses by Method.fit, and its goal by Method.true_goal, and sets"


def check_label_use(
    method: Method[Any], *, smoothing: float = 0.0, mixing: str = "", labelled: int | None = None
) -> None:
    """Raise UserError where `method` would ignore the smoothing, or cannot train on mixed labels.

    Args:
        smoothing: s of --label-smoothing; 0 is none.
        mixing: what mixes images and their labels, in words, as "mixup 0.8"; empty if nothing does.
        labelled: images with labels, where the others have none.
    """
    if smoothing > 0 and not method.smooths_labels:
        here = "with these options, " if type(method).smooths_labels else ""
        raise UserError(
            f"label_smoothing {smoothing:g}: {here}method {method.name} has no cross-entropy with labels "
            f"to smooth; leave it out{_remedy(method, 'smooths_labels')}"
        )
    if mixing and not method.takes_mixed_labels:
        raise UserError(
            f"{mixing}: method {method.name} needs one class per image; "
            f"leave it out{_remedy(method, 'takes_mixed_labels')}"
        )
    if mixing and labelled is not None:
        raise UserError(
            f"{mixing}: with labelled {labelled}, images without a label have none to mix; "
            "leave one of them out"
        )


def _remedy(method: Method[Any], attribute: str) -> str:
    own = not type(method).__module__.startswith("fastdynat.methods.")
    return f" ({OWN} {attribute} = True)" if own else ""
