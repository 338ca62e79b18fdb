"""The weights of a run on several processes, which stay equal bit for bit: sent once, compared since."""

import torch
from torch import Tensor

from fastdynat.distributed import name_of, world
from fastdynat.errors import ToldElsewhere, UserError
from fastdynat.training.networks import NetworkSet

FACTOR = 0x9E3779B97F4A7C14 - 2**64  # even, else without meaning
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def networks_tensors(networks: NetworkSet) -> dict[str, Tensor]:
    """The parameters and buffers of all networks of a run, the weight average among them, by name."""
    modules = networks.raw | ({} if networks.ema is None else {"average": networks.ema.module})
    found: dict[int, tuple[str, Tensor]] = {}
    for role, module in modules.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found.setdefault(id(tensor), (f"{role}.{name}", tensor.detach()))
    return dict(found.values())


def take_first_weights(networks: NetworkSet) -> None:
    """Give all ranks the weights and buffers of rank 0."""
    world().broadcast_([*networks_tensors(networks).values()])


def require_equal_weights(networks: NetworkSet, when: str) -> None:
    """Refuse ranks whose networks differ in a bit; every rank must call this (waits for the device).

    Each tensor is compared by a sum of its bits, in which every place has a factor of its own.

    Args:
        when: the moment in words, for the message.

    Raises:
        UserError: on rank 0, naming the first tensor that is another on another rank.
        ToldElsewhere: on the others.
    """
    here = world()
    if here.alone:
        return
    tensors = networks_tensors(networks)
    told = here.gather(_sums([*tensors.values()]))
    for number, name in enumerate(tensors):
        for rank, sums in enumerate(told):
            if sums[number] != told[0][number]:
                text = (
                    f"the networks of the processes have come apart {when}: {name} is another on "
                    f"{name_of(rank)} than on {name_of(0)}, so they no longer train one network; use GPUs of "
                    "one kind and let no code of your own change weights or buffers by rank, then go on from "
                    "the last checkpoint with --resume"
                )
                raise UserError(text) if here.first else ToldElsewhere(text)


@torch.no_grad()
def _sums(tensors: list[Tensor]) -> list[int]:
    sums = []
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = real.reshape(-1).view(INTEGERS[real.element_size()]).long()
        # Odd factors, modulo 2^64: changes by a last bit up and another down do not cancel.
        sums.append((bits * (torch.arange(len(bits), device=bits.device) * FACTOR + 1)).sum())
    found: list[int] = torch.stack(sums).tolist() if sums else []
    return found
