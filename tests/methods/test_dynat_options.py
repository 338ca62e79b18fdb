"""Every option of DYNAT against its formula (algorithms A.10), on the method's own two halves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.network_modes import frozen_twin
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import Dynat, DynatOptions, Inner, Networks, Outer
from fastdynat.methods.base import unattacked


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.randint(10, (8,)), torch.arange(8))


class Pair:
    """Model and guide with the engine's views, and untouched copies for the references."""

    def __init__(self) -> None:
        self.model, self.guide = (
            tiny_cnn(1, dtype=torch.float64).train(),
            tiny_cnn(2, dtype=torch.float64).train(),
        )
        self.reference_model, self.reference_guide = copy.deepcopy(self.model), copy.deepcopy(self.guide)
        self.nets = Networks(
            self.model,
            frozen_twin(self.model, "eval"),
            self.model,
            self.guide,
            frozen_twin(self.guide, "eval"),
        )

    def run(self, batch: Batch, x_adv: Tensor, **options: object) -> tuple[Inner, Outer]:
        method = Dynat(DynatOptions(**options))  # type: ignore[arg-type]
        inner = method.inner(self.nets, batch)
        return inner, method.outer(self.nets, batch, inner, unattacked(x_adv))


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def x_adv(batch: Batch) -> Tensor:
    return (batch.x + 0.05 * torch.randn_like(batch.x)).clamp(0, 1)


def buffers(module: nn.Module) -> list[Tensor]:
    return list(module.buffers())


def test_defaults_are_the_released_codes() -> None:
    assert DynatOptions() == DynatOptions(
        inner_loss="ce_dynamic",
        outer_label="dynamic",
        beta=1.0,
        label_type="hard",
        temperature=1.0,
        guide_mode="train",
        bn_clean_forward=True,
        extra_kl_weight=0.0,
    )


def test_labels_come_from_batch_statistics_or_running_ones(pair: Pair, batch: Batch, x_adv: Tensor) -> None:
    with torch.no_grad():
        by_running = pair.reference_guide.eval()(batch.x).argmax(1)
        by_batch = pair.reference_guide.train()(batch.x).argmax(1)
    assert not torch.equal(by_running, by_batch)
    before = copy.deepcopy(buffers(pair.guide))
    inner, _ = pair.run(batch, x_adv, guide_mode="eval")
    assert torch.equal(inner.dynamic_labels, by_running)  # type: ignore[arg-type]
    # The guide still learns from its train-mode pass, which updates its statistics once.
    assert int(buffers(pair.guide)[2]) == int(before[2]) + 1
    inner, _ = Pair().run(batch, x_adv, guide_mode="train")
    assert torch.equal(inner.dynamic_labels, by_batch)  # type: ignore[arg-type]


def test_no_gradient_reaches_the_guide_from_the_models_loss(pair: Pair, batch: Batch, x_adv: Tensor) -> None:
    for options in ({}, {"label_type": "soft"}, {"inner_loss": "kl_guide"}):
        inner, outer = pair.run(batch, x_adv, **options)
        gradients = torch.autograd.grad(
            outer.losses["model"], list(pair.guide.parameters()), allow_unused=True
        )
        assert all(g is None for g in gradients)
        gradients = torch.autograd.grad(
            inner.losses["guide"], list(pair.model.parameters()), allow_unused=True
        )
        assert all(g is None for g in gradients)


