"""Guided and distilled methods: whole steps against float64 transcriptions, limits, numerics, graphs."""

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compiled_training import weights_after
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.graphed_training import EPOCH, EPOCHS, make_step, train
from support.networks import tiny_cnn
from support.stepping import (
    CPU,
    EPS,
    LR,
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
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.network_modes import frozen_twin
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.methods import (
    METHODS,
    Adagat,
    AdagatOptions,
    Ard,
    ArdOptions,
    Distillation,
    DistillationOptions,
    Hat,
    HatOptions,
    Iad,
    IadOptions,
    Lbgat,
    LbgatOptions,
    Mail,
    MailOptions,
    Method,
    Natural,
    NaturalOptions,
    Networks,
    Rslad,
    RsladOptions,
)
from fastdynat.methods.base import unattacked
from fastdynat.methods.building_blocks import mean_kl
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep

Objective = Callable[[Tensor], Tensor]


# The formulas, in plain torch and float64.


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.softmax(1)[torch.arange(len(labels)), labels].log().mean()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def ascend(
    model: nn.Module, x: Tensor, start: Tensor, objective: Objective, *, training: bool = False
) -> Tensor:
    """Projected sign ascent on the sum of `objective`; leaves the model in train mode."""
    model.train(training)
    x_adv = start
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(model(x_adv)).sum(), x_adv)
        x_adv = x_adv.detach() + STEP * gradient.sign()
        x_adv = torch.max(torch.min(x_adv, x + EPS), x - EPS).clamp(0, 1)
    model.train()
    return x_adv.detach()


def ascend_ce(model: nn.Module, batch: Batch, start: Tensor, *, training: bool = False) -> Tensor:
    def objective(z: Tensor) -> Tensor:
        return -z.softmax(1)[torch.arange(N), batch.labels].log()

    return ascend(model, batch.x, start, objective, training=training)


def ascend_own_kl(model: nn.Module, batch: Batch, start: Tensor) -> Tensor:
    p = model.eval()(batch.x).softmax(1).detach()
    return ascend(model, batch.x, start, lambda z: kl(p, z.softmax(1)))


def lbgat(model: nn.Module, guide: nn.Module, batch: Batch, start: Tensor, **o: Any) -> Tensor:
    x_adv = ascend_own_kl(model, batch, start)
    attacked, clean, target = model(x_adv), model(batch.x), guide(batch.x)
    loss = ((attacked - target) ** 2).sum() / (N * K)
    loss = loss + o.get("pull", 0) * ((attacked.detach() - target) ** 2).sum() / (N * K)
    loss = loss + o.get("alpha", 0) * kl(clean.softmax(1), attacked.softmax(1)).mean()
    loss = loss + o.get("alp_weight", 0) * ((attacked - clean) ** 2).sum() / (N * K)
    (loss if o.get("freeze_guide") else loss + cross_entropy(target, batch.labels)).backward()
    return loss


def hat(model: nn.Module, guide: nn.Module, batch: Batch, start: Tensor, **o: Any) -> Tensor:
    x_adv = ascend_own_kl(model, batch, start)
    fooled_into = guide(x_adv).argmax(1)
    clean, attacked, helper = (
        model(batch.x),
        model(x_adv),
        model(batch.x + o["helper_scale"] * (x_adv - batch.x)),
    )
    loss = cross_entropy(clean, batch.labels) + o["beta"] * kl(clean.softmax(1), attacked.softmax(1)).mean()
    loss = loss + o["helper_weight"] * cross_entropy(helper, fooled_into)
    loss.backward()
    return loss


def ard(
    model: nn.Module, guide: nn.Module, batch: Batch, start: Tensor, training: bool = False, **o: Any
) -> Tensor:
    x_adv = ascend_ce(model, batch, start, training=training)
    alpha, t = o["alpha"], o["temperature"]
    p, q = (guide(batch.x) / t).softmax(1), (model(x_adv) / t).softmax(1)
    distilled = kl(p, q).mean() / {"entries": K, "batch": 1, "tenth": 10}[o["kl_mean"]]
    loss = alpha * t * t * distilled + (1 - alpha) * cross_entropy(model(batch.x), batch.labels)
    loss.backward()
    return loss


