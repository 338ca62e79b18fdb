"""TRADES, MART, ALP, mixed batches, GAIRAT, MAIL, DYNAT's weightings against float64 transcriptions.

One step each against loops written from the formulas without our code; their limits; captured, compiled, and
from the command line.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import needs
from hypothesis import given
from hypothesis import strategies as st
from support.classical_references import EPOCH, mean_ce, mean_kl, train
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step
from support.networks import tiny_cnn
from support.stepping import (
    STEPS,
    K,
    N,
    assert_same_step,
    drawn_start,
    make_batch,
    moved_network,
    tiny_network,
    train_step,
)
from support.transcriptions import attack, ce_goal, kl_goal, log_probs
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.commands.main import main
from fastdynat.commands.train import early_flags, parse_train
from fastdynat.config import OptimConfig
from fastdynat.data import Batch, dataset_info
from fastdynat.distributed.shares import deal
from fastdynat.errors import UserError
from fastdynat.execution.graph_capture import CudaRecorder
from fastdynat.methods import (
    Alp,
    AlpOptions,
    Arda,
    ArdaOptions,
    Dynat,
    DynatOptions,
    Gairat,
    GairatOptions,
    Madry,
    MadryOptions,
    Mail,
    MailOptions,
    Mart,
    MartOptions,
    Method,
    Natural,
    NaturalOptions,
    Networks,
    Trades,
    TradesOptions,
)
from fastdynat.methods.base import unattacked
from fastdynat.methods.weighting import gairat_weights, mail_weights
from fastdynat.training import resolve as resolving
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep


@pytest.fixture
def batch() -> Batch:
    return make_batch()


# Transcriptions


def trades(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, beta: float = 6.0, third_pass: bool = True
) -> Tensor:
    x_adv, _ = attack(model, x, start, kl_goal(model, x))
    clean, adv = log_probs(model(x)), log_probs(model(x_adv))
    if third_pass:
        model(x)
    return mean_ce(clean, y, [1.0] * N) + beta * mean_kl(clean, adv, [1.0] * N)


def mart(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, beta: float = 6.0, floor: float = 0.0
) -> Tensor:
    x_adv, _ = attack(model, x, start, ce_goal(y))
    clean, adv = log_probs(model(x)), log_probs(model(x_adv))
    bce = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        rival = max(adv[i, k].exp() for k in range(K) if k != y[i])
        bce = bce - adv[i, y[i]] - torch.log(floor + 1 - rival)
    wrong = [1 - clean[i, y[i]].exp() for i in range(N)]
    return bce / N + (beta * mean_kl(clean, adv, wrong) if beta else 0.0)


def alp(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, pairing: float = 1.0) -> Tensor:
    x_adv, _ = attack(model, x, start, ce_goal(y))
    clean, adv = model(x), model(x_adv)
    halves = 0.5 * mean_ce(log_probs(clean), y, [1.0] * N) + 0.5 * mean_ce(log_probs(adv), y, [1.0] * N)
    return halves + (pairing * ((clean - adv) ** 2).sum() / (N * K) if pairing else 0.0)  # type: ignore[no-any-return]


def arda(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, loss_share: float) -> Tensor:
    attacked = len(start)
    x_adv, _ = attack(model, x[:attacked], start, ce_goal(y))
    losses = [-log_p[y[i]] for i, log_p in enumerate(log_probs(model(torch.cat([x_adv, x[attacked:]]))))]
    return loss_share * sum(losses[:attacked]) / attacked + (1 - loss_share) * sum(losses[attacked:]) / (
        N - attacked
    )  # type: ignore[no-any-return]


def geometric_weights(y: Tensor, predictions: list[list[int]], lam: float) -> list[float]:
    kappa = [seen.count(int(label)) for seen, label in zip(predictions, y, strict=True)]
    assert len(set(kappa)) > 1
    raw = [1 + math.tanh(lam + 5 * (1 - 2 * k / STEPS)) for k in kappa]
    return [w * N / sum(raw) for w in raw]


def margin_weights(
    log_q: Tensor, y: Tensor, slope: float, bias: float, normalized: bool = False
) -> list[float]:
    q = log_q.detach().exp()
    margins = [max(float(q[i, k]) for k in range(K) if k != y[i]) - float(q[i, y[i]]) for i in range(N)]
    raw = [1 / (1 + math.exp(-slope * (m + bias))) for m in margins]
    return [w * N / sum(raw) if normalized else 3 * w for w in raw]


def gairat(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, lam: float = -1.0) -> Tensor:
    x_adv, predictions = attack(model, x, start, ce_goal(y))
    return mean_ce(log_probs(model(x_adv)), y, geometric_weights(y, predictions, lam))  # type: ignore[no-any-return]


def mail(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, normalized: bool = False) -> Tensor:
    x_adv, _ = attack(model, x, start, ce_goal(y))
    adv = log_probs(model(x_adv))
    return mean_ce(adv, y, margin_weights(adv, y, 10.0, -0.5, normalized))  # type: ignore[no-any-return]


def mail_trades(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    x_adv, _ = attack(model, x, start, kl_goal(model, x))
    clean, adv = log_probs(model(x)), log_probs(model(x_adv))
    return mean_ce(clean, y, [1.0] * N) + 5 * mean_kl(clean, adv, margin_weights(adv, y, 2.0, 0.0))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A method in the fourth of four epochs, its transcription, and how many images are attacked."""

    method: Callable[[], Method[Any]]
    reference: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    attacked: int = N