@pytest.mark.parametrize("outer_label", ["dynamic", "true"])
@pytest.mark.parametrize("beta", [1.0, 0.2])
def test_hard_label_loss(pair: Pair, batch: Batch, x_adv: Tensor, outer_label: str, beta: float) -> None:
    inner, outer = pair.run(batch, x_adv, outer_label=outer_label, beta=beta)
    targets = inner.dynamic_labels if outer_label == "dynamic" else batch.labels
    expected = -pair.reference_model(x_adv).log_softmax(1)[torch.arange(8), targets].mean()
    torch.testing.assert_close(outer.losses["model"], beta * expected)
    guide = -pair.reference_guide(batch.x).log_softmax(1)[torch.arange(8), batch.labels].mean()
    torch.testing.assert_close(inner.losses["guide"], guide)
    assert float(outer.logs["label_agreement"]) == float(
        (inner.dynamic_labels == batch.labels).float().mean()
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_label_in_attack_and_loss(pair: Pair, batch: Batch, x_adv: Tensor, temperature: float) -> None:
    inner, outer = pair.run(batch, x_adv, label_type="soft", temperature=temperature)
    p = (pair.reference_guide(batch.x).detach() / temperature).softmax(1)
    assert inner.dynamic_labels is not None
    torch.testing.assert_close((inner.dynamic_labels / temperature).softmax(1), p)
    expected = -(p * pair.reference_model(x_adv).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(outer.losses["model"], expected)
    logits = torch.randn(8, 10, dtype=torch.float64)
    assert inner.goal is not None
    torch.testing.assert_close(inner.goal.per_image(logits), -(p * logits.log_softmax(1)).sum(1))


def test_inner_objectives(pair: Pair, batch: Batch, x_adv: Tensor) -> None:
    logits = torch.randn(8, 10, dtype=torch.float64)
    with torch.no_grad():
        guide_logits = pair.reference_guide(batch.x)
        own = pair.reference_model.eval()(batch.x).softmax(1)
    q, rows = logits.softmax(1), torch.arange(8)
    expected = {
        "ce_dynamic": -q.log()[rows, guide_logits.argmax(1)],
        "ce_true": -q.log()[rows, batch.labels],
        "kl_guide": (guide_logits.softmax(1) * (guide_logits.softmax(1) / q).log()).sum(1),
        "kl_self": (own * (own / q).log()).sum(1),
    }
    for name, value in expected.items():
        inner, _ = Pair().run(batch, x_adv, inner_loss=name)
        assert inner.goal is not None
        assert not inner.goal.target.requires_grad
        torch.testing.assert_close(inner.goal.per_image(logits), value, msg=name)


def test_the_extra_kl_differentiates_both_arguments_and_replaces_the_clean_pass(
    pair: Pair, batch: Batch, x_adv: Tensor
) -> None:
    inner, outer = pair.run(batch, x_adv, extra_kl_weight=0.7)
    outer.losses["model"].backward()
    reference = pair.reference_model
    attacked, clean = reference(x_adv), reference(batch.x)
    p, q = clean.softmax(1), attacked.softmax(1)
    loss = F.cross_entropy(attacked, inner.dynamic_labels) + 0.7 * (p * (p / q).log()).sum(1).mean()  # type: ignore[arg-type]
    loss.backward()
    torch.testing.assert_close(outer.losses["model"], loss)
    for a, b in zip(pair.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(buffers(pair.model), buffers(reference), strict=True):
        torch.testing.assert_close(a, b)


def test_the_clean_pass_weighs_the_running_statistics_as_in_the_release(batch: Batch, x_adv: Tensor) -> None:
    """r <- 0.81 r + 0.09 adv + 0.10 clean (A.5), and 0.9 r + 0.1 adv without it."""
    for clean_pass in (True, False):
        pair = Pair()
        conv, start = pair.model[0], pair.model[1].running_mean.clone()
        adv, clean = (conv(x).mean(dim=(0, 2, 3)) for x in (x_adv, batch.x))
        pair.run(batch, x_adv, bn_clean_forward=clean_pass)
        expected = 0.81 * start + 0.09 * adv + 0.10 * clean if clean_pass else 0.9 * start + 0.1 * adv
        torch.testing.assert_close(pair.model[1].running_mean, expected)


@pytest.mark.parametrize(
    "bad", [{"beta": 0.0}, {"beta": float("nan")}, {"temperature": 0.0}, {"extra_kl_weight": -1.0}]
)
def test_bad_options_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Dynat(DynatOptions(**bad))  # type: ignore[arg-type]