def rslad(model: nn.Module, guide: nn.Module, batch: Batch, start: Tensor, **o: Any) -> Tensor:
    p = guide(batch.x).softmax(1)
    x_adv = ascend(model, batch.x, start, lambda z: kl(p, z.softmax(1)))
    attacked = kl(p, model(x_adv).softmax(1)).mean() / 10
    loss = o["attacked_weight"] * attacked + o["clean_weight"] * kl(p, model(batch.x).softmax(1)).mean() / 10
    loss.backward()
    return loss


def iad(model: nn.Module, guide: nn.Module, batch: Batch, start: Tensor, late: bool, **o: Any) -> Tensor:
    """The released loops, with their own order and number of passes."""
    x_adv = ascend_ce(model, batch, start)
    first, alpha, t = o["variant"] == "I", o["alpha"], o["temperature"]
    attacked = model(x_adv)
    basic = model(batch.x) if first else None
    p = (guide(batch.x if first else x_adv) / t).softmax(1)
    taught = t * t * kl(p, (attacked / t).softmax(1))
    if late:
        trust = torch.stack([guide(x_adv).softmax(1)[i, batch.labels[i]] ** o["beta"] for i in range(N)])
        own = (1 - trust) * kl(model(batch.x).softmax(1), attacked.softmax(1))
        taught = taught + own if first else trust * taught + t * t * own
    loss = alpha * taught.mean() + (1 - alpha) * cross_entropy(
        attacked if basic is None else basic, batch.labels
    )
    loss.backward()
    return loss


def distillation(
    model: nn.Module, guide: nn.Module, batch: Batch, start: Tensor, temperature: float
) -> Tensor:
    p = (guide(batch.x) / temperature).softmax(1)
    loss = -(p * (model(batch.x) / temperature).softmax(1).log()).sum(1).mean()
    loss.backward()
    return loss


class Case(NamedTuple):
    """A method with the transcription that it must agree with."""

    method: Callable[[], Method[Any]]
    reference: Callable[..., Tensor]
    given: dict[str, Any]
    epoch: int = 0  # of 10
    attack_bn: str = "eval"


def case(
    cls: Any,
    options: Any,
    reference: Callable[..., Tensor],
    epoch: int = 0,
    attack_bn: str = "eval",
    **o: Any,
) -> Case:
    """`o` are options of the method and what the transcription reads."""
    extra = {"late": epoch >= 3} if reference is iad else {"training": True} if attack_bn == "train" else {}
    return Case(lambda: cls(options(**o)), reference, {**o, **extra}, epoch, attack_bn)


