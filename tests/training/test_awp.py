"""AWP against the released procedure, in float64 with the release's copied proxy network."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.classical_references import EPOCH, mean_ce, mean_kl, train
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step
from support.stepping import LR, N, drawn_start, make_batch, moved_network, tiny_network, train_step
from support.transcriptions import attack, ce_goal, kl_goal, log_probs
from torch import Tensor, nn

from fastdynat.commands.main import main
from fastdynat.data import Batch
from fastdynat.methods import Dynat, DynatOptions, Madry, MadryOptions, Method, Trades, TradesOptions
from fastdynat.training.awp import WeightPerturbation

GAMMA, DECAY, MOMENTUM, ONES = 0.05, 0.05, 0.9, [1.0] * N
Loss = Callable[[nn.Module], Tensor]
RELEASED = DynatOptions(inner_loss="kl_self", extra_kl_weight=1.0, beta=0.2, awp_objective="trades")


def perturbed_update(model: nn.Module, optimizer: torch.optim.SGD, ascended: Loss, descended: Loss) -> Tensor:
    """The release's calc_awp, perturb, update, restore: a copied proxy ascends; steps by norm ratios."""
    proxy = copy.deepcopy(model)
    (-ascended(proxy)).backward()
    moves = {}
    for (name, old), new in zip(model.named_parameters(), proxy.parameters(), strict=True):
        if old.dim() >= 2:
            step = -LR * new.grad
            moves[name] = GAMMA * old.detach().norm() / (step.norm() + 1e-20) * step
    for name, move in moves.items():
        model.get_parameter(name).data.add_(move)
    optimizer.zero_grad()
    loss = descended(model)
    loss.backward()
    optimizer.step()
    for name, move in moves.items():
        model.get_parameter(name).data.sub_(move)
    return loss.detach()


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def trades_of(x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
    def loss(network: nn.Module) -> Tensor:
        clean, adv = log_probs(network(x)), log_probs(network(x_adv))
        return mean_ce(clean, y, ONES) + 6 * mean_kl(clean, adv, ONES)  # type: ignore[no-any-return]

    return loss


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], msg=key)


@pytest.mark.parametrize("name", ["madry", "trades"])
def test_two_updates_equal_the_released_procedure(name: str) -> None:
    batch, model = make_batch(), moved_network(1)
    reference = copy.deepcopy(model)
    method: Method[Any] = (
        Madry(MadryOptions()) if name == "madry" else Trades(TradesOptions(bn_third_pass=False))
    )
    step = train_step(method, model, None, awp=GAMMA, weight_decay=DECAY, momentum=MOMENTUM)
    optimizer = sgd(reference)
    for _ in range(2):
        start = drawn_start(batch.x, "gaussian")
        logs = step(batch)
        goal = ce_goal(batch.labels) if name == "madry" else kl_goal(reference, batch.x)
        x_adv, _ = attack(reference, batch.x, start, goal)
        if name == "madry":
            loss: Loss = lambda network, x=x_adv: mean_ce(log_probs(network(x)), batch.labels, ONES)  # type: ignore[misc]  # noqa: E731
        else:
            loss = trades_of(batch.x, x_adv, batch.labels)
        torch.testing.assert_close(logs["loss"], perturbed_update(reference, optimizer, loss, loss))
        assert_same(model, reference)


def test_two_updates_of_dynat_awp_equal_the_released_procedure() -> None:
    """A.8: the proxy ascends TRADES' loss on y; the model descends 0.2 CE(x', l_nat) + KL(p(x) || p(x'))."""
    batch, model, guide = make_batch(), moved_network(1), tiny_network(2)
    reference, reference_guide = copy.deepcopy(model), copy.deepcopy(guide)
    step = train_step(Dynat(RELEASED), model, guide, awp=GAMMA, weight_decay=DECAY, momentum=MOMENTUM)
    optimizers = sgd(reference), sgd(reference_guide)
    for _ in range(2):
        start = drawn_start(batch.x, "gaussian")
        logs = step(batch)
        guide_logits = reference_guide(batch.x)
        dynamic = guide_logits.argmax(1)
        x_adv, _ = attack(reference, batch.x, start, kl_goal(reference, batch.x))

        def descended(network: nn.Module, x_adv: Tensor = x_adv, dynamic: Tensor = dynamic) -> Tensor:
            adv = log_probs(network(x_adv))
            return 0.2 * mean_ce(adv, dynamic, ONES) + mean_kl(log_probs(network(batch.x)), adv, ONES)  # type: ignore[no-any-return]

        ascended = trades_of(batch.x, x_adv, batch.labels)
        torch.testing.assert_close(
            logs["loss"], perturbed_update(reference, optimizers[0], ascended, descended)
        )
        optimizers[1].zero_grad()
        mean_ce(log_probs(guide_logits), batch.labels, ONES).backward()
        optimizers[1].step()
        assert_same(model, reference)
        assert_same(guide, reference_guide)


