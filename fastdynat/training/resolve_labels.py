"""Refusal of smoothed and mixed labels with a method whose losses do not take them."""

from typing import Any, Literal

from fastdynat.errors import UserError
from fastdynat.methods import Method

HALVES = {"inner", "outer", "awp_loss"}
OWN = "a class of your own that takes its losses from Method.fit and its goal from Method.true_goal sets"


def check_label_use(
    method: Method[Any], *, smoothing: float = 0.0, mixing: str = "", labelled: int | None = None
) -> None:
    """Raise UserError if `method` would ignore the smoothing, or cannot train on mixed labels.

    Args:
        smoothing: s of --label-smoothing; 0 is none.
        mixing: what mixes images and their labels, in words, as "mixup 0.8"; empty if nothing does.
        labelled: images with labels, where the others have none.
    """
    if smoothing > 0:
        lacks = "has no cross-entropy with labels to smooth"
        _require(method, "smooths_labels", f"label_smoothing {smoothing:g}", lacks)
    if mixing:
        _require(method, "takes_mixed_labels", mixing, "needs one class per image")
    if mixing and labelled is not None:
        raise UserError(
            f"{mixing}: with labelled {labelled}, unlabelled images have no label to mix; "
            "leave one of them out"
        )


def _require(
    method: Method[Any], attribute: Literal["smooths_labels", "takes_mixed_labels"], asked: str, lacks: str
) -> None:
    if _says(type(method), attribute) and getattr(method, attribute):
        return
    kind = type(method)
    if not kind.__module__.startswith("fastdynat.methods."):
        raise UserError(
            f"{asked}: method {method.name} does not declare that it supports it; leave it out ({OWN} "
            f"{attribute} = True)"
        )
    here = "with these options, " if getattr(kind, attribute) else ""
    raise UserError(f"{asked}: {here}method {method.name} {lacks}; leave it out")


def _says(kind: type[Method[Any]], attribute: str) -> bool:
    """True if `kind` has `attribute` from a class that knows its halves: none below defines another one."""
    for cls in kind.__mro__:
        if attribute in vars(cls):
            return True
        if HALVES & vars(cls).keys():
            return False
    return False
