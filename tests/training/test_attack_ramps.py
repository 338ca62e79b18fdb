"""Ramps of the attack's radius and step size: schedules, exact steps, one graph, and who follows them."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.fallbacks import CollectedIn, NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step, train
from support.method_variants import TINY, make_method
from support.stepping import LR, STEPS, drawn_start, make_batch, moved_network, train_step
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine, Attacker
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.commands.main import main
from fastdynat.config import AttackConfig
from fastdynat.data import Batch, dataset_info
from fastdynat.errors import UserError
from fastdynat.methods import (
    METHODS,
    Inner,
    Madry,
    MadryOptions,
    Networks,
    NFgsm,
    NFgsmOptions,
    Trades,
    TradesOptions,
)
from fastdynat.methods.configs import default_config
from fastdynat.training.attack_ramps import attack_sizes
from fastdynat.training.resolve_attack import check_ramps_end, resolved_attack
from fastdynat.training.resolved_config import ResolvedAttack, ResolvedOptim

EPS, STEP = 0.08, 0.04
STAY = ("distillation", "dyart", "natural")  # no attack, or none with a radius


def sizes_at(epochs: int, per_epoch: int, *, burn_in: int = 0, **options: Any) -> list[tuple[float, float]]:
    """(eps, step size) of every update."""
    attack = ResolvedAttack(
        eps=8 / 255, step_size=4 / 255, steps=5, start="uniform", eval_eps=8 / 255, **options
    )
    optim = ResolvedOptim(epochs=epochs, lr=0.1, weight_decay=0.0, burn_in=burn_in)
    found = attack_sizes(attack, optim, per_epoch)
    assert found is not None
    return [found(update) for update in range(epochs * per_epoch)]


def test_the_schedule_of_ikl() -> None:
    """Epoch e of E, counted from 1: eps e / E, and half of it."""
    found = sizes_at(200, 3, eps_ramp=200)
    for epoch in range(1, 201):
        eps = 8 / 255 * (epoch / 200)
        assert found[3 * (epoch - 1) : 3 * epoch] == [(eps, eps / 2)] * 3


def test_the_schedule_of_ares() -> None:
    """Epoch e, counted from 0: the step times min(e, 5) / 5, at the full radius."""
    found = sizes_at(8, 2, step_ramp=5, ramp_from_zero=True)
    for epoch in range(8):
        for eps, step_size in found[2 * epoch : 2 * epoch + 2]:
            assert eps == 8 / 255
            assert step_size == pytest.approx(4 / 255 * min(epoch, 5) / 5, rel=1e-15)
    assert found[0][1] == 0
    assert found[-1][1] == 4 / 255


def test_ramps_by_update_after_a_burn_in_and_of_different_lengths() -> None:
    found = sizes_at(5, 4, burn_in=1, eps_ramp=2, step_ramp=1, ramp_by="step")
    shares = [(min(n, 8) / 8, min(n, 4) / 4) for n in range(1, 17)]
    assert found[4:] == [(8 / 255 * a, 4 / 255 * b) for a, b in shares]
    found = sizes_at(4, 4, eps_ramp=2, step_ramp=0, ramp_by="step", ramp_from_zero=True)
    assert found == [(8 / 255 * min(n, 8) / 8, 4 / 255) for n in range(16)]
    attack = ResolvedAttack(eps=0.1, step_size=0.1, steps=1, start="none", eval_eps=0.1, step_ramp=0)
    assert attack_sizes(attack, ResolvedOptim(epochs=2, lr=0.1, weight_decay=0.0), 2) is None


def transcribed_pgd(model: nn.Module, loss: Any, x: Tensor, start: Tensor, eps: float, step: float) -> Tensor:
    """PGD on `loss` of the logits, in eval mode."""
    model.eval()
    x_adv = start
    for _ in range(STEPS):
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(leaf)), leaf)
        x_adv = torch.min(torch.max(x_adv + step * grad.sign(), x - eps), x + eps).clamp(0, 1)
    return x_adv


def kl(log_p: Tensor, logits: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - logits.log_softmax(1))).sum(1)


def madry_update(model: nn.Module, batch: Batch, eps: float, step: float) -> Tensor:
    start = drawn_start(batch.x, "uniform", eps)
    x_adv = transcribed_pgd(model, lambda z: F.cross_entropy(z, batch.labels), batch.x, start, eps, step)
    return F.cross_entropy(model.train()(x_adv), batch.labels)


def trades_update(model: nn.Module, batch: Batch, eps: float, step: float) -> Tensor:
    start = drawn_start(batch.x, "gaussian")
    log_p = model.eval()(batch.x).log_softmax(1).detach()
    x_adv = transcribed_pgd(model, lambda z: kl(log_p, z).sum(), batch.x, start, eps, step)
    clean = model.train()(batch.x)
    attacked = model(x_adv)
    return F.cross_entropy(clean, batch.labels) + 6 * kl(clean.log_softmax(1), attacked).mean()


def n_fgsm_update(model: nn.Module, batch: Batch, eps: float, step: float) -> Tensor:
    leaf = drawn_start(batch.x, "uniform", 2 * eps).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model.eval()(leaf), batch.labels), leaf)
    x_adv = (leaf.detach() + step * grad.sign()).clamp(0, 1)
    return F.cross_entropy(model.train()(x_adv), batch.labels)


TRANSCRIBED = {
    "madry": (Madry(MadryOptions()), madry_update, PGDSpec(EPS, STEP, STEPS)),
    "trades": (
        Trades(TradesOptions(beta=6.0, bn_third_pass=False)),
        trades_update,
        PGDSpec(EPS, STEP, STEPS, start="gaussian"),
    ),
    "n_fgsm": (NFgsm(NFgsmOptions(noise=2.0)), n_fgsm_update, PGDSpec(EPS, STEP, 1)),
}


@pytest.mark.parametrize("name", TRANSCRIBED)
def test_a_ramped_run_in_float64(name: str) -> None:
    """Two updates in each epoch of a ramp that begins at 0, against a transcription with Python numbers."""
    method, update, spec = TRANSCRIBED[name]
    ramp = [(EPS * share, STEP * share) for share in (0, 0, 0.25, 0.25, 0.5, 0.5, 1, 1)]
    model = moved_network(1)
    reference, batch = copy.deepcopy(model), make_batch()
    step = train_step(method, model, None, spec=spec, sizes=lambda n: ramp[n])
    torch.manual_seed(3)
    for eps, size in ramp:
        reference.zero_grad()
        loss = update(reference, batch, eps, size)
        loss.backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= LR * p.grad
        logs = step(batch)
        torch.testing.assert_close(logs["loss"], loss.detach())
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def ramp_of(updates: int) -> Any:
    """From 0 to the sizes of `make_step`; updates share a value in pairs."""
    return lambda n: (0.1 * min(n // 2 * 2, updates) / updates, 0.05 * min(n // 2 * 2, updates) / updates)


@pytest.mark.parametrize(
    "variant", ["madry", "trades", "dynat", "n_fgsm", "free-2", "fgsm_pgi", "arda-quarter", "vat"]
)
def test_one_graph_for_all_values(variant: str) -> None:
    one_step = dict.fromkeys(("free-2", "fgsm_pgi"), PGDSpec(0.1, 0.05, 1, start="none"))
    one_step["n_fgsm"] = PGDSpec(0.1, 0.05, 1)
    spec = one_step.get(variant, PGDSpec(0.1, 0.05, 3, start="gaussian"))
    recorder = SimulatedRecorder()
    options: dict[str, Any] = {"spec": spec, "sizes": ramp_of(12)}
    captured = make_step(make_method(variant), "cpu", recorder=recorder, fallbacks=NoFallbacks(), **options)
    found = train(captured)
    assert recorder.captured == 2  # a full and a partial batch
    assert repr(found) == repr(train(make_step(make_method(variant), "cpu", **options)))
    constant = train(make_step(make_method(variant), "cpu", spec=spec))
    assert not torch.equal(found[1], constant[1])


def test_a_graph_that_keeps_the_sizes_of_its_capture_is_found() -> None:
    """Also where the capture is made at the ramp's value of 0."""

    class Kept(Madry):
        follows_ramp = True

        def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
            assert attack.sizes is not None
            assert inner.goal is not None
            eps, step_size = attack.sizes.numpy().tolist()  # as a number that Python holds
            spec = replace(attack.spec, eps=max(eps, 1e-9), step_size=max(step_size, 1e-9))
            return replace(attack, sizes=None)(batch.x, inner.goal, spec=spec)

    said: list[str] = []
    step = make_step(
        Kept(MadryOptions()),
        "cpu",
        recorder=SimulatedRecorder(),
        fallbacks=CollectedIn(said),
        sizes=lambda n: (0.0, 0.0),
    )
    train(step)
    assert "a replay differs from the function it was captured from" in said[0]


