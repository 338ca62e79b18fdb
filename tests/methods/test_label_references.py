"""Whole steps on smoothed and mixed labels against float64 transcriptions of the releases' formulas.

TRADES as Wang et al. 2023 (DM-Improves-AT) train it, with and without CutMix; PGD training as the
FastAT_Benchmark's PGD-AT-WA.
"""

import copy

import pytest
import torch
from support.stepping import (
    EPS,
    STEP,
    STEPS,
    K,
    N,
    assert_same_step,
    drawn_start,
    make_batch,
    moved_network,
    train_step,
)
from support.transcriptions import attack, log_probs
from torch import Tensor, nn

from fastdynat.data import Batch
from fastdynat.methods import Madry, MadryOptions, Trades, TradesOptions

BETA, SMOOTHING = 5.0, 0.1


def one_hot(labels: Tensor) -> Tensor:
    return torch.tensor([[float(k == y) for k in range(K)] for y in labels], dtype=torch.float64)


def smooth(labels: Tensor, s: float) -> Tensor:
    return (1 - s) * labels + s / K


def mean_cross_entropy(labels: Tensor, log_q: Tensor) -> Tensor:
    return sum(-(labels[i] * log_q[i]).sum() for i in range(N)) / N  # type: ignore[return-value]


def untracked(model: nn.Module, x: Tensor) -> Tensor:
    """Logits under the batch's statistics, without a trace in the running ones."""
    twin = copy.deepcopy(model).train()
    for mine, own in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = own.data
    return twin(x)  # type: ignore[no-any-return]


def wang2023(
    model: nn.Module, x: Tensor, labels: Tensor, start: Tensor, *, cut_mixed: bool, smoothing: float
) -> Tensor:
    """The release's loss, in train mode; the attack on KL from the clean prediction or the mixed label."""
    target = labels if cut_mixed else log_probs(untracked(model, x)).exp().detach()
    x_adv = start
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        log_q = log_probs(untracked(model, x_adv))
        divergence = (torch.special.xlogy(target, target) - target * log_q).sum() / N
        (gradient,) = torch.autograd.grad(divergence, x_adv)
        x_adv = x_adv.detach() + STEP * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    model.train()
    clean, adv = log_probs(model(x)), log_probs(model(x_adv))
    robust = (clean.exp() * (clean - adv)).sum() / N
    return mean_cross_entropy(smooth(labels, smoothing), clean) + BETA * robust


def cut_mix(batch: Batch) -> Batch:
    """Columns of the next image in each one, and their share of the label."""
    columns = torch.arange(8) < 3
    x = torch.where(columns, batch.x.roll(1, 0), batch.x)
    labels = one_hot(batch.labels)
    mixed = 5 / 8 * labels + 3 / 8 * labels.roll(1, 0)
    return Batch(x, mixed.argmax(1), batch.indices, mixed=mixed)


@pytest.mark.parametrize(
    ("cut_mixed", "smoothing"), [(False, SMOOTHING), (True, 0.0), (True, SMOOTHING), (False, 0.0)]
)
def test_a_step_of_wang2023(cut_mixed: bool, smoothing: float) -> None:
    """The release does not smooth what it has mixed; with both, the attack sees the smoothed mixed label."""
    batch = cut_mix(make_batch()) if cut_mixed else make_batch()
    model = moved_network(1)
    reference, method = copy.deepcopy(model), Trades(TradesOptions(beta=BETA, bn_third_pass=False))
    method.label_smoothing = smoothing
    step = train_step(method, model, None, start="uniform", attack_bn="frozen")
    start = drawn_start(batch.x, "uniform")
    logs = step(batch)
    labels = one_hot(batch.labels) if batch.mixed is None else smooth(batch.mixed, smoothing)
    loss = wang2023(
        reference, batch.x, labels, start, cut_mixed=cut_mixed, smoothing=0.0 if cut_mixed else smoothing
    )
    loss.backward()
    torch.testing.assert_close(logs["loss"], loss.detach())
    assert_same_step(model, reference)


@pytest.mark.parametrize("mixing", [False, True])
def test_a_step_of_pgd_at_wa(mixing: bool) -> None:
    """Smoothing 0.4 in the loss; the attack sees the class, or as in timm the smoothed mixed label."""
    batch = cut_mix(make_batch()) if mixing else make_batch()
    model = moved_network(1)
    reference, method = copy.deepcopy(model), Madry(MadryOptions())
    method.label_smoothing = 0.4
    step = train_step(method, model, None, start="uniform")
    start = drawn_start(batch.x, "uniform")
    logs = step(batch)
    labels = one_hot(batch.labels) if batch.mixed is None else batch.mixed
    seen = smooth(labels, 0.4) if mixing else labels
    x_adv, _ = attack(reference, batch.x, start, lambda log_q, i: -(seen[i] * log_q).sum())
    adv = log_probs(reference(x_adv))
    loss = mean_cross_entropy(smooth(labels, 0.4), adv)
    loss.backward()
    torch.testing.assert_close(logs["loss"], loss.detach())
    right = float((adv.argmax(1) == batch.labels).double().mean())
    assert float(logs["train_adv_acc"]) == pytest.approx(right)
    assert_same_step(model, reference)
