"""Micro-batches of a network with batch norm: which network their attacks see."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.stepping import CPU, LR, K, make_batch
from torch import Tensor, nn

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.methods import Inner, Madry, MadryOptions, Networks
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep

SPEC = PGDSpec(0.1, 0.05, 3, start="none")


def preactivation_network() -> nn.Module:
    """Two batch norms, of which only the second follows a convolution: (n, 3, 8, 8) -> (n, K), float64."""
    torch.manual_seed(1)
    first = [nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(6 * 9, K)).double()


class Watched(Madry):
    """Madry's method, which keeps the images of its attacks."""

    def __init__(self) -> None:
        super().__init__(MadryOptions())
        self.found: list[Tensor] = []

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        result = super().perturb(nets, batch, inner, attack)
        self.found.append(result.x_adv.clone())
        return result


def update(model: nn.Module, *, fold: bool, **options: Any) -> list[Tensor]:
    """One update of `model` in two micro-batches; the images of the attacks, one after the other."""
    method = Watched()
    networks = NetworkSet(
        model,
        None,
        frozen_guide=True,
        image_shape=(3, 8, 8),
        device=CPU,
        attack=AttackSwitches(fold=fold),
    )
    assert networks.attack.replica.num_folded == (1 if fold else 0)
    method.num_classes, method.buffers = K, {}
    optim = OptimConfig(lr=LR, epochs=1)
    TrainStep(method, networks, SPEC, optim, Precision("off", CPU), lambda n: 1.0, accumulate=2, **options)(
        make_batch()
    )
    return method.found


def pieces() -> Iterator[tuple[Tensor, Tensor]]:
    batch = make_batch()
    yield from zip(batch.x.chunk(2), batch.labels.chunk(2), strict=True)


@pytest.mark.parametrize("fold", [True, False])
def test_all_micro_batches_are_attacked_with_the_statistics_of_the_beginning(fold: bool) -> None:
    model = preactivation_network()
    start = copy.deepcopy(model)
    found = update(model, fold=fold)
    for (x, labels), x_adv in zip(pieces(), found, strict=True):
        want = pgd(start, x, AttackGoal("ce", labels), SPEC)
        torch.testing.assert_close(x_adv, want.x_adv, rtol=0, atol=1e-10)


def test_folding_does_not_change_an_update_in_micro_batches() -> None:
    folded, plain = preactivation_network(), preactivation_network()
    update(folded, fold=True)
    update(plain, fold=False)
    assert not torch.equal(plain[-1].weight, preactivation_network()[-1].weight)
    for name, value in folded.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=1e-10, msg=name)
