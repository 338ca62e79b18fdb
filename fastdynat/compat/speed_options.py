"""Keyword arguments of the attacks and losses that set how they are computed."""

import functools
import types
from collections.abc import Hashable
from typing import Any, TypedDict

import torch

from fastdynat.models.logits import Output


class Speed(TypedDict, total=False):
    """Keyword-only arguments of every attack.

    Attributes:
        amp: True runs the network in the precision that is fast on this machine: bfloat16, float16 or, with a
            warning, float32. A dtype forces that precision.
        compile: True compiles gradients with torch.compile where that is faster, measured at the first call;
            a string names a mode and forces compilation. A model made by torch.compile is treated as if True.
        channels_last: run the network in channels-last memory format; None chooses what is fast on this
            machine.
        graphs: replay the whole attack as a CUDA graph per batch shape; None is on for a GPU.
        fold: fold batch norm into the layers before it.
        winograd: Winograd's algorithm for 3x3 convolutions where it is faster, in float32 on the CPU; rounds
            about five times as coarsely.
        output: selects the logits if the model returns more than them: a key or attribute, an index, or a
            function of the output. A key or index leaves a plain tensor as it is.
        rescale: multiply each image's gradient by the power of two that brings it to order one, so that the
            gradient of a confident network does not underflow, even in float32 (logit gaps above about 104).
            Only in eval mode. None does so in half precision only.
    """

    amp: bool | torch.dtype
    compile: bool | str
    channels_last: bool | None
    graphs: bool | None
    fold: bool
    winograd: bool
    output: Output | None
    rescale: bool | None


def check_speed(caller: str, speed: Speed) -> None:
    """Raise TypeError for a keyword that `caller` does not take, such as a misspelt one."""
    unknown = [key for key in speed if key not in Speed.__annotations__]
    if unknown:
        raise TypeError(
            f"{caller}() got an unexpected keyword argument {unknown[0]!r}; besides the original arguments "
            f"it takes {', '.join(Speed.__annotations__)}"
        )


def hashable(speed: Speed) -> Hashable:
    """`speed` as a dictionary key, for as long as what it names is kept alive beside the key."""
    others = tuple(sorted((key, value) for key, value in speed.items() if key != "output"))
    return others, _same_when_rewritten(speed.get("output"))


def _same_when_rewritten(output: Any) -> Hashable:
    """A key that is equal for functions which are made anew at each call, as by a lambda in it.

    A function counts by its code and the identity of what it closes over and of its defaults, a partial by
    its function and the identity of its arguments.
    """
    if isinstance(output, types.FunctionType):
        named = output.__kwdefaults__ or {}
        held = (*(output.__closure__ or ()), *(output.__defaults__ or ()), *named.values())
        return output.__code__, tuple(named), tuple(map(id, held))
    if type(output) is functools.partial:
        held = (*output.args, *output.keywords.values())
        return _same_when_rewritten(output.func), tuple(output.keywords), tuple(map(id, held))
    # Equal methods are made anew, too; any other object may be without a hash.
    return output if isinstance(output, str | int | types.MethodType | None) else id(output)