CASES = {
    "trades": Case(lambda: Trades(TradesOptions()), trades),
    "trades-two-passes": Case(
        lambda: Trades(TradesOptions(beta=1.5, bn_third_pass=False)),
        lambda *a: trades(*a, beta=1.5, third_pass=False),
    ),
    "mart": Case(lambda: Mart(MartOptions()), mart),
    "mart-released": Case(lambda: Mart(MartOptions(floor=1e-4)), lambda *a: mart(*a, floor=1e-4)),
    "mart-bce": Case(lambda: Mart(MartOptions(beta=0.0)), lambda *a: mart(*a, beta=0.0)),
    "alp": Case(lambda: Alp(AlpOptions()), alp),
    "alp-halves": Case(lambda: Alp(AlpOptions(logit_pairing=0.0)), lambda *a: alp(*a, pairing=0.0)),
    "arda": Case(lambda: Arda(ArdaOptions()), lambda *a: arda(*a, loss_share=0.5), N // 2),
    "arda-kurakin": Case(
        lambda: Arda(ArdaOptions(adversarial_share=0.3, loss_share=0.23)),
        lambda *a: arda(*a, loss_share=0.23),
        2,
    ),
    "gairat": Case(lambda: Gairat(GairatOptions()), gairat),
    "gairat-lam": Case(lambda: Gairat(GairatOptions(lam=2.0)), lambda *a: gairat(*a, lam=2.0)),
    "mail": Case(lambda: Mail(MailOptions()), mail),
    "mail-normalized": Case(
        lambda: Mail(MailOptions(weight_scale="normalized")), lambda *a: mail(*a, normalized=True)
    ),
    "mail-trades": Case(lambda: Mail(MailOptions(base="trades")), mail_trades),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_the_transcription(name: str, batch: Batch) -> None:
    case, model = CASES[name], moved_network(1)
    reference = copy.deepcopy(model)
    method = case.method()
    start = method.attack_defaults.start
    assert start == ("uniform" if name.startswith(("arda", "gairat")) else "gaussian")
    step = train_step(method, model, None, start=start)
    method.epochs = 4
    step.start_epoch(3)
    x_start = drawn_start(batch.x[: case.attacked], start)
    logs = step(batch)
    loss = case.reference(reference, batch.x, batch.labels, x_start)
    loss.backward()
    torch.testing.assert_close(logs["loss"], loss.detach())
    assert_same_step(model, reference)


@pytest.mark.parametrize("labels", ["dynamic", "true"])
@pytest.mark.parametrize("weighting", ["gairat", "mail"])
def test_weighted_dynat_equals_the_transcription(weighting: Any, labels: Any, batch: Batch) -> None:
    """A.8's hybrid: l_nat in attack and loss, weights on the images' cross-entropy."""
    model, guide = moved_network(1), tiny_network(2)
    reference, reference_guide = copy.deepcopy(model), copy.deepcopy(guide)
    inner_loss: Any = "ce_true" if labels == "true" and weighting == "gairat" else "ce_dynamic"
    options = DynatOptions(
        weighting=weighting, weight_labels=labels, beta=0.7, inner_loss=inner_loss, slope=3.0, bias=0.2
    )
    step = train_step(Dynat(options), model, guide)
    step.method.epochs = 4
    step.start_epoch(3)
    x_start = drawn_start(batch.x, "gaussian")
    logs = step(batch)

    guide_logits = reference_guide(batch.x)
    dynamic = torch.tensor([int(guide_logits[i].argmax()) for i in range(N)])
    counted = batch.labels if labels == "true" else dynamic
    assert not torch.equal(dynamic, batch.labels)
    x_adv, predictions = attack(
        reference, batch.x, x_start, ce_goal(batch.labels if inner_loss == "ce_true" else dynamic)
    )
    adv = log_probs(reference(x_adv))
    weights = (
        geometric_weights(counted, predictions, -1.0)
        if weighting == "gairat"
        else margin_weights(adv, counted, 3.0, 0.2)
    )
    loss = 0.7 * mean_ce(adv, dynamic, weights)
    (loss + mean_ce(log_probs(guide_logits), batch.labels, [1.0] * N)).backward()
    reference(batch.x)
    torch.testing.assert_close(logs["loss"], loss.detach())
    assert_same_step(model, reference)
    assert_same_step(guide, reference_guide)


# Limits


def states_after(
    method: Method[Any], batch: Batch, *, epoch: int = 0, updates: int = 3, **kwargs: Any
) -> dict[str, Tensor]:
    model = tiny_network(1).float()
    step = train_step(method, model, None, **kwargs)
    method.epochs = 4
    step.start_epoch(epoch)
    torch.manual_seed(3)
    for _ in range(updates):
        step(Batch(batch.x.float(), batch.labels, batch.indices))
    return model.state_dict()


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left)


def test_trades_without_its_kl_updates_as_natural_training(batch: Batch) -> None:
    got = states_after(Trades(TradesOptions(beta=0.0)), batch)
    want = states_after(Natural(NaturalOptions()), batch)
    parameters = [key for key in want if key.endswith(("weight", "bias"))]
    assert parameters
    for key in parameters:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=1e-6, msg=key)
    assert (int(got["1.num_batches_tracked"]), int(want["1.num_batches_tracked"])) == (9, 3)


