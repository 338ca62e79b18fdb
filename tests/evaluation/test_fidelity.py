"""Fidelity check: silent on honest engines, loud on weakened ones, without side effects."""

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from safetensors.torch import load_file
from support.confident_network import confident_model
from support.graph_sim import SimulatedRecorder
from support.networks import tiny_cnn
from support.splits import load_train
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.evaluation.fidelity import Fidelity, check_fidelity
from fastdynat.models import build_model
from fastdynat.training.trainer import Trainer

LINF, L2 = PGDSpec(0.1, 0.025, 10), PGDSpec(1.0, 0.25, 10, norm="l2")


@cache
def trained(adversarial: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network after a few epochs on the digits, and the 144 held-out images."""
    torch.manual_seed(0)
    splits = load_train("digits", ".", val_size=None, seed=1, image_size=None, download=False, limit=None)
    model = build_model("small", num_classes=10, image_shape=splits.info.image_shape)
    x, y = splits.train.images.float() / 255, splits.train.labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(2 if adversarial else 3):
        for chosen in torch.randperm(len(y)).split(64):
            images = x[chosen]
            if adversarial:
                images = pgd(model, images, AttackGoal("ce", y[chosen]), PGDSpec(0.1, 0.07, 2)).x_adv
            optimizer.zero_grad()
            F.cross_entropy(model(images), y[chosen]).backward()
            optimizer.step()
    return model.eval(), splits.val.images.float() / 255, splits.val.labels


@pytest.fixture(params=[False, True], ids=["natural", "adversarial"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    return trained(request.param)


def check(
    engine: AttackEngine, case: tuple[nn.Module, Tensor, Tensor], spec: PGDSpec = LINF, **kwargs: Any
) -> Fidelity:
    model, x, y = case
    return check_fidelity(engine, model, zip(x.split(100), y.split(100), strict=True), spec, **kwargs)


def test_the_same_attack_agrees_in_everything(case: Any) -> None:
    found = check(
        AttackEngine(case[0], case[1][:2], switches=AttackSwitches(fold=False, winograd=False)), case
    )
    assert (found.images, found.sign_mass, found.weaker) == (144, 1.0, False)
    assert found.loss_fast == found.loss_reference
    assert found.acc_fast == found.acc_reference
    assert found.loss_error == found.only_fast_right == found.only_reference_right == 0
    assert found.loss_reference > found.loss_clean + 0.1


def test_the_numbers_are_those_of_the_reference(case: Any) -> None:
    """Without a start there is nothing random, so `pgd` and plain autograd say what must come out."""
    model, x, y = case
    spec = replace(LINF, start="none")
    found = check(AttackEngine(model, x[:2], switches=AttackSwitches(dtype=torch.bfloat16)), case, spec)
    reference = pgd(model, x, AttackGoal("ce", y), spec)
    with torch.no_grad():
        logits = model(reference.x_adv)
        assert found.loss_clean == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-5)
    assert found.loss_reference == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-4)
    assert found.acc_reference == pytest.approx(float((logits.argmax(1) == y).double().mean()), abs=1e-9)
    assert found.acc_fast - found.acc_reference == pytest.approx(
        (found.only_fast_right - found.only_reference_right) / 144
    )
    assert found.zero_reference == float(reference.zero_grads) / reference.gradients


HONEST = {
    "folded, winograd": AttackSwitches(),
    "folded": AttackSwitches(winograd=False),
    "autograd": AttackSwitches(closed_form=False),
    "bf16": AttackSwitches(dtype=torch.bfloat16, channels_last=True),
}
COMPILED = {f"compiled {name}": replace(HONEST[name], compile="default") for name in ("folded", "bf16")}
slow = [pytest.mark.slow, needs("cxx")]


@pytest.mark.parametrize("spec", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize(
    "switches",
    [
        *(pytest.param(s, id=n) for n, s in HONEST.items()),
        *(pytest.param(s, id=n, marks=slow) for n, s in COMPILED.items()),
    ],
)
def test_honest_engines_are_not_flagged(case: Any, switches: AttackSwitches, spec: PGDSpec) -> None:
    found = check(AttackEngine(case[0], case[1][:2], switches=switches), case, spec)
    assert not found.weaker
    assert found.loss_fast == pytest.approx(found.loss_reference, rel=0.01)
    assert found.sign_mass > 0.99


def test_a_captured_attack_is_checked_as_a_graph(case: Any) -> None:
    """All full batches, not those after the warm-up alone; the partial one at the end never is one."""
    model, x, y = case
    recorder = SimulatedRecorder()
    engine = AttackEngine(model, x[:2], recorder=recorder)
    batches = zip(x.split(40), y.split(40), strict=True)
    found = check_fidelity(engine, model, batches, LINF)
    assert (recorder.captured, recorder.replayed) == (1, 3)
    assert found == check_fidelity(
        AttackEngine(model, x[:2]), model, zip(x.split(40), y.split(40), strict=True), LINF
    )


def test_an_honest_engine_in_fp16_is_not_flagged() -> None:
    """On fewer images: a CPU is slow in it."""
    model, x, y = trained(False)
    engine = AttackEngine(model, x[:2], switches=AttackSwitches(dtype=torch.float16))
    found = check(engine, (model, x[:40], y[:40]))
    assert not found.weaker
    assert found.loss_fast == pytest.approx(found.loss_reference, rel=0.01)


class HalfBlind(Ascent):
    """Sees the gradient in every other column."""

    def logits_and_grad(self, read: Tensor, goal: AttackGoal) -> tuple[Tensor, Tensor]:
        logits, gradient = super().logits_and_grad(read, goal)
        gradient[..., ::2] = 0
        return logits, gradient


def other_spec(change: Callable[[PGDSpec], PGDSpec]) -> type[AttackEngine]:
    class Changed(AttackEngine):
        def run(self, x: Tensor, goal: AttackGoal, spec: PGDSpec, **kwargs: Any) -> Any:
            return super().run(x, goal, change(spec), **kwargs)

    return Changed


@pytest.mark.parametrize("spec", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize(
    "change",
    [lambda s: replace(s, steps=s.steps // 2), lambda s: replace(s, step_size=s.step_size / 2)],
    ids=["half the steps", "half the step size"],
)
def test_a_shorter_attack_is_caught(case: Any, change: Any, spec: PGDSpec) -> None:
    assert check(other_spec(change)(case[0], case[1][:2]), case, spec).weaker


def test_half_a_gradient_is_caught(case: Any) -> None:
    engine = AttackEngine(case[0], case[1][:2])
    engine.ascent = HalfBlind(**{f.name: getattr(engine.ascent, f.name) for f in fields(Ascent)})
    found = check(engine, case)
    assert found.weaker
    assert 0.3 < found.sign_mass < 0.7


@pytest.mark.parametrize("guarded", [True, False])
def test_underflow_in_half_precision_is_caught(guarded: bool) -> None:
    model, x = confident_model(), torch.rand(144, 3, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    engine = AttackEngine(model, x[:2], switches=AttackSwitches(dtype=torch.float16))
    if not guarded:
        engine.ascent = replace(engine.ascent, underflow=Underflow())
    found = check(engine, (model, x, y), PGDSpec(8 / 255, 2 / 255, 10))
    assert found.weaker is not guarded
    assert (found.zero_fast > 0.1) is not guarded
    assert found.zero_reference == 0


def verdict(**changed: Any) -> bool:
    """Of a fidelity that is perfect but for `changed`."""
    same = {
        "loss_clean": 0.5,
        "loss_reference": 1.5,
        "loss_fast": 1.5,
        "loss_error": 0.0,
        "acc_reference": 0.5,
        "acc_fast": 0.5,
    }
    counts = {
        "only_fast_right": 0,
        "only_reference_right": 0,
        "sign_mass": 1.0,
        "zero_reference": 0.0,
        "zero_fast": 0.0,
    }
    return Fidelity(**{"images": 500, **same, **counts, **changed}).weaker


@pytest.mark.parametrize(
    ("changed", "weaker"),
    [
        ({"loss_fast": 1.491}, False),  # 1 % of the rise of 1
        ({"loss_fast": 1.489}, True),
        ({"loss_fast": 1.489, "loss_error": 0.01}, False),  # but within two standard errors
        ({"loss_fast": 3.0}, False),  # stronger is not weaker
        ({"loss_fast": float("nan")}, True),
        ({"loss_clean": 1.5, "loss_fast": 1.499995}, False),  # no rise: 1 % of 0.001 is allowed
        ({"loss_clean": 1.5, "loss_fast": 1.49998}, True),
        ({"only_fast_right": 4}, False),  # 4 = 2 sqrt(4)
        ({"only_fast_right": 5}, True),
        ({"only_fast_right": 60, "only_reference_right": 45}, False),  # 15 < 2 sqrt(105)
        ({"only_fast_right": 75, "only_reference_right": 45}, True),  # 30 > 2 sqrt(120)
        ({"only_reference_right": 50}, False),
    ],
    ids=str,
)
def test_the_bounds(changed: dict[str, Any], weaker: bool) -> None:
    assert verdict(**changed) is weaker


@pytest.mark.parametrize("bn", ["eval", "train", "frozen"])
def test_leaves_no_trace(bn: str) -> None:
    model, x, y = tiny_cnn(dropout=0.5).train(), torch.rand(20, 3, 8, 8), torch.randint(10, (20,))
    model[1].eval()
    F.cross_entropy(model(x), y).backward()
    engine = AttackEngine(model, x[:2], bn=bn)
    grads, modes = [p.grad.clone() for p in model.parameters()], [m.training for m in model.modules()]  # type: ignore[union-attr]
    state, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first = check(engine, (model, x, y), bn=bn, seed=1)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))  # type: ignore[arg-type]
    assert not first.weaker
    assert check(engine, (model, x, y), bn=bn, seed=1) == first
    assert check(engine, (model, x, y), bn=bn, seed=2).loss_reference != first.loss_reference


def test_follows_the_weights_of_now() -> None:
    model, x, y = tiny_cnn(), torch.rand(20, 3, 8, 8), torch.randint(10, (20,))
    engine = AttackEngine(model, x[:2])
    with torch.no_grad():
        model[0].weight.neg_()
    assert check(engine, (model, x, y)).sign_mass > 0.99


def test_no_images_are_refused() -> None:
    model = tiny_cnn()
    with pytest.raises(UserError, match="at least one image"):
        check_fidelity(AttackEngine(model, torch.rand(2, 3, 8, 8)), model, [], LINF)


TINY = [
    "--train-size",
    "96",
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


@pytest.mark.parametrize(
    "flags",
    [["--attack-bn", "eval", "--amp", "bf16"], ["--attack-bn", "train", "--method", "madry"]],
    ids=["dynat bf16", "madry bn train"],
)
def test_checking_changes_nothing_in_a_run(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, check_flags in (("with", ["--check-fidelity", "20"]), ("without", [])):
        assert main(["train", "--run-dir", str(tmp_path / name), *TINY, *flags, *check_flags]) == 0
    assert "weaker" not in capsys.readouterr().err
    for file in (tmp_path / "with" / "last").glob("*.safetensors"):
        mine, other = load_file(file), load_file(tmp_path / "without" / "last" / file.name)
        assert all(torch.equal(mine[key], other[key]) for key in other)
    states = [
        torch.load(tmp_path / name / "last" / "state.pt", weights_only=True) for name in ("with", "without")
    ]
    assert torch.equal(states[0]["rng"]["torch"], states[1]["rng"]["torch"])
    for row in map(json.loads, (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()):
        assert row["fidelity_weaker"] is False
        assert row["fidelity_loss_fast"] == pytest.approx(row["fidelity_loss_reference"], rel=0.05)
        assert 0.9 < row["fidelity_sign_mass"] <= 1
        assert {
            f"fidelity_{what}_{which}" for what in ("acc", "zero") for which in ("fast", "reference")
        } <= row.keys()
    assert "fidelity" not in (tmp_path / "without" / "metrics.jsonl").read_text()


def test_a_run_says_that_its_attack_is_weaker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weak = other_spec(lambda s: replace(s, steps=1, step_size=s.step_size / 4))
    monkeypatch.setattr("fastdynat.training.networks.AttackEngine", weak)
    assert (
        main(
            ["train", "--run-dir", str(tmp_path / "run"), *TINY, "--check-fidelity", "20", "--val-every", "2"]
        )
        == 0
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: the attack is weaker than the eager float32 one: loss" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["fidelity_weaker" in row for row in rows] == [False, True]
    assert rows[1]["fidelity_weaker"] is True


def test_the_check_may_be_switched_on_when_resuming(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "--run-dir", run, *TINY, "--stop-after", "1"]) == 0
    assert main(["train", "--resume", run, "--check-fidelity", "10", "--quiet"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["fidelity_weaker" in row for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--check-fidelity", "21"],
            "--check-fidelity 21: there are 20 validation images; ask for fewer, or .* --val-size",
        ),
        (
            ["--check-fidelity", "1", "--val-size", "0"],
            "--check-fidelity has no effect: --val-size 0 leaves nothing to validate on",
        ),
        (
            ["--check-fidelity", "-1"],
            "--check-fidelity must be a number of validation images, 0 for none, got -1",
        ),
    ],
)
def test_too_many_images_are_refused_before_anything_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained"))
    assert main(["train", "--run-dir", str(tmp_path / "run"), *TINY, *flags]) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run").exists()
