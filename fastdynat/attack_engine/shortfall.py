"""The criterion that calls an attack weaker than a reference from the same starting points."""

LOSS_SHORTFALL = 0.01  # share of the reference's rise of the loss
SIGMAS = 2.0  # standard errors
NO_RISE = 1e-3  # smaller rises of the loss count as this


def falls_short(loss: float, *, reference: float, clean: float, error: float) -> bool:
    """True if an attack is weaker than the reference.

    Its loss then falls short by more than 1 % of what the reference added to the clean loss, and by
    more than two standard errors. The scale is the rise of the loss, since the clean loss is no merit of the
    attack; a rise below 0.001 counts as 0.001, so that attacks without effect are not compared by rounding.

    Args:
        loss, reference, clean: means over the same images.
        error: standard error of ``loss - reference``, from the differences per image.
    """
    allowed = LOSS_SHORTFALL * max(reference - clean, NO_RISE)
    return not reference - loss <= max(allowed, SIGMAS * error)  # NaN falls short
