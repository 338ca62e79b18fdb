"""Attacks of training other than PGD: steps of methods, runs, resuming, and who refuses what."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.apgd_reference import apgd_reference
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step, train
from support.method_variants import TINY, flags, make_method, teacher  # noqa: F401
from support.stepping import EPS, K, N, assert_same_step, make_batch, moved_network, train_step
from torch import Tensor

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.data import dataset_info
from fastdynat.errors import UserError
from fastdynat.methods import METHODS, Madry, MadryOptions
from fastdynat.methods.configs import default_config
from fastdynat.training.resolve_attack import resolved_attack

RADII = {"linf": EPS, "l2": 0.5, "l1": 6.0}
OWN_ATTACK = ("distillation", "dyart", "fgsm_rs", "free", "n_fgsm", "natural", "vat")


def apgd_spec(norm: str = "linf", steps: int = 2) -> PGDSpec:
    return PGDSpec(RADII[norm], 1.0, steps, norm=norm, start="none", algorithm="apgd")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_step_of_singh2023(norm: str) -> None:
    """Mixed labels smoothed by 0.1, 2-step APGD in eval mode on them, cross-entropy in train mode, SGD."""
    torch.manual_seed(4)
    batch = replace(make_batch(), mixed=torch.rand(N, K, dtype=torch.float64).softmax(1))
    assert batch.mixed is not None
    smooth = 0.9 * batch.mixed + 0.1 / K
    model = moved_network(1)
    reference = copy.deepcopy(model)

    def loss_of(logits: Tensor, i: int) -> Tensor:
        return -(smooth[i] * (logits - logits.exp().sum().log())).sum()

    reference.eval()
    x_adv = apgd_reference(
        lambda z, i: loss_of(reference(z[None])[0], i), batch.x, norm=norm, eps=RADII[norm], steps=2
    )
    reference.train()
    logits = reference(x_adv)
    torch.stack([loss_of(logits[i], i) for i in range(N)]).mean().backward()

    method = Madry(MadryOptions())
    method.label_smoothing = 0.1
    step = train_step(method, model, None, spec=apgd_spec(norm))
    found = step(batch)
    assert_same_step(model, reference)
    assert not torch.equal(x_adv, batch.x)
    assert float(found["zero_grad_share"]) == 0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_apgd_or_refuses_it_by_name(name: str) -> None:
    config = default_config(name)
    attack = replace(config.attack, attack="apgd")
    info = dataset_info("cifar10")
    assert info is not None
    method = METHODS[name](config.options)
    if name in OWN_ATTACK:
        with pytest.raises(UserError, match=f"attack apgd: method {name} .*leave --attack out"):
            resolved_attack(attack, info, method, [])
        return
    notes: list[str] = []
    found = resolved_attack(attack, info, method, notes)
    assert found.spec().algorithm == "apgd"
    assert found.start == ("none" if method.attack_defaults.start == "uniform" else "gaussian")
    assert "10 steps of APGD" in notes[-1]


@pytest.mark.parametrize("name", [*sorted(set(METHODS) - set(OWN_ATTACK)), "vat-pgd"])
def test_a_captured_step_with_apgd_is_the_plain_step_bit_for_bit(name: str) -> None:
    spec = replace(apgd_spec(), start="gaussian")
    recorder = SimulatedRecorder()
    got = train(make_step(make_method(name), "cpu", recorder=recorder, spec=spec))
    want = train(make_step(make_method(name), "cpu", spec=spec))
    assert recorder.captured >= 1
    assert repr(got[0]) == repr(want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("given", [["--attack", "apgd"]])
def test_a_run_trains_and_resumes_exactly(given: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ["--method", "madry", "--steps", "2", *given]
    assert main(["train", "--run-dir", str(whole), *TINY, *given]) == 0
    assert main(["train", "--run-dir", str(parts), *TINY, *given, "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    for name in (p.name for p in (whole / "last").glob("*.safetensors")):
        assert (whole / "last" / name).read_bytes() == (parts / "last" / name).read_bytes()


def refusal(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    assert main(["train", "--method", "madry", *TINY, *given]) == 2
    return capsys.readouterr().err


def test_flags_without_effect_and_unknown_attacks_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = ["--run-dir", str(tmp_path / "run")]
    said = refusal(capsys, *run, "--attack", "apgd", "--step-size", "2/255")
    assert "--step-size has no effect: --attack apgd chooses its own" in said
    assert "apgd" in refusal(capsys, *run, "--attack", "autopgd")
    assert not (tmp_path / "run").exists()
