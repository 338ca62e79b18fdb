"""A method's buffers: their memory, and on several ranks: whole in a checkpoint, dealt out to any world.

A buffer with a row per image of the batch is dealt out as the batch is: row i of rank r of W belongs to
position r + W i. All other buffers are equal on all ranks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdynat.distributed import World
from fastdynat.distributed.shares import deal
from fastdynat.machine.free_memory import check_room, own_memory
from fastdynat.methods import Method


def rows_per_image(method: Method, image_shape: tuple[int, ...]) -> set[str]:
    """The names of the buffers of `method` whose first dimension is the batch's."""
    # Without memory: rows of all training images would take hundreds of megabytes.
    two, three = (method.make_buffers(torch.zeros(n, *image_shape, device="meta")) for n in (2, 3))
    return {
        name
        for name in two
        if (two[name].shape[:1], three[name].shape[:1]) == ((2,), (3,))
        and two[name].shape[1:] == three[name].shape[1:]
    }


def give_buffers(method: Method, x: Tensor) -> None:
    """Set the buffers of `method`, on the device of `x`, zeros of a full batch's shape.

    Raises: UserError where rows of all training images take more memory than is free.
    """
    if method.follows_images:
        check_room(
            _bytes_of_buffers(method, tuple(x.shape)),
            f"method {method.name}: use fewer images (--train-size), or {without_image_state(method)}; the "
            f"perturbations of {method.num_images:,} training images take",
            available=torch.cuda.mem_get_info(x.device)[0] if x.is_cuda else own_memory(),
        )
    method.buffers = method.make_buffers(x)


def without_image_state(method: Method) -> str:
    """The advice to a user who has no room for a perturbation per image."""
    if getattr(method.options, "prior_epochs", 0):
        return "leave --prior-epochs out"
    return "use --method n_fgsm, which keeps none"


def checkpoint_note(method: Method) -> str | None:
    """A line on the rows of training images in each checkpoint; None where there are none."""
    if not method.follows_images:
        return None
    size = sum(tensor.nbytes for tensor in method.buffers.values()) / 1e6
    return (
        f"{method.name} keeps {size:,.0f} MB for the perturbations of {method.num_images:,} training images; "
        "each checkpoint holds them"
    )


def _bytes_of_buffers(method: Method, shape: tuple[int, ...]) -> int:
    return sum(tensor.nbytes for tensor in method.make_buffers(torch.zeros(shape, device="meta")).values())


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
