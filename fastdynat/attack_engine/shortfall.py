"""The criterion by which an attack counts as weaker than another from the same starting points."""

# What `falls_short` allows.
LOSS_SHORTFALL = 0.01
SIGMAS = 2.0
NO_RISE = 1e-3


def falls_short(loss: float, *, reference: float, clean: float, error: float) -> bool:
    """Whether an attack reaches less than it should.

    Its loss falls short by more than 1 % of what the reference added to the clean loss, and by more than two
    standard errors. The rise, not the loss, is the scale, because the clean loss is no merit of the attack; a
    rise below 0.001 counts as 0.001, so that an attack that achieves nothing is not compared in rounding
    errors.

    Args:
        loss, reference, clean: means over the same images.
        error: standard error of ``loss - reference``, from the differences per image.
    """
    allowed = LOSS_SHORTFALL * max(reference - clean, NO_RISE)
    return not reference - loss <= max(allowed, SIGMAS * error)  # NaN falls short
