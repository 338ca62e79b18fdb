"""Running statistics after each rank has seen its own shard of a batch."""

import torch
from support.collectives import counted_collectives
from torch import Tensor, nn

from fastdynat.distributed import ALONE, world
from fastdynat.distributed.running_statistics import average_statistics

SHARES = (5 / 9, 4 / 9)


class _Masked(nn.Module):
    """A user's module: a buffer that each rank has changed, an infinite mask, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own", torch.full((2, 2), 1.0 + world().rank))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("calls", torch.tensor(7))
        self.norm = nn.BatchNorm2d(3)


def _averaged() -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    here = world()
    generator = torch.Generator().manual_seed(here.rank)
    network = nn.Sequential(nn.BatchNorm1d(4), nn.InstanceNorm2d(2, track_running_stats=True), _Masked())
    guide = nn.Sequential(nn.BatchNorm3d(2).double())
    for norm in (network[0], network[1], network[2].norm, guide[0]):
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(generator=generator)
        norm.num_batches_tracked.fill_(3)
    networks = nn.ModuleDict({"model": network, "guide": guide})
    before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    with counted_collectives() as calls:
        average_statistics(networks.values(), here, weight=SHARES[here.rank])
    return before, networks.state_dict(), len(calls)


def test_statistics_become_the_weighted_mean_in_one_collective(ranks) -> None:
    (first, found, calls), (second, other, _) = ranks(2)(_averaged)
    assert calls == 1
    for name, value in found.items():
        assert torch.equal(value, other[name]), name
        if name.endswith(("running_mean", "running_var")):
            assert not torch.equal(first[name], second[name])
            mean = SHARES[0] * first[name].double() + SHARES[1] * second[name].double()
            torch.testing.assert_close(
                value.double(), mean, rtol=0, atol=1e-7 if value.itemsize == 4 else 1e-15
            )
        else:
            assert torch.equal(value, first[name]), name
    assert found["model.2.own"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def _equal_ones() -> bool:
    norm = nn.BatchNorm2d(50)
    norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    before = norm.running_mean.clone()
    for _ in range(20):
        average_statistics([norm], world(), weight=SHARES[world().rank])
    return torch.equal(norm.running_mean, before)


def test_equal_statistics_keep_their_bits(ranks) -> None:
    assert ranks(2)(_equal_ones) == [True, True]


def test_one_process_keeps_its_statistics() -> None:
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(2.0)
    average_statistics([norm], ALONE, weight=1.0)
    assert norm.running_mean.tolist() == [2.0] * 3
