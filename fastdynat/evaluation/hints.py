"""Hint about a clean accuracy that is no better than guessing."""

from typing import Any

SURE = 0.05  # probability of so few hits by chance


def clean_hint(record: dict[str, Any]) -> str | None:
    """A hint why the network of `record` may fail on clean images; None if nothing is suspicious.

    Accuracy below chance is suspicious for every network: an untrained one guesses. Accuracy at chance is
    suspicious for a foreign network, whose classes may be in another order than the data's.
    """
    clean = next((a for a in record["attacks"] if a["attack"] == "clean"), None)
    classes = len(record["class_names"])
    if clean is None or classes < 2:
        return None
    chance, images = 1 / classes, clean["images"]
    none_right = clean["correct"] == 0 and (1 - chance) ** images < SURE
    below = none_right or clean["ci"][1] < chance / 2
    at = record["method"] is None and clean["ci"][0] <= chance and clean["accuracy"] < 2 * chance
    if not below and not at:
        return None
    how = "below" if below else "no better than"
    order = ", ".join(repr(name) for name in record["class_names"][:3]) + (", ..." if classes > 3 else "")
    return (
        f"warning: clean accuracy is {100 * clean['accuracy']:.2f} %, {how} chance ({100 * chance:.3g} %), "
        "so robust accuracies say nothing: check that the network numbers its classes from 0 in the data's "
        f"order ({order}) and takes RGB images in [0, 1]"
    )
