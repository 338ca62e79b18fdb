"""LIET against a float64 transcription of the release's step."""

import copy
import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graph_sim import SimulatedRecorder
from support.stepping import EPS, K, N, assert_same_step, make_batch, moved_network, train_step
from torch import Tensor, nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.train import early_flags, parse_train
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.methods import Liet, LietOptions
from fastdynat.methods.liet import jensen_shannon, spread
from fastdynat.training import new_run
from fastdynat.training.step import TrainStep

SMALL = 6 / 255  # EPS is above 8/255
SHAPE = (3, 8, 8)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def step_of(
    model: nn.Module, *, eps: float = EPS, smoothing: float = 0.6, options: Any = None, **more: Any
) -> TrainStep:
    method = Liet(options or LietOptions())
    step = train_step(method, model, None, spec=PGDSpec(eps, eps, 1), **more)
    method.epochs, method.label_smoothing = 4, smoothing
    return step


class Published:
    """The release's step, which draws in the order of ours: other smoothed labels at each criterion."""

    def __init__(self, model: nn.Module, eps: float, smoothing: float) -> None:
        self.model, self.eps, self.smoothing = model, eps, smoothing
        self.large = Fraction(eps) > Fraction(8, 255) + Fraction(1, 20 * 255)  # 8/255 to a tenth of a level

    def targets(self, labels: Tensor) -> Tensor:
        drawn = torch.rand(len(labels), K, dtype=torch.float64)
        rows = []
        for label, row in zip(labels.tolist(), drawn, strict=True):
            others = torch.tensor([float(v) if k != label else 0.0 for k, v in enumerate(row)])
            target = self.smoothing * others.double() / others.double().sum()
            target[label] = 1 - self.smoothing
            rows.append(target)
        return torch.stack(rows)

    def look(self) -> None:
        grey = torch.full((K, *SHAPE), 0.5, dtype=torch.float64, requires_grad=True)
        loss = -(self.targets(torch.arange(K)) * self.model.eval()(grey).log_softmax(1)).sum(1).mean()
        self.li = self.eps * torch.autograd.grad(loss, grey)[0].sign()

    def step(self, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
        """The loss, whose gradients are left in .grad, and its divergence."""
        x, eps, model = batch.x, self.eps, self.model.train()
        delta = self.li[batch.labels].clone()
        mask, noise = torch.rand_like(x), 2 * torch.rand_like(x) - 1
        noise = noise * eps * (2 if self.large else 1)
        share, coin = torch.rand(2, dtype=torch.float64)
        chosen = mask < 0.1 + 0.4 * share
        delta[chosen] = noise[chosen]
        start = (x - delta if coin < 0.5 else x + delta).clamp(0, 1).requires_grad_()
        before = model(start)
        loss = -(self.targets(batch.labels) * before.log_softmax(1)).sum(1).mean()
        (grad,) = torch.autograd.grad(loss, start, retain_graph=True)
        adv = start.detach() + eps * grad.sign()
        adv = adv.clamp(0, 1) if self.large else (x + (adv - x).clamp(-eps, eps)).clamp(0, 1)
        after = model(adv)
        p, q = before.softmax(1), after.softmax(1)
        m = ((p + q) / 2).log()
        divergence = (F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean")) / 2
        fit = -(self.targets(batch.labels) * after.log_softmax(1)).sum(1).mean()
        total = fit + weight * divergence
        total.backward()
        return total.detach(), divergence.detach()


@pytest.mark.parametrize("eps", [SMALL, EPS])
@pytest.mark.parametrize("smoothing", [0.0, 0.6])
@pytest.mark.parametrize("seed", [4, 5, 6, 7])  # either sign of the coin
def test_the_published_step(batch: Batch, eps: float, smoothing: float, seed: int) -> None:
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = step_of(model, eps=eps, smoothing=smoothing)
    step.start_epoch(2)
    torch.manual_seed(seed)
    logs = step(batch)
    torch.manual_seed(seed)
    published = Published(reference, eps, smoothing)
    published.look()
    loss, divergence = published.step(batch, 100 * 3 / 4)
    torch.testing.assert_close(logs["loss"], loss)
    torch.testing.assert_close(logs["divergence"], divergence)
    assert set(logs) == {"loss", "divergence", "train_adv_acc", "zero_grad_share"}
    assert_same_step(model, reference)


@pytest.mark.parametrize("eps", [8 / 255, 0.031373, 0.0314, float(torch.tensor(8 / 255))])
def test_radii_that_mean_8_levels_keep_to_the_ball(batch: Batch, eps: float) -> None:
    model = moved_network(1)
    step, seen = step_of(model, eps=eps), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    step.start_epoch(0)
    for _ in range(3):
        step(batch)
    passes = [x for x in seen if len(x) == N]
    assert len(passes) >= 6  # x0 and x' of each batch
    for x in passes:
        assert float((x - batch.x).abs().max()) <= eps + 1e-9


def test_the_large_form_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = "above 8/255, takes its large form"
    tiny = ["--train-size", "32", "--val-size", "20", "--batch-size", "16", "--quiet"]
    for eps, large in (("0.031373", False), ("8/255", False), ("9/255", True)):
        argv = ["--method", "liet", "--run-dir", str(tmp_path / eps.replace("/", "-")), "--eps", eps, *tiny]
        caplog.clear()
        with caplog.at_level("INFO"), new_run(parse_train(argv, early_flags(argv)).command.train):
            assert (said in caplog.text) == large, eps


def test_both_signs_of_the_coin_are_tested() -> None:
    coins = []
    for seed in (4, 5, 6, 7):
        torch.manual_seed(seed)
        torch.rand(K, K, dtype=torch.float64)
        for _ in range(2):
            torch.rand(N, *SHAPE, dtype=torch.float64)
        coins.append(bool(torch.rand(2, dtype=torch.float64)[1] < 0.5))
    assert set(coins) == {True, False}


def test_classes_are_looked_at_every_few_batches(batch: Batch) -> None:
    step = step_of(moved_network(1), options=LietOptions(refresh=3))
    signs = step.method.buffers["class_signs"]
    changed = []
    for epoch in (0, 1):
        step.start_epoch(epoch)
        for _ in range(4):
            signs.fill_(7.0)
            step(batch)
            changed.append(not bool((signs == 7.0).all()))
    assert changed == [True, False, False, True] * 2
    step.start_epoch(1, 3)  # a run that is resumed there
    signs.fill_(7.0)
    step(batch)
    assert set(signs.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_a_captured_step_is_the_step(batch: Batch) -> None:
    """Batches that look at the classes and those that do not are two graphs."""
    results = []
    for recorder in (None, SimulatedRecorder()):
        model = moved_network(1)
        step = step_of(model, options=LietOptions(refresh=2), recorder=recorder)
        torch.manual_seed(2)
        step.start_epoch(0)
        for shift in range(2 * WARM_UP_CALLS + 4):
            step(Batch(batch.x.roll(shift, 0), batch.labels.roll(shift, 0), batch.indices))
        results.append({**model.state_dict(), **step.method.buffers})
        assert recorder is None or recorder.captured == 2
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_the_first_pass_is_forward_once(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(moved_network(1))
    step.start_epoch(0, 1)
    passes = []
    model = step.networks.views.model
    nets = dataclasses.replace(step.networks.views, model=lambda x: passes.append(len(x)) or model(x))
    monkeypatch.setattr(step.networks, "views", nets)
    step(batch)
    assert passes == [N, N]


def test_labels_spread_over_the_other_classes() -> None:
    labels = torch.tensor([2, 0, 1])
    targets = spread(labels, torch.rand(3, K), 0.6)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    torch.testing.assert_close(targets.gather(1, labels[:, None])[:, 0], torch.full((3,), 0.4))
    assert torch.equal(spread(labels, torch.rand(3, K), 0.0), F.one_hot(labels, K).float())


def test_the_divergence_is_finite_for_certain_predictions() -> None:
    a = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    b = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    value = jensen_shannon(a, b)
    torch.testing.assert_close(value, torch.full((1,), 2.0).log())
    value.sum().backward()
    assert bool(a.grad.isfinite().all())
    assert bool(b.grad.isfinite().all())


def test_what_cannot_work_is_refused() -> None:
    for spec, bn, message in (
        (PGDSpec(0.1, 0.1, 2), "eval", "liet takes 1 step, got steps 2"),
        (PGDSpec(0.1, 0.1, 1, norm="l2"), "eval", "liet is a method for linf"),
        (PGDSpec(0.1, 0.1, 1), "train", "class perturbations need --attack-bn eval, got train; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            Liet(LietOptions()).check_attack(spec, bn)
    for options, message in (
        ({"consistency": -1.0}, "consistency must be >= 0"),
        ({"least_noise": 0.6}, r"least_noise must be at most most_noise \(0.5\), got 0.6"),
        ({"most_noise": 1.5}, r"most_noise must be in \[0, 1\]"),
        ({"refresh": 0}, "refresh must be >= 1"),
    ):
        with pytest.raises(UserError, match=message):
            Liet(LietOptions(**options))
