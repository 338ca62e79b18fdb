"""A method's buffers on several ranks: whole in a checkpoint, dealt out to the ranks of any world.

A buffer with a row per image of the batch is dealt out as the batch is: row i of rank r of W belongs to
position r + W i. All other buffers are equal on all ranks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdynat.distributed import World
from fastdynat.distributed.shares import deal
from fastdynat.methods import Method


def rows_per_image(method: Method, image_shape: tuple[int, ...]) -> set[str]:
    """The names of the buffers of `method` whose first dimension is the batch's."""
    two, three = (method.make_buffers(torch.zeros(n, *image_shape)) for n in (2, 3))
    return {
        name
        for name in two
        if (two[name].shape[:1], three[name].shape[:1]) == ((2,), (3,))
        and two[name].shape[1:] == three[name].shape[1:]
    }


def whole_buffers(buffers: Mapping[str, Tensor], per_image: set[str], world: World) -> dict[str, Tensor]:
    """`buffers` as one process would have them; every rank must call this."""
    if world.alone:
        return dict(buffers)
    whole = {}
    for name, tensor in buffers.items():
        if name not in per_image:
            whole[name] = tensor
            continue
        parts = world.gather(tensor.detach().cpu())
        rows = parts[0].new_empty((sum(len(part) for part in parts), *tensor.shape[1:]))
        for rank, part in enumerate(parts):
            rows[rank :: world.size] = part
        whole[name] = rows
    return whole


def load_buffers(
    buffers: Mapping[str, Tensor], saved: Mapping[str, Tensor], per_image: set[str], world: World
) -> None:
    """Copy this rank's part of what `whole_buffers` returned into `buffers`."""
    for name, tensor in buffers.items():
        whole = saved[name]
        share = deal(len(whole), world.rank, world.size) if name in per_image else None
        tensor.copy_(whole if share is None else whole[[*share.positions]])