def test_mixed_batches_of_one_kind_are_natural_and_madry_bitwise(batch: Batch) -> None:
    for share, other in ((0.0, Natural(NaturalOptions())), (1.0, Madry(MadryOptions()))):
        got = states_after(Arda(ArdaOptions(adversarial_share=share)), batch)
        assert equal(got, states_after(other, batch))
    assert not equal(got, states_after(Arda(ArdaOptions()), batch))


def test_gairat_is_madry_before_its_start_and_with_equal_kappas_bitwise(batch: Batch) -> None:
    madry = states_after(Madry(MadryOptions()), batch)
    assert equal(states_after(Gairat(GairatOptions()), batch, epoch=1), madry)
    assert not equal(states_after(Gairat(GairatOptions()), batch, epoch=2), madry)
    # Labels that no such small step leaves: kappa is S everywhere.
    labels = tiny_network(1).eval()(batch.x).argmax(1)
    still = replace(batch, labels=labels)
    spec = PGDSpec(1e-6, 1e-6, STEPS)
    got = states_after(Gairat(GairatOptions()), still, epoch=2, updates=1, spec=spec)
    assert equal(got, states_after(Madry(MadryOptions()), still, updates=1, spec=spec))


@pytest.mark.parametrize("base", ["at", "trades"])
def test_mail_is_its_base_before_its_start_bitwise(batch: Batch, base: Any) -> None:
    other = Madry(MadryOptions()) if base == "at" else Trades(TradesOptions(beta=5.0, bn_third_pass=False))
    assert equal(states_after(Mail(MailOptions(base=base)), batch, epoch=2), states_after(other, batch))
    assert not equal(states_after(Mail(MailOptions(base=base)), batch, epoch=3), states_after(other, batch))


# Weights


@given(
    kept=st.lists(st.integers(0, 7), min_size=1, max_size=20),
    lam=st.floats(-50, 50),
)
def test_gairats_weights(kept: list[int], lam: float) -> None:
    """Mean 1, finite, never higher for an image that resisted longer."""
    count = torch.tensor(kept)
    weights = gairat_weights(
        AttackResult(torch.rand(len(kept), 1), torch.zeros(()), 7 * len(kept), count, steps=7), lam
    )
    torch.testing.assert_close(weights.mean(), torch.ones((), dtype=torch.float64))
    assert bool((weights[count.argsort()].diff() <= 1e-12).all())


