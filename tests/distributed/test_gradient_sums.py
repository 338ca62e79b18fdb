"""Sums of gradients over the ranks, beside the attack and after the backward pass."""

import pytest
import torch
from torch import nn

from fastdynat.distributed import world
from fastdynat.errors import UserError
from fastdynat.training.gradient_sums import GradientSums


def _begun_and_added() -> list[float]:
    layer = nn.Linear(1, 1, bias=False)
    sums = GradientSums([layer], world())
    layer.weight.grad = torch.full((1, 1), 1.0 + world().rank)
    sums.begin(layer)
    first = layer.weight.grad is None
    layer.weight.grad = torch.full((1, 1), 10.0)
    sums.finish()
    begun_only = nn.Linear(1, 1, bias=False)
    other = GradientSums([begun_only], world())
    begun_only.weight.grad = torch.full((1, 1), 1.0 + world().rank)
    other.begin(begun_only)
    other.finish()
    assert layer.weight.grad is not None
    assert begun_only.weight.grad is not None
    return [float(first), float(layer.weight.grad), float(begun_only.weight.grad)]


def test_what_was_begun_and_what_came_later_add_up(ranks) -> None:
    assert ranks(2)(_begun_and_added) == [[1.0, 23.0, 3.0]] * 2


def _uneven() -> str:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    chosen = layers if world().first else layers[:1]
    for layer in chosen:
        layer(torch.ones(1, 2)).sum().backward()
    with pytest.raises(UserError) as caught:
        GradientSums([layers], world()).finish()
    return str(caught.value)


def test_gradients_of_different_weights_are_refused(ranks) -> None:
    """A flat sum of them would add gradients of other weights, or wait for ever."""
    for text in ranks(2)(_uneven):
        assert text.startswith(
            "the processes have gradients of different weights (rank 0: 4, rank 1: 2 of 4)"
        )
