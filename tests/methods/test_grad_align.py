"""GradAlign against a float64 transcription of the release's and FastAT_Benchmark's step."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.stepping import EPS, K, assert_same_step, make_batch, moved_network, train_step
from torch import Tensor, nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.execution.uncompiled import is_uncompiled
from fastdynat.methods import GradAlign, GradAlignOptions
from fastdynat.methods.base import SHARE_OF
from fastdynat.methods.grad_align import misalignment
from fastdynat.training.networks import NetworkSet
from fastdynat.training.step import TrainStep

STARTS = {"none": PGDSpec(EPS, EPS, 1, start="none"), "uniform": PGDSpec(EPS, 1.25 * EPS, 1)}
WEIGHT = 3.0


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def step_of(model: nn.Module, start: str = "none", *, smoothing: float = 0.0, **more: Any) -> TrainStep:
    method = GradAlign(GradAlignOptions(align_weight=WEIGHT))
    step = train_step(method, model, None, spec=STARTS[start], **more)
    method.label_smoothing = smoothing
    return step


def published(model: nn.Module, batch: Batch, start: str, smoothing: float) -> tuple[Tensor, Tensor]:
    """The step's loss, whose gradients are left in .grad, and its regulariser; draws as ours does."""
    x, y = batch.x, batch.labels
    model.train()
    first = start_point(x, start, norm="linf", eps=EPS).requires_grad_()
    other = start_point(x, "uniform", norm="linf", eps=EPS).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(first), y), first)
    adv = first.detach() + STARTS[start].step_size * grad.sign()
    adv = (x + (adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    targets = F.one_hot(y, K) * (1 - smoothing) + smoothing / K
    fit = -(targets * model(adv).log_softmax(1)).sum(1).mean()
    (second,) = torch.autograd.grad(F.cross_entropy(model(other), y), other, create_graph=True)
    cosines = []
    for a, b in zip(grad, second, strict=True):
        if bool(a.any()) and bool(b.any()):
            cosines.append((a / (a**2).sum() ** 0.5 * (b / (b**2).sum() ** 0.5)).sum())
    regularizer = 1 - torch.stack(cosines).mean()
    loss = fit + WEIGHT * regularizer
    loss.backward()
    return loss.detach(), regularizer.detach()


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("start", STARTS)
def test_the_published_step(batch: Batch, start: str, smoothing: float) -> None:
    """Running statistics too: three passes move them, in this order."""
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = step_of(model, start, smoothing=smoothing)
    torch.manual_seed(4)
    logs = step(batch)
    torch.manual_seed(4)
    loss, regularizer = published(reference, batch, start, smoothing)
    torch.testing.assert_close(logs["loss"], loss)
    torch.testing.assert_close(logs["misalignment"], regularizer)
    keys = {"loss", "misalignment", SHARE_OF + "misalignment", "train_adv_acc", "zero_grad_share"}
    assert set(logs) == keys
    assert_same_step(model, reference)
    assert int(model[1].num_batches_tracked) == 1 + 3


def test_the_regulariser_turns_the_gradients_towards_each_other(batch: Batch) -> None:
    found = []
    for weight in (0.0, 10.0):
        model = moved_network(1)
        method = GradAlign(GradAlignOptions(align_weight=weight))
        step = train_step(method, model, None, spec=STARTS["none"])
        for _ in range(30):
            torch.manual_seed(4)
            logs = step(batch)
        found.append(float(logs["misalignment"]))
    assert found[1] < 0.8 * found[0]


def test_images_without_a_gradient_are_left_out() -> None:
    first, second = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    first[1], second[2] = 0, 0
    second.requires_grad_()
    apart, both = misalignment(first, second)
    assert both.tolist() == [True, False, False, True]
    want = 1 - F.cosine_similarity(first.flatten(1), second.flatten(1))
    torch.testing.assert_close(apart[both], want[both])
    apart.sum().backward()
    assert bool(second.grad.isfinite().all())
    assert bool((second.grad.flatten(1).abs().amax(1) > 0)[both].all())


def test_a_network_without_gradients_has_no_regulariser(batch: Batch) -> None:
    """Where all gradients are 0, the loss is the cross-entropy, not a mean of nothing."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(K, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias + 0 * x.flatten(1)[:, :K]

    logs = step_of(Constant())(batch)
    assert float(logs["misalignment"]) == 0.0
    assert float(logs["zero_grad_share"]) == 1.0
    assert bool(logs["loss"].isfinite())


def test_both_gradients_are_uncompiled(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(moved_network(1))
    seen, network = [], step.networks.views.model

    def model(x: Tensor) -> Tensor:
        seen.append((x.requires_grad, is_uncompiled()))
        return network(x)

    nets = step.networks.views
    monkeypatch.setattr(step.networks, "views", type(nets)(**{**vars(nets), "model": model}))
    step(batch)
    assert seen == [(True, True), (False, False), (True, True)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_that_are_computed_again_have_the_same_second_derivatives(
    batch: Batch, checkpointing: bool
) -> None:
    class Block(nn.Sequential):
        pass

    def build() -> nn.Module:
        torch.manual_seed(3)
        first = Block(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh())
        return nn.Sequential(first, Block(nn.Flatten(), nn.Linear(54, K))).double()

    weights = []
    for checkpointed in (False, checkpointing):
        method, model = GradAlign(GradAlignOptions(align_weight=WEIGHT)), build()
        step = train_step(method, model, None, spec=STARTS["none"])
        step.networks = NetworkSet(
            model,
            None,
            image_shape=(3, 8, 8),
            device=torch.device("cpu"),
            checkpointing=checkpointed,
        )
        torch.manual_seed(4)
        step(batch)
        weights.append(model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value)


def test_what_cannot_work_is_refused() -> None:
    for spec, message in (
        (PGDSpec(0.1, 0.1, 2), "grad_align takes 1 step, got steps 2"),
        (PGDSpec(0.1, 0.1, 1, norm="l2"), "grad_align is a method for linf"),
    ):
        with pytest.raises(UserError, match=message):
            GradAlign(GradAlignOptions()).check_attack(spec, "eval")
    with pytest.raises(UserError, match="align_weight must be >= 0, got -1"):
        GradAlign(GradAlignOptions(align_weight=-1.0))