@given(seed=st.integers(0, 2**20), size=st.floats(0, 200), slope=st.floats(0, 50), bias=st.floats(-2, 2))
def test_mails_normalized_weights(seed: int, size: float, slope: float, bias: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(9, K, generator=generator)).requires_grad_()
    labels = torch.randint(K, (9,), generator=generator)
    weights = mail_weights(logits, labels, slope=slope, bias=bias, scale="normalized")
    torch.testing.assert_close(weights.mean(), torch.ones(()))
    released = mail_weights(logits, labels, slope=slope, bias=bias)
    assert not released.requires_grad
    assert 0 <= float(released.min()) <= float(released.max()) <= 3
    torch.testing.assert_close(weights * released.mean(), released, rtol=1e-4, atol=1e-5)


def test_iterates_that_keep_the_class_are_counted(batch: Batch) -> None:
    """Away from the clean prediction, by two measures; the independent count has its own attack."""
    model = moved_network(1)
    step = train_step(Gairat(GairatOptions()), model, None)
    labels = copy.deepcopy(model).eval()(batch.x).argmax(1)
    start = drawn_start(batch.x, "uniform")
    _, predictions = attack(copy.deepcopy(model), batch.x, start, ce_goal(labels))
    expected = [seen.count(int(label)) for seen, label in zip(predictions, labels, strict=True)]
    assert len(set(expected)) > 1
    step.networks.attack.refresh()
    for goal in (
        AttackGoal("ce", labels, track=True),
        AttackGoal("ce", nn.functional.one_hot(labels, K).double(), track=True),
    ):
        kept = step.networks.attack.run(batch.x, goal, step.spec, x_start=start).kept
        assert kept is not None
        assert kept.tolist() == expected


@pytest.mark.parametrize("algorithm", ["pgd", "apgd"])
def test_gairats_weights_of_the_worst_of_equal_attacks_are_those_of_one(batch: Batch, algorithm: str) -> None:
    model = moved_network(1)
    step = train_step(Gairat(GairatOptions()), model, None)
    labels = copy.deepcopy(model).eval()(batch.x).argmax(1)
    goal, spec = AttackGoal("ce", labels, track=True), replace(step.spec, algorithm=algorithm)
    start = drawn_start(batch.x, "uniform")
    one, worst = (
        Attacker(step.networks.attack, spec, others=others)(batch.x, goal, x_start=start)
        for others in ((), (spec,))
    )
    assert one.kept is not None
    # The formula with S = steps, written out: the attack of one norm is right, too.
    raw = 1 + torch.tanh(-1 + 5 * (1 - 2 * one.kept.double() / STEPS))
    expected = raw / raw.mean()
    assert expected.unique().numel() > 1
    for attacked in (one, worst):
        torch.testing.assert_close(gairat_weights(attacked, -1.0), expected)


# Extreme logits

WEIGHTED = DynatOptions(weighting="mail", weight_from=0.0)
EXTREME = {
    **{name: case.method for name, case in CASES.items()},
    "dynat-mail": lambda: Dynat(WEIGHTED),
    "dynat-gairat": lambda: Dynat(replace(WEIGHTED, weighting="gairat")),
}


@pytest.mark.parametrize("gap", [0.0, 150.0, 1000.0])
@pytest.mark.parametrize("name", EXTREME)
def test_finite_at_any_gap(name: str, gap: float) -> None:
    """Confident right, confident wrong and undecided logits, clean and attacked, in all combinations."""
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [-1, 0, 0, 0]])
    clean, adv = (rows[index] for index in torch.cartesian_prod(torch.arange(5), torch.arange(5)).T)
    scale = nn.Parameter(torch.full((4,), gap))

    def network(x: Tensor) -> Tensor:
        return x.flatten(1) * scale

    batch = Batch(clean[:, :, None, None], torch.zeros(25, dtype=torch.int64), torch.arange(25))
    method = EXTREME[name]()
    method.epochs, method.epoch = 4, 3
    nets = Networks(network, network, network, network, network)
    inner = method.inner(nets, batch)
    attacked = replace(unattacked(adv[:, :, None, None]), kept=torch.arange(25) % 4, gradients=3 * 25)
    losses = {**inner.losses, **method.outer(nets, batch, inner, attacked).losses}
    for loss in (*losses.values(), method.awp_loss(nets, batch, inner, attacked)):
        (grad,) = torch.autograd.grad(loss, scale, retain_graph=True)
        assert bool(loss.isfinite())
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("gap", [150.0, 1000.0])
def test_marts_loss_keeps_its_size_where_probabilities_underflow(gap: float) -> None:
    """Logits (gap, 0, 0, 0) and label 1: -log p_1 = gap and -log(1 - p_0) = gap - log 3, in float32."""
    logits = torch.tensor([[gap, 0.0, 0.0, 0.0]])

    def network(x: Tensor) -> Tensor:
        return logits

    batch = Batch(torch.rand(1, 3, 8, 8), torch.tensor([1]), torch.arange(1))
    for floor, second in ((0.0, gap - math.log(3)), (1e-4, -math.log(1e-4))):
        method, nets = Mart(MartOptions(floor=floor)), Networks(network, network, network)
        loss = method.outer(nets, batch, method.inner(nets, batch), unattacked(batch.x)).losses["model"]
        assert float(loss) == pytest.approx(gap + second, rel=1e-6)


