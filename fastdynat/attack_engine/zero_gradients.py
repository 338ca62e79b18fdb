"""Messages about images that an attack cannot move, because their gradients are zero or not finite."""

import torch

NOTHING_ELSE = (
    "look for saturation, rounding or NaN in the network, "
    "and attack it with square, which needs no gradients, or with an adaptive attack"
)


def zero_gradient_message(zero: int, gradients: int, remedy: str = NOTHING_ELSE, which: str = "") -> str:
    """The message for `zero` of the `gradients` of an attack. which: " (of an earlier call)", or ""."""
    return (
        f"{zero} of {gradients} gradients{which} were zero or not finite in every pixel: "
        f"those steps did not move their images; {remedy}"
    )


def zero_gradient_remedy(dtype: torch.dtype | None, rescale: bool, *, exact: bool = True) -> str:
    """The remedy for zero gradients in half precision `dtype` (None: full precision).

    rescale: the attack rescales gradients. exact: images do not mix, so that it could.
    """
    if dtype is torch.float16:
        return "amp=torch.bfloat16, or no amp, does not overflow; " + NOTHING_ELSE
    if dtype is torch.bfloat16:
        return (
            "without amp, small changes of an image are not rounded away; if that does not help, "
            + NOTHING_ELSE
        )
    if exact and not rescale and dtype is None:
        return (
            "rescale=True keeps a confident network's gradients from underflow; "
            f"if that does not help, {NOTHING_ELSE}"
        )
    return NOTHING_ELSE
