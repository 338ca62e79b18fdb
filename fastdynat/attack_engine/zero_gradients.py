"""What to say of images that an attack by gradients did not attack, because theirs were zero or not
finite.
"""

import torch

NOTHING_ELSE = "look for saturation, rounding or NaN in the network, and attack it by square, which needs no gradients, or adaptively"


def vanished(zero: int, gradients: int, remedy: str = NOTHING_ELSE, which: str = "") -> str:
    """The sentence for `zero` of the `gradients` of an attack."""
    return (
        f"{zero} of {gradients} gradients{which} were zero or not finite in every pixel: there the attack did not move these "
        f"images; {remedy}"
    )


def remedy_for(dtype: torch.dtype | None, rescale: bool, *, exact: bool = True) -> str:
    """What may help an attack in half precision `dtype` (None: in the images' own), with or without the
    rescale.

    exact: images do not mix, so that a rescale is possible.
    """
    if dtype is torch.float16:
        return "amp=torch.bfloat16, or no amp, does not overflow; " + NOTHING_ELSE
    if dtype is torch.bfloat16:
        return (
            "without amp small changes of an image are not rounded away; where that does not help, "
            + NOTHING_ELSE
        )
    if exact and not rescale and dtype is None:
        return f"rescale=True keeps a confident network's from underflow; where that does not help, {NOTHING_ELSE}"
    return NOTHING_ELSE