@needs("cxx")
def test_no_compilation_for_another_value() -> None:
    x, y = torch.rand(8, 3, 8, 8), torch.randint(4, (8,))
    model = moved_network(2).float().eval()
    # After torch 2.11, compiled code does not run under a dispatch mode, which the simulated recorder is.
    recorder = SimulatedRecorder() if torch.__version__ < "2.12" else None
    engine = AttackEngine(
        model, x[:2], switches=AttackSwitches(compile="default"), recorder=recorder, fallbacks=NoFallbacks()
    )
    spec, goal = PGDSpec(0.1, 0.025, 3, start="none"), AttackGoal("ce", y)
    engine.run(x, goal, spec, sizes=torch.tensor([0.1, 0.025]).double())
    counters.clear()
    for eps in (0.0, 0.01, 0.02, 0.05, 0.1):
        sizes = torch.tensor([eps, eps / 4]).double()
        found = engine.run(x, goal, spec, sizes=sizes).x_adv
        wanted = x if eps == 0 else engine.run(x, goal, replace(spec, eps=eps, step_size=eps / 4)).x_adv
        assert torch.equal(found, wanted)
    assert counters["stats"]["unique_graphs"] == 0
    assert recorder is None or recorder.captured == 1


@pytest.mark.parametrize("algorithm", ["pgd", "apgd"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attacks_with_sizes_on_the_device_are_those_with_numbers(
    dtype: torch.dtype, norm: str, algorithm: str
) -> None:
    model, x = moved_network(1).to(dtype), torch.rand(6, 3, 8, 8, dtype=dtype)
    engine, goal = AttackEngine(model, x[:2]), AttackGoal("ce", torch.randint(4, (6,)))
    largest = PGDSpec(1.0, 1.0, 5, norm=norm, algorithm=algorithm)
    for eps, step_size in ((0.3, 0.1), (0.031, 0.007)):
        numbers = replace(largest, eps=eps, step_size=step_size)
        sizes = torch.tensor([eps, step_size], dtype=torch.float64)
        torch.manual_seed(1)
        wanted = engine.run(x, goal, numbers).x_adv
        torch.manual_seed(1)
        assert torch.equal(engine.run(x, goal, largest, sizes=sizes).x_adv, wanted)
        wanted = engine.run(x, goal, numbers, x_start=x).x_adv
        assert torch.equal(engine.run(x, goal, largest, x_start=x, sizes=sizes).x_adv, wanted)
    at_zero = engine.run(x, goal, largest, sizes=torch.zeros(2, dtype=torch.float64)).x_adv
    torch.testing.assert_close(at_zero, x, rtol=0, atol=0)


def test_an_attack_of_other_sizes_does_not_leave_the_ramp_unseen() -> None:
    x, goal = torch.rand(2, 3, 8, 8), AttackGoal("ce", torch.zeros(2).long())
    engine, spec = AttackEngine(moved_network(1).float(), x), PGDSpec(0.1, 0.05, 2)
    attack = Attacker(engine, spec, sizes=torch.zeros(2, dtype=torch.float64))
    assert torch.equal(attack(x, goal, spec=replace(spec, steps=1)).x_adv, x)
    assert (float(attack.eps), float(attack.step_size)) == (0, 0)
    wider = replace(spec, eps=0.2)
    with pytest.raises(ValueError, match=r"follow a ramp, but this attack has its own \(0.2, 0.05\)"):
        attack(x, goal, spec=wider)
    assert torch.equal(attack(x, goal, spec=wider, sizes=attack.sizes).x_adv, x)
    with pytest.raises(UserError, match="under l0 takes numbers"):
        engine.run(x, goal, PGDSpec(2, 1.0, 1, norm="l0", start="none"), sizes=attack.sizes)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_follows_a_ramp_or_refuses_it_by_name(name: str) -> None:
    config, info = default_config(name), dataset_info("cifar10")
    assert info is not None
    method, attack = METHODS[name](config.options), replace(config.attack, eps_ramp=3)
    if name in STAY:
        with pytest.raises(UserError, match=f"eps_ramp 3: method {name} .*leave it out"):
            resolved_attack(attack, info, method, [])
        return
    notes: list[str] = []
    assert resolved_attack(attack, info, method, notes).ramps
    assert "ramped over 3 epochs" in notes[0] or "steps" in method.unused_attack


def test_a_method_of_ones_own_says_whether_its_attack_follows() -> None:
    class Plain(Madry):
        pass

    class Own(Madry):
        def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
            return super().perturb(nets, batch, inner, attack)

    class Says(Own):
        follows_ramp = True

    class OwnAgain(NFgsm):
        def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
            return super().perturb(nets, batch, inner, attack)

    options = MadryOptions()
    assert Plain(options).takes_ramp()
    assert not Own(options).takes_ramp()
    assert Says(options).takes_ramp()
    assert not OwnAgain(NFgsmOptions()).takes_ramp()


def test_refused_ramps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refusal(*given: str) -> str:
        run = ["--run-dir", str(tmp_path / "run")]
        assert (
            main(["train", *(given if "--method" in given else ("--method", "madry", *given)), *run, *TINY])
            == 2
        )
        return capsys.readouterr().err

    assert "--eps-ramp must be a number of epochs, 0 for none, got -1" in refusal("--eps-ramp", "-1")
    said = refusal("--eps-ramp", "3")
    assert "--eps-ramp 3: the ramp is longer than the 2 epochs of the method" in said
    assert "use --eps-ramp 2" in said
    assert "--ramp-by has no effect: needs --eps-ramp" in refusal("--ramp-by", "step")
    assert "--attack apgd adapts its step size" in refusal("--attack", "apgd", "--step-ramp", "2")
    assert "a ramp takes a single norm" in refusal("--eps-ramp", "2", "--norms", "linf,l2")
    assert "does not follow ramps" in refusal("--method", "vat", "--radius", "1", "--eps-ramp", "2")
    assert not (tmp_path / "run").exists()
    check_ramps_end(AttackConfig(eps_ramp=2, step_ramp=2), 2)


@pytest.mark.parametrize(
    "given", [["--eps-ramp", "2", "--ramp-by", "step"], ["--step-ramp", "2", "--attack-bn", "train"]]
)
def test_a_run_resumes_exactly_and_logs_its_sizes(given: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ["--method", "madry", "--steps", "2", "--eps", "0.1", "--step-size", "0.05", *given]
    assert main(["train", "--run-dir", str(whole), *TINY, *given]) == 0
    assert main(["train", "--run-dir", str(parts), *TINY, *given, "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    for name in (p.name for p in (whole / "last").glob("*.safetensors")):
        assert (whole / "last" / name).read_bytes() == (parts / "last" / name).read_bytes()
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    full_radius = "--step-ramp" in given
    assert [row["eps"] for row in rows] == [0.1 if full_radius else 0.05, 0.1]
    assert [row["step_size"] for row in rows] == [0.025, 0.05]
