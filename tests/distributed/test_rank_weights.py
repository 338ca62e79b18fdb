"""Weights of the ranks: sent at the start, whatever their types and layouts, and compared at checkpoints."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.distributed import world
from fastdynat.distributed.world import PIECE
from fastdynat.errors import UserError
from fastdynat.training.rank_weights import networks_tensors, require_equal_weights, take_first_weights


class Odd(nn.Module):
    """Tensors that NCCL refuses one by one: gaps, unusual dtypes; also without dimensions or elements."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net = tiny_cnn(rank).to(memory_format=torch.channels_last)
        self.gaps = nn.Parameter(torch.full((4, 6), rank + 0.5)[:, ::2])
        self.turned = nn.Parameter(torch.arange(6.0).mul(rank + 1).view(2, 3).T)
        self.register_buffer("mask", torch.tensor([rank == 0, True]))
        self.register_buffer("short", torch.tensor([rank, -7], dtype=torch.int16))
        self.register_buffer("rounded", torch.tensor([rank, torch.inf], dtype=torch.bfloat16))
        self.register_buffer("phase", torch.tensor([rank + 2j]))
        self.register_buffer("count", torch.tensor(rank))
        self.register_buffer("none", torch.empty(0))


def _networks(rank: int) -> Any:
    average = SimpleNamespace(module=tiny_cnn(7 + rank))
    return SimpleNamespace(raw={"model": Odd(rank), "guide": tiny_cnn(5 + rank)}, ema=average)


def _sent(piece: int) -> dict[str, Tensor]:
    networks = _networks(world().rank)
    tensors = networks_tensors(networks)
    world().broadcast_([*tensors.values()], piece=piece)
    require_equal_weights(networks, "now")
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("piece", [1, 100, PIECE])
def test_all_ranks_take_the_tensors_of_rank_0(ranks, piece: int) -> None:
    want = networks_tensors(_networks(0))
    assert {name.partition(".")[0] for name in want} == {"model", "guide", "average"}
    for got in ranks(2)(_sent, piece):
        assert [*got] == [*want]
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name


def _apart(name: str, change: str) -> tuple[str, str]:
    networks = _networks(0)
    take_first_weights(networks)
    if world().rank == 1 and change != "none":
        tensor = networks_tensors(networks)[name]
        if change == "last bit":
            tensor.copy_(torch.nextafter(tensor, torch.full_like(tensor, torch.inf)))
        elif change == "another":
            tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
    try:
        require_equal_weights(networks, "by update 12")
    except UserError as error:
        return type(error).__name__, str(error)
    return "equal", ""


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.net.0.weight", "last bit"),
        ("average.0.weight", "last bit"),
        ("guide.0.bias", "last bit"),
        ("model.mask", "another"),
        ("model.short", "another"),
        ("model.phase", "another"),
        ("model.count", "another"),
    ],
)
def test_ranks_whose_networks_have_come_apart_are_refused(ranks, name: str, change: str) -> None:
    (first, said), (second, told) = ranks(2)(_apart, name, change)
    assert (first, second, said) == ("UserError", "ToldElsewhere", told)
    assert f"have come apart by update 12: {name} is another on rank 1" in said


def test_equal_ranks_go_on(ranks) -> None:
    assert ranks(2)(_apart, "", "none") == [("equal", "")] * 2