CASES = {
    "lbgat": case(Lbgat, LbgatOptions, lbgat, alpha=6.0),
    "lbgat-0": case(Lbgat, LbgatOptions, lbgat, alpha=0.0),
    "lbgat-alp": case(Lbgat, LbgatOptions, lbgat, alpha=0.0, alp_weight=1.0),
    "lbgat-frozen": case(Lbgat, LbgatOptions, lbgat, alpha=2.0, alp_weight=0.5, freeze_guide=True),
    "adagat": case(Adagat, AdagatOptions, lbgat),
    "adagat-pull": case(Adagat, AdagatOptions, lbgat, pull=2.5),
    "hat": case(Hat, HatOptions, hat, beta=2.5, helper_weight=0.5, helper_scale=2.0),
    "ard": case(Ard, ArdOptions, ard, alpha=1.0, temperature=30.0, kl_mean="entries"),
    "ard-mixed": case(Ard, ArdOptions, ard, alpha=0.7, temperature=4.0, kl_mean="batch"),
    "ard-as-released": case(
        Ard, ArdOptions, ard, attack_bn="train", alpha=1.0, temperature=30.0, kl_mean="entries"
    ),
    "rslad": case(Rslad, RsladOptions, rslad, attacked_weight=5 / 6, clean_weight=1 / 6),
    "iad-1-early": case(
        Iad, IadOptions, iad, 2, variant="I", alpha=1.0, temperature=2.0, beta=0.1, begin=0.3
    ),
    "iad-1-late": case(Iad, IadOptions, iad, 3, variant="I", alpha=0.8, temperature=2.0, beta=0.1, begin=0.3),
    "iad-2-early": case(
        Iad, IadOptions, iad, 2, variant="II", alpha=0.5, temperature=2.0, beta=0.1, begin=0.3
    ),
    "iad-2-late": case(
        Iad, IadOptions, iad, 9, variant="II", alpha=0.5, temperature=2.0, beta=0.5, begin=0.3
    ),
    "distillation": case(Distillation, DistillationOptions, distillation, temperature=20.0),
}


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def stepped(
    name: str, model: nn.Module, guide: nn.Module, batch: Batch, **kwargs: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """The logs of one step of case `name`, and the start of its attack."""
    spec = CASES[name]
    method = spec.method()
    start = method.attack_defaults.start
    method.epochs = 10
    step = train_step(method, model, guide, attack_bn=spec.attack_bn, start=start, **kwargs)
    step.start_epoch(spec.epoch)
    drawn = drawn_start(batch.x, start)
    return step(batch), drawn


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_the_float64_transcription(name: str, batch: Batch) -> None:
    model, guide = moved_network(1), moved_network(2)
    reference, reference_guide = copy.deepcopy(model), copy.deepcopy(guide)
    spec = CASES[name]
    logs, start = stepped(name, model, guide, batch)
    learning = "guide" in spec.method().trains
    reference_guide.train(learning).requires_grad_(learning)
    loss = spec.reference(reference, reference_guide, batch, start, **spec.given)
    torch.testing.assert_close(logs["loss"], loss.detach())
    assert_same_step(model, reference)
    if learning:
        assert_same_step(guide, reference_guide)
    else:
        frozen = reference_guide.state_dict()
        assert all(torch.equal(value, frozen[key]) for key, value in guide.state_dict().items())
        assert not any(module.training for module in guide.modules())


# Limits.


def updated(method: Method[Any], batch: Batch, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logs of a step and the model's weights after it; always the same networks and draws."""
    model, guide = moved_network(1), moved_network(2) if method.uses_guide else None
    step = train_step(method, model, guide, start=method.attack_defaults.start, **kwargs)
    torch.manual_seed(3)
    return step(batch), dict(model.named_parameters())


def assert_equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    torch.testing.assert_close(list(a.values()), list(b.values()), rtol=1e-12, atol=1e-12)


def test_released_adagat_is_lbgat_at_alpha_0(batch: Batch) -> None:
    results = [updated(m, batch) for m in (Adagat(AdagatOptions()), Lbgat(LbgatOptions(alpha=0.0)))]
    assert_equal_weights(results[0][1], results[1][1])


def test_the_pull_of_adagat_moves_only_the_guide(batch: Batch) -> None:
    results = [updated(Adagat(AdagatOptions(pull=pull)), batch) for pull in (0.0, 2.5)]
    assert_equal_weights(results[0][1], results[1][1])
    guides = [moved_network(2) for _ in range(2)]
    for guide, pull in zip(guides, (0.0, 2.5), strict=True):
        torch.manual_seed(3)
        train_step(Adagat(AdagatOptions(pull=pull)), moved_network(1), guide)(batch)
    assert not torch.allclose(guides[0][0].weight, guides[1][0].weight)


def test_hat_without_helpers_is_trades(batch: Batch) -> None:
    model = moved_network(1)
    logs, weights = updated(Hat(HatOptions(beta=2.5, helper_weight=0.0)), batch)
    torch.manual_seed(3)
    x_adv = ascend_own_kl(model, batch, drawn_start(batch.x, "gaussian"))
    clean, attacked = model(batch.x), model(x_adv)
    loss = cross_entropy(clean, batch.labels) + 2.5 * kl(clean.softmax(1), attacked.softmax(1)).mean()
    loss.backward()
    torch.testing.assert_close(logs["loss"], loss.detach())
    assert_equal_weights(weights, {name: p - LR * p.grad for name, p in model.named_parameters()})  # type: ignore[operator]


def test_ard_without_distillation_is_natural_training(batch: Batch) -> None:
    left, right = updated(Ard(ArdOptions(alpha=0.0)), batch), updated(Natural(NaturalOptions()), batch)
    torch.testing.assert_close(left[0]["loss"], right[0]["loss"])
    assert_equal_weights(left[1], right[1])


def test_distillation_from_oneself_at_any_temperature_teaches_nothing(batch: Batch) -> None:
    model = moved_network(1)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    nets = Networks(model, model, model, model, model)
    method = Distillation(DistillationOptions(temperature=5.0))
    method.outer(nets, batch, method.inner(nets, batch), unattacked(batch.x)).losses["model"].backward()
    assert all(float(p.grad.abs().max()) < 1e-15 for p in model.parameters())  # type: ignore[union-attr]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("variant", ["I", "II"])
def test_iad_that_trusts_always_is_iad_before_it_begins(variant: Any, batch: Batch) -> None:
    late, early = (
        Iad(IadOptions(variant=variant, beta=beta, begin=begin)) for beta, begin in ((0.0, 0.0), (0.1, 1.0))
    )
    results = [updated(m, batch) for m in (late, early)]
    assert (late.introspective(), early.introspective()) == (True, False)
    torch.testing.assert_close(results[0][0]["loss"], results[1][0]["loss"])
    assert_equal_weights(results[0][1], results[1][1])


def test_iad_begins_in_the_published_epochs() -> None:
    for variant, first in (("I", 60), ("II", 40)):
        method = Iad(IadOptions(variant=variant))  # type: ignore[arg-type]
        method.epochs = 200
        seen = []
        for method.epoch in range(200):
            seen.append((method.introspective(), method.constants()))
        assert seen == [(epoch >= first, (epoch >= first,)) for epoch in range(200)]


@pytest.mark.parametrize("share", ["0", "0.2", "0.3", "0.55", "0.625", "0.7", "1"])
def test_what_begins_later_begins_once_its_share_of_the_epochs_is_completed(share: str) -> None:
    introspection = Iad(IadOptions(begin=float(share)))
    weights = Mail(MailOptions(weight_from=float(share)))
    for epochs in (*range(1, 11), 40, 100):
        introspection.epochs = weights.epochs = epochs
        for epoch in range(epochs):
            introspection.epoch = weights.epoch = epoch
            completed = Fraction(epoch, epochs) >= Fraction(share)
            assert introspection.introspective() == weights.weighted() == completed, (epoch, epochs)


def test_rslad_is_linear_in_its_weights(batch: Batch) -> None:
    def loss(attacked: float, clean: float, **o: Any) -> Tensor:
        return updated(Rslad(RsladOptions(attacked_weight=attacked, clean_weight=clean, **o)), batch)[0][
            "loss"
        ]

    torch.testing.assert_close(loss(5 / 6, 1 / 6), 5 / 6 * loss(1, 0) + 1 / 6 * loss(0, 1))
    by_batch = loss(5 / 6, 1 / 6, kl_mean="batch")
    torch.testing.assert_close(loss(5 / 6, 1 / 6, kl_mean="entries"), by_batch / K)
    torch.testing.assert_close(loss(5 / 6, 1 / 6), by_batch / 10)


@pytest.mark.parametrize(
    ("on", "off"),
    [
        (Lbgat(LbgatOptions(alpha=0.0)), Lbgat(LbgatOptions(alpha=0.0, bn_clean_forward=False))),
        (Ard(ArdOptions()), Ard(ArdOptions(bn_clean_forward=False))),
        (Iad(IadOptions()), Iad(IadOptions(bn_clean_passes=False))),
    ],
)
def test_unused_clean_passes_move_only_running_statistics(
    on: Method[Any], off: Method[Any], batch: Batch
) -> None:
    models = [moved_network(1), moved_network(1)]
    for method, model in zip((on, off), models, strict=True):
        method.epochs = 10
        torch.manual_seed(3)
        train_step(method, model, moved_network(2), start=method.attack_defaults.start)(batch)
    assert_equal_weights(*(dict(model.named_parameters()) for model in models))
    assert [int(model[1].num_batches_tracked) for model in models] == [3, 2]  # moved_network counts one


# Numbers.


@pytest.mark.parametrize("gap", [150.0, 1000.0])
def test_kl_of_certain_predictions_is_their_gap(gap: float) -> None:
    """p and q on different classes: the KL is the gap, its gradient the difference; at p there is none."""
    p, q = ((gap * nn.functional.one_hot(torch.tensor([i]), K)).requires_grad_() for i in (0, 1))
    loss = mean_kl(p, q)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(gap))
    assert q.grad is not None
    assert p.grad is not None
    torch.testing.assert_close(q.grad, torch.tensor([[-1.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(p.grad, torch.zeros(1, K), atol=1e-4, rtol=0)


@settings(deadline=None)
@given(st.lists(st.floats(-2000, 2000, width=32), min_size=2 * K, max_size=2 * K), st.floats(0.5, 50))
def test_kl_is_finite_and_a_divergence(values: list[float], temperature: float) -> None:
    p, q = torch.tensor(values).view(2, 1, K).unbind()
    p, q = p.clone().requires_grad_(), q.clone().requires_grad_()
    loss = mean_kl(p, q, temperature=temperature)
    loss.backward()
    value = float(loss.detach())
    assert math.isfinite(value)
    assert value > -1e-4
    assert float(mean_kl(p, p, temperature=temperature).detach()) == 0
    for logits in (p, q):
        assert logits.grad is not None
        assert abs(float(logits.grad.sum())) <= 1e-3 * max(
            1.0, value
        )  # adding a constant to logits changes nothing


class Certain(nn.Module):
    """Certain, by `gap`, of a class by the image alone, and of another one for brighter images."""

    def __init__(self, gap: float, first: int, dtype: torch.dtype) -> None:
        super().__init__()
        classes = (torch.arange(N) + first) % K
        self.z, self.dtype = nn.Parameter(gap * nn.functional.one_hot(classes, K).float()), dtype

    def forward(self, x: Tensor) -> Tensor:
        return (self.z.roll(1, 1) if float(x.mean()) > 1 else self.z).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [150.0, 1000.0])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_finite_and_float32_at_any_gap(
    name: str, gap: float, dtype: torch.dtype
) -> None:
    method = CASES[name].method()
    method.epoch, method.epochs = CASES[name].epoch, 10
    model, guide = Certain(gap, 0, dtype), Certain(gap, 2, dtype)
    guide.requires_grad_("guide" in method.trains)
    nets = Networks(model, frozen_twin(model, "eval"), model, guide, frozen_twin(guide, "eval"))
    batch = Batch(torch.rand(N, 3, 8, 8), torch.randint(K, (N,)), torch.arange(N))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        inner = method.inner(nets, batch)
        outer = method.outer(nets, batch, inner, unattacked(batch.x + 1))
    losses = [*inner.losses.values(), *outer.losses.values()]
    assert all(loss.dtype == torch.float32 for loss in losses)
    torch.stack(losses).sum().backward()
    assert all(loss.isfinite() for loss in losses)
    assert model.z.grad is not None
    assert model.z.grad.isfinite().all()
    assert ("guide" in method.trains) == (guide.z.grad is not None)
    assert guide.z.grad is None or guide.z.grad.isfinite().all()
    assert all(value.isfinite().all() for value in outer.logs.values())


# Options.


@pytest.mark.parametrize(
    ("cls", "bad", "message"),
    [
        (Lbgat, {"alpha": -1.0}, "alpha must be >= 0, got -1"),
        (Lbgat, {"alp_weight": math.nan}, "alp_weight must be >= 0, got nan"),
        (Adagat, {"pull": -2.5}, "pull must be >= 0"),
        (Adagat, {"pull": 2.5, "freeze_guide": True}, "use --pull 0"),
        (Hat, {"beta": -1.0}, "beta must be >= 0"),
        (Hat, {"helper_weight": math.inf}, "helper_weight must be >= 0, got inf"),
        (Hat, {"helper_scale": -1.0}, "helper_scale must be >= 0"),
        (Ard, {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        (Ard, {"temperature": 0.0}, "temperature must be above 0, got 0"),
        (Rslad, {"attacked_weight": -1.0}, "attacked_weight must be >= 0"),
        (Rslad, {"clean_weight": -1.0}, "clean_weight must be >= 0"),
        (Iad, {"alpha": -0.5}, r"alpha must be in \[0, 1\]"),
        (Iad, {"begin": 60.0}, r"begin must be in \[0, 1\], got 60"),
        (Iad, {"beta": -0.1}, "beta must be >= 0"),
        (Iad, {"temperature": 0.0}, "temperature must be above 0"),
        (Distillation, {"temperature": 0.0}, "temperature must be above 0"),
        (Natural, {"temperature": -1.0}, "temperature must be above 0"),
    ],
)
def test_bad_options_are_named(cls: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls(cls.options_type(**bad))


def test_what_trains_a_guide_exists() -> None:
    for cls in METHODS.values():
        name, *flags = cls(cls.options_type()).guide_made_by.split()
        assert name in METHODS
        assert not flags or flags[0].removeprefix("--") in METHODS[name].options_type.__dataclass_fields__


# The engine's ways of running a step.


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].method().searches])
def test_weight_perturbation_goes_around_every_method(name: str, batch: Batch) -> None:
    model, guide = moved_network(1), moved_network(2)
    plain, plain_guide = moved_network(1), moved_network(2)
    before = copy.deepcopy(dict(model.named_parameters()))
    torch.manual_seed(3)
    logs, _ = stepped(name, model, guide, batch, awp=0.01)
    torch.manual_seed(3)
    stepped(name, plain, plain_guide, batch)
    assert logs["loss"].isfinite()
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p, before[key] - LR * p.grad, rtol=1e-12, atol=1e-12
        )  # the perturbation is gone
        if p.dim() >= 2:
            assert not torch.allclose(p.grad, q.grad, rtol=1e-6), key  # and was there


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_captured_step_trains_bit_for_bit_like_the_plain_one(name: str, amp: str) -> None:
    recorder = SimulatedRecorder()
    graphed = make_step(CASES[name].method(), "cpu", amp, recorder, fallbacks=NoFallbacks())
    got, want = train(graphed), train(make_step(CASES[name].method(), "cpu", amp))
    assert recorder.replayed == len(EPOCH) * EPOCHS - len(set(EPOCH)) * WARM_UP_CALLS
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


@pytest.mark.gpu
@needs("gpu")
@pytest.mark.parametrize("name", ["lbgat", "adagat-pull", "hat"])
def test_the_guides_stream_changes_nothing(name: str) -> None:
    """LBGAT's loss of the model goes back through a graph that was made on the guide's stream."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        streams = (None, torch.cuda.Stream())
        got, want = (train(make_step(CASES[name].method(), "cuda", guide_stream=s), "cuda") for s in streams)
    torch.testing.assert_close(got[1], want[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("variant", ["I", "II"])
def test_iads_second_phase_is_another_graph(variant: Any) -> None:
    def run(recorder: SimulatedRecorder | None) -> tuple[list[dict[str, float]], Tensor]:
        method = Iad(IadOptions(variant=variant, begin=0.5))
        step = make_step(method, "cpu", recorder=recorder)
        method.epochs = 2
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(5)
        logs = []
        for epoch in range(2):
            step.start_epoch(epoch)
            for _ in range(WARM_UP_CALLS + 2):
                x, labels = (
                    torch.rand(6, 3, 8, 8, generator=generator),
                    torch.randint(10, (6,), generator=generator),
                )
                logs.append(
                    {key: float(value) for key, value in step(Batch(x, labels, torch.arange(6))).items()}
                )
        return logs, torch.cat(
            [t.detach().double().flatten() for t in step.networks.raw["model"].state_dict().values()]
        )

    recorder = SimulatedRecorder()
    got, want = run(recorder), run(None)
    assert (recorder.captured, recorder.replayed) == (2, 4)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])
    trusts = [row["trust"] for row in got[0]]
    assert all(trust == 1 for trust in trusts[: WARM_UP_CALLS + 2])
    assert all(0 < trust < 1 for trust in trusts[WARM_UP_CALLS + 2 :])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # Inductor's own
@needs("cxx")
@pytest.mark.parametrize(
    "name",
    ["lbgat", "lbgat-0", "lbgat-frozen", "adagat-pull", "hat", "ard", "rslad", "iad-1-late", "iad-2-late"],
)
def test_compiled_without_graph_breaks_and_with_eagers_numbers(name: str) -> None:
    def weights(mode: str) -> Tensor:
        method = CASES[name].method()
        method.epochs = 10
        networks = NetworkSet(
            tiny_cnn(0),
            tiny_cnn(1),
            frozen_guide="guide" not in method.trains,
            image_shape=(3, 8, 8),
            device=CPU,
            attack=AttackSwitches(compile=mode),
            compile_mode=mode,
            fallbacks=NoFallbacks(),
        )
        # Next to the image, where a KL from it is flat, rounding would decide on the sign of its gradient.
        spec, optim = PGDSpec(0.1, 0.05, 3, start="uniform"), OptimConfig(lr=0.1, epochs=1)
        step = TrainStep(method, networks, spec, optim, Precision("off", CPU), lambda n: 1.0)
        step.start_epoch(CASES[name].epoch)
        return weights_after(step, epochs=1)

    counters.clear()
    got = weights("default")
    assert not counters["graph_break"]
    torch.testing.assert_close(got, weights("off"), rtol=0, atol=1e-5)
