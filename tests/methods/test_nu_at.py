"""NU-AT against float64 transcriptions of the release's and FastAT_Benchmark's step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.stepping import EPS, K, N, assert_same_step, make_batch, moved_network, train_step
from torch import Tensor, nn

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import NuAt, NuAtOptions
from fastdynat.training.step import TrainStep

SPEC = PGDSpec(EPS, EPS, 1)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def step_of(
    model: nn.Module, *, epoch: int, done: int, smoothing: float = 0.0, **options: object
) -> TrainStep:
    """A step of batch number `done` of epoch `epoch` of four."""
    method = NuAt(NuAtOptions(nuc_max=8.0))
    step = train_step(method, model, None, spec=SPEC, **options)
    method.epochs, method.label_smoothing = 4, smoothing
    step.start_epoch(epoch, done)
    return step


def attacked(step: TrainStep, batch: Batch) -> Tensor:
    """The attacked images of `step` at its first batch."""
    torch.manual_seed(4)
    method, nets = step.method, step.networks
    return method.perturb(
        nets.views, batch, method.inner(nets.views, batch), Attacker(nets.attack, SPEC)
    ).x_adv


def nuclear(a: Tensor) -> Tensor:
    return torch.linalg.svdvals(a).sum()


def published(
    model: nn.Module, batch: Batch, weight: float, *, odd: bool, attack_bn: str, smoothing: float
) -> tuple[Tensor, Tensor]:
    """One step's attacked images and loss, whose gradients are left in .grad; draws as ours does."""
    x, y = batch.x, batch.labels

    def criterion(logits: Tensor) -> Tensor:
        targets = F.one_hot(y, K) * (1 - smoothing) + smoothing / K
        return -(targets * logits.log_softmax(1)).sum(1).mean()

    out = model.train()(x).detach()
    adv = (x + EPS / 2 * torch.sign(0.5 - torch.rand_like(x))).clamp(0, 1).requires_grad_()
    rout = model.train(attack_bn == "train")(adv)
    value = criterion(rout) + (weight * nuclear(out - rout) / N if odd else 0)
    adv = (adv + EPS * torch.autograd.grad(value, adv)[0].sign()).clamp(0, 1).detach()
    adv = (x + (adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    model.train()
    adv_out = model(adv)
    out = model(x)
    loss = criterion(out) + weight * nuclear(out - adv_out) / N
    loss.backward()
    return adv, loss.detach()


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("attack_bn", ["eval", "train"])
@pytest.mark.parametrize(("epoch", "done"), [(0, 1), (1, 0), (1, 1), (3, 6), (3, 7)])
def test_the_published_step(batch: Batch, epoch: int, done: int, attack_bn: str, smoothing: float) -> None:
    """The weight grows by a quarter of 8 per epoch; odd batches are attacked through the norm as well."""
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = step_of(model, epoch=epoch, done=done, smoothing=smoothing, attack_bn=attack_bn)
    torch.manual_seed(4)
    logs = step(batch)
    torch.manual_seed(4)
    adv, loss = published(
        reference, batch, 2.0 * epoch, odd=done % 2 == 1, attack_bn=attack_bn, smoothing=smoothing
    )
    torch.testing.assert_close(logs["loss"], loss)
    assert_same_step(model, reference)
    again = step_of(moved_network(1), epoch=epoch, done=done, smoothing=smoothing, attack_bn=attack_bn)
    torch.testing.assert_close(attacked(again, batch), adv)


def test_the_norm_changes_the_attack_of_every_second_batch(batch: Batch) -> None:
    found = [attacked(step_of(moved_network(1), epoch=3, done=done), batch) for done in (0, 1)]
    assert not torch.equal(*found)


def test_mixed_labels_take_the_place_of_classes(batch: Batch) -> None:
    mixed = F.one_hot(batch.labels, K).double()
    weights = []
    for one in (batch, Batch(batch.x, batch.labels, batch.indices, mixed=mixed)):
        model = moved_network(1)
        torch.manual_seed(4)
        step_of(model, epoch=2, done=1, smoothing=0.2)(one)
        weights.append(model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value)


def test_logs_say_how_far_apart_the_logits_are(batch: Batch) -> None:
    model = moved_network(1)
    logs = step_of(model, epoch=1, done=0)(batch)
    assert set(logs) == {"loss", "nuclear_norm", "train_acc", "train_adv_acc", "zero_grad_share"}
    assert float(logs["nuclear_norm"]) > 0


def test_what_cannot_work_is_refused() -> None:
    for spec, message in (
        (PGDSpec(0.1, 0.1, 2), "nu_at takes 1 step, got steps 2"),
        (PGDSpec(0.1, 0.1, 1, norm="l2"), "nu_at is a method for linf"),
    ):
        with pytest.raises(UserError, match=message):
            NuAt(NuAtOptions()).check_attack(spec, "eval")
    for options in ({"nuc_max": -1.0}, {"noise": float("nan")}):
        with pytest.raises(UserError, match=next(iter(options))):
            NuAt(NuAtOptions(**options))
