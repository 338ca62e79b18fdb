"""What a clean accuracy that is no better than guessing suggests."""

from typing import Any

SURE = 0.05  # of seeing so few hits by chance


def clean_hint(record: dict[str, Any]) -> str | None:
    """In words, why `record`'s network may be wrong about nearly all images as they are; None where nothing
    is odd.

    Below chance is odd for every network: one that has learnt nothing guesses. At chance is odd for one that
    was not trained here, whose classes nobody has compared with the data's.
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
        f"warning: clean accuracy is {100 * clean['accuracy']:.2f} %, {how} chance ({100 * chance:.3g} %), so robust "
        f"accuracies say nothing: see that the network numbers its classes from 0 in the data's order ({order}) and takes RGB "
        "images in [0, 1]"
    )