# Captured and compiled

RUNS: dict[str, Callable[[], Method[Any]]] = {
    "trades": CASES["trades"].method,
    "mart": CASES["mart-released"].method,
    "alp": CASES["alp"].method,
    "arda": CASES["arda-kurakin"].method,
    "gairat": CASES["gairat"].method,
    "mail": CASES["mail"].method,
    "mail-trades": CASES["mail-trades"].method,
    "dynat-gairat": lambda: Dynat(DynatOptions(weighting="gairat", label_type="soft")),
    "dynat-mail": lambda: Dynat(DynatOptions(weighting="mail", weight_scale="normalized")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_captured_step_trains_bit_for_bit_like_the_plain_one(name: str) -> None:
    recorder = SimulatedRecorder()
    got = train(make_step(RUNS[name](), "cpu", recorder=recorder, fallbacks=NoFallbacks()))
    want = train(make_step(RUNS[name](), "cpu"))
    phases = 2 if "mail" in name or "gairat" in name else 1  # before and after the weights begin
    assert recorder.captured == phases * len(EPOCH)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


@pytest.mark.gpu
@needs("gpu")
@pytest.mark.parametrize("name", RUNS)
def test_captured_on_a_gpu(name: str) -> None:
    """Later steps are not compared: rounding decides the signs of gradients near x."""
    recorder = CudaRecorder(torch.device("cuda"))
    logs, state = train(make_step(RUNS[name](), "cuda", recorder=recorder, fallbacks=NoFallbacks()))
    want, _ = train(make_step(RUNS[name](), "cuda"))
    assert bool(state.isfinite().all())
    assert logs[0] == pytest.approx(want[0], rel=1e-3)


def compiled_step(method: Method[Any], mode: str) -> TrainStep:
    """In float64: near x the KL's gradient is so small that float32's rounding decides its signs."""
    networks = NetworkSet(
        tiny_cnn(0, dtype=torch.float64),
        tiny_cnn(1, dtype=torch.float64) if method.uses_guide else None,
        image_shape=(3, 8, 8),
        device=torch.device("cpu"),
        attack=AttackSwitches(compile=mode),
        compile_mode=mode,
        fallbacks=NoFallbacks(),
    )
    spec, optim = PGDSpec(0.1, 0.05, 3, start="gaussian"), OptimConfig(lr=0.1, epochs=1)
    return TrainStep(method, networks, spec, optim, Precision("off", torch.device("cpu")), lambda step: 1.0)


@pytest.mark.slow
@needs("cxx")
@pytest.mark.parametrize("name", RUNS)
def test_compiled_without_breaks_and_with_eagers_numbers(name: str) -> None:
    counters.clear()
    got = train(compiled_step(RUNS[name](), "default"), epochs=4)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    torch.testing.assert_close(
        got[1], train(compiled_step(RUNS[name](), "off"), epochs=4)[1], rtol=0, atol=1e-10
    )


# From the command line

TINY = ["--train-size", "64", "--val-size", "20", "--batch-size", "32", "--steps", "2", "--quiet"]
COMMANDS = {
    "trades": ["--method", "trades"],
    "mart": ["--method", "mart"],
    "alp": ["--method", "alp"],
    "arda": ["--method", "arda", "--adversarial-share", "0.3"],
    "gairat": ["--method", "gairat", "--weight-from", "0"],
    "mail": ["--method", "mail", "--weight-from", "0"],
    "mail-trades": ["--method", "mail", "--base", "trades", "--weight-from", "0"],
    "dynat-gairat": ["--weighting", "gairat", "--weight-from", "0"],
    "dynat-mail": ["--weighting", "mail", "--weight-from", "0"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_trains_and_evaluates(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, *COMMANDS[name], "--epochs", "1"]) == 0
    assert (
        main(["eval", str(run), "--attacks", "clean,pgd2", "--checkpoints", "last", "--num-images", "50"])
        == 0
    )


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_no_pass_normalises_one_kind_of_a_mixed_batch_alone(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ranks in (1, 2, 3, 4):
        for images in (64, 66, 97):
            for rank in range(ranks):
                dealt = deal(images, rank, ranks)
                blank = torch.zeros(dealt.images, dtype=torch.int64)
                attacked = Arda(ArdaOptions(adversarial_share=share)).num_attacked(
                    Batch(torch.zeros(dealt.images, 1, 1, 1), blank, blank, dealt)
                )
                assert 0 < attacked < dealt.images, (images, rank, ranks)
    method = ["--method", "arda", "--adversarial-share", str(share), "--grad-accum-steps", "2"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *TINY, *method]) == 2
    assert "--grad-accum-steps 2: method arda couples" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "processes", "refused"),
    [
        (["--attack-bn", "frozen", "--sync-bn", "on"], 2, True),
        (["--attack-bn", "frozen"], 8, True),  # 16 images each: auto is on
        (["--attack-bn", "frozen"], 2, False),
        (["--attack-bn", "frozen", "--sync-bn", "off"], 8, False),
        (["--attack-bn", "eval", "--sync-bn", "on"], 8, False),
        (["--attack-bn", "train", "--sync-bn", "on"], 1, False),
        (["--attack-bn", "train", "--sync-bn", "on", "--adversarial-share", "1"], 2, False),
    ],
)
def test_synchronised_attacks_of_a_part_of_the_images_are_refused(
    flags: list[str], processes: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process without attacked images would not be there when the others exchange statistics."""
    monkeypatch.setattr(resolving, "world", lambda: SimpleNamespace(size=processes, alone=processes == 1))
    argv = ["--method", "arda", "--batch-size", "128", *flags]
    config, info = parse_train(argv, early_flags(argv)).command.train, dataset_info("digits")
    assert info is not None
    with pytest.raises(UserError, match=r"--attack-bn .*--sync-bn off") if refused else nullcontext():
        resolving.resolve(config, info, announce=False)


@pytest.mark.parametrize("share", ["0", "1"])
def test_a_mixed_batch_of_one_kind_may_be_cut(share: str, tmp_path: Path) -> None:
    method = ["--method", "arda", "--adversarial-share", share, "--grad-accum-steps", "2", "--epochs", "1"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *TINY, *method]) == 0


def test_a_resumed_run_keeps_the_epoch_at_which_weights_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--method", "gairat", "--schedule", "constant", "--val-every", "9"]
    run = str(tmp_path / "run")
    assert main(["train", "--run-dir", run, *flags, "--epochs", "2"]) == 0
    assert main(["train", "--resume", run, "--epochs", "4"]) == 2
    assert (
        "the loss of method gairat changes over the run and depends on the number of epochs "
        "(2 in this run, 4 asked)" in capsys.readouterr().err
    )


BAD = [
    (Trades, TradesOptions(beta=-1.0), "beta must be >= 0, got -1"),
    (Mart, MartOptions(floor=math.nan), "floor must be >= 0, got nan"),
    (Alp, AlpOptions(logit_pairing=math.inf), "logit_pairing must be >= 0, got inf"),
    (Arda, ArdaOptions(adversarial_share=1.5), r"adversarial_share must be in \[0, 1\], got 1.5"),
    (Gairat, GairatOptions(lam=math.nan), "lam must be a finite number, got nan"),
    (Gairat, GairatOptions(weight_from=2.0), r"weight_from must be in \[0, 1\], got 2"),
    (Mail, MailOptions(slope=math.inf), "slope must be a finite number, got inf"),
    (Dynat, DynatOptions(weight_from=-0.1), r"weight_from must be in \[0, 1\]"),
    (Dynat, DynatOptions(weighting="gairat", weight_labels="true"), "use --inner-loss ce_true"),
    (Dynat, DynatOptions(weighting="gairat", inner_loss="kl_self"), "use --inner-loss ce_dynamic"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_bad_options_are_named(method: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(options)