def test_the_objectives_of_dynat_awp_differ() -> None:
    states = []
    for objective in ("own", "trades"):
        model = moved_network(1)
        options: Any = {"inner_loss": "kl_self", "awp_objective": objective}
        train_step(Dynat(DynatOptions(**options)), model, tiny_network(2), awp=GAMMA)(make_batch())
        states.append(model.state_dict()["0.weight"])
    assert not torch.equal(*states)


def test_gamma_zero_is_the_identity_bit_for_bit() -> None:
    batch = make_batch()
    states = []
    for awp in (None, 0.0):
        model = moved_network(1).float()
        step = train_step(Trades(TradesOptions()), model, None, weight_decay=DECAY, momentum=MOMENTUM)
        step.awp = None if awp is None else WeightPerturbation(model, awp)
        torch.manual_seed(3)
        for _ in range(3):
            step(Batch(batch.x.float(), batch.labels, batch.indices))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_weights_move_by_gamma_of_their_norm_and_come_back() -> None:
    model, batch = moved_network(1), make_batch()
    before = copy.deepcopy(model.state_dict())
    loss = nn.functional.cross_entropy(model.eval()(batch.x), batch.labels)
    with WeightPerturbation(model, GAMMA).around([loss]):
        for name, weight in model.named_parameters():
            share = GAMMA if weight.dim() >= 2 else 0.0
            torch.testing.assert_close((weight.detach() - before[name]).norm(), share * before[name].norm())
        assert nn.functional.cross_entropy(model(batch.x), batch.labels).item() > loss.item()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0.0])
def test_a_gradient_that_points_nowhere_moves_nothing(factor: float) -> None:
    model = nn.Linear(5, 3)
    before = model.weight.detach().clone()
    spoilt = torch.ones(3, 5)
    spoilt[1, 2] = factor
    with WeightPerturbation(model, GAMMA).around([(model.weight * (spoilt if factor else 0.0)).sum()]):
        assert torch.equal(model.weight.detach(), before)
    assert torch.equal(model.weight.detach(), before)


@pytest.mark.parametrize(
    "method",
    [lambda: Madry(MadryOptions()), lambda: Trades(TradesOptions()), lambda: Dynat(RELEASED)],
    ids=["madry", "trades", "dynat"],
)
def test_a_captured_step_switches_on_after_the_warm_up_bit_for_bit(method: Callable[[], Method[Any]]) -> None:
    results, recorder = [], SimulatedRecorder()
    for graphs, gamma, warmup in ((recorder, GAMMA, 6), (None, GAMMA, 6), (None, 0.0, 0)):
        step = make_step(method(), "cpu", recorder=graphs, fallbacks=NoFallbacks())
        step.awp = WeightPerturbation(step.networks.raw["model"], gamma, warmup)
        results.append(train(step))
    assert recorder.captured == 2 * len(EPOCH)
    (got, state), (want, plain), (without, _) = results
    assert got == want
    assert torch.equal(state, plain)
    begins = 6 * len(EPOCH)
    assert got[:begins] == without[:begins]
    assert got[begins] != without[begins]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--method", "natural", "--awp", "0.01"],
            "method natural has no attack separate from its update; use --awp 0",
        ),
        (
            ["--awp=-1"],
            "--awp must be in [0, 1], a share of each tensor's norm, got -1 "
            "(the published sizes are 0.005 and 0.01)",
        ),
        (["--awp", "nan"], "--awp must be in [0, 1], a share of each tensor's norm, got nan"),
        (["--awp", "0.01", "--awp-warmup=-1"], "--awp-warmup must be a number of epochs, got -1"),
    ],
)
def test_refusals(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run-dir", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dynat_awp_trains_and_evaluates(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    tiny = [
        "--train-size",
        "64",
        "--val-size",
        "20",
        "--batch-size",
        "32",
        "--steps",
        "2",
        "--epochs",
        "2",
        "--quiet",
    ]
    released = ["--inner-loss", "kl_self", "--extra-kl-weight", "1", "--beta", "0.2"]
    awp = ["--awp", "0.005", "--awp-warmup", "1", "--awp-objective", "trades"]
    assert main(["train", "--run-dir", run, *tiny, *released, *awp]) == 0
    assert main(["eval", run, "--attacks", "clean,pgd2", "--checkpoints", "last", "--num-images", "50"]) == 0
