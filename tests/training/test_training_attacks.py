"""Attacks of training other than PGD: steps of methods, runs, resuming, and who refuses what."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.apgd_reference import apgd_reference
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step, train
from support.method_variants import TINY, flags, make_method, teacher  # noqa: F401
from support.stepping import EPS, K, N, assert_same_step, make_batch, moved_network, train_step
from torch import Tensor, nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.data import Batch, dataset_info
from fastdynat.errors import UserError
from fastdynat.evaluation.outcome import unpack_bits
from fastdynat.methods import METHODS, Arda, ArdaOptions, Madry, MadryOptions
from fastdynat.methods.configs import default_config
from fastdynat.training.metrics import Averages
from fastdynat.training.resolve_attack import resolved_attack

RADII = {"linf": EPS, "l2": 0.4, "l1": 2.5}  # of about equal strength
OWN_ATTACK = (
    "distillation",
    "dyart",
    "fgsm_pgi",
    "fgsm_rs",
    "free",
    "grad_align",
    "liet",
    "n_fgsm",
    "natural",
    "nu_at",
    "vat",
)


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
    assert found.specs()[0].algorithm == "apgd"
    assert found.start == ("none" if method.attack_defaults.start == "uniform" else "gaussian")
    assert f"{method.attack_defaults.steps} steps of APGD" in notes[-1]


@pytest.mark.parametrize("name", [*sorted(set(METHODS) - set(OWN_ATTACK)), "vat-pgd"])
def test_a_captured_step_with_apgd_is_the_plain_step_bit_for_bit(name: str) -> None:
    spec = replace(apgd_spec(), start="gaussian")
    recorder = SimulatedRecorder()
    got = train(make_step(make_method(name), "cpu", recorder=recorder, spec=spec))
    want = train(make_step(make_method(name), "cpu", spec=spec))
    assert recorder.captured >= 1
    assert repr(got[0]) == repr(want[0])
    assert torch.equal(got[1], want[1])


NORM_SPECS = tuple(apgd_spec(norm) for norm in RADII)


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return -(logits[label] - logits.exp().sum().log())


def attacked_reference(model: nn.Module, batch: Batch, norm: str) -> Tensor:
    model.eval()
    labels = batch.labels.tolist()
    found = apgd_reference(
        lambda z, i: cross_entropy(model(z[None])[0], labels[i]), batch.x, norm=norm, eps=RADII[norm], steps=2
    )
    model.train()
    return found


def mean_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    logits = model(x)
    return torch.stack([cross_entropy(logits[i], int(labels[i])) for i in range(N)]).mean()


def test_alternating_norms_take_turns_by_the_number_of_the_update() -> None:
    batch, model = make_batch(), moved_network(1)
    step = train_step(Madry(MadryOptions()), model, None, spec=NORM_SPECS[0], others=NORM_SPECS[1:])
    for number in (0, 1, 2, 3, 4):
        reference = copy.deepcopy(model)
        norm = ("linf", "l2", "l1")[number % 3]
        mean_loss(reference, attacked_reference(reference, batch, norm), batch.labels).backward()
        logs = step(batch)
        assert_same_step(model, reference)
        assert [key for key in logs if key.startswith("train_adv_acc_")] == [f"train_adv_acc_{norm}"]


def test_the_worst_norm_is_chosen_image_by_image() -> None:
    batch, model = make_batch(), moved_network(1)
    reference = copy.deepcopy(model)
    candidates = [attacked_reference(reference, batch, norm) for norm in RADII]
    reference.eval()
    chosen, numbers = [], []
    for i in range(N):
        losses = [cross_entropy(reference(x[i : i + 1])[0], int(batch.labels[i])) for x in candidates]
        numbers.append(max(range(3), key=lambda k: float(losses[k].detach())))
        chosen.append(candidates[numbers[-1]][i])
    reference.train()
    mean_loss(reference, torch.stack(chosen), batch.labels).backward()
    step = train_step(
        Madry(MadryOptions()), model, None, spec=NORM_SPECS[0], others=NORM_SPECS[1:], norm_choice="worst"
    )
    logs = step(batch)
    assert_same_step(model, reference)
    assert len(set(numbers)) > 1
    for k, norm in enumerate(RADII):
        assert float(logs[f"worst_{norm}"]) == numbers.count(k) / N


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(OWN_ATTACK)))
def test_every_method_with_the_worst_norm_logs_how_often_it_was_which(name: str) -> None:
    method = METHODS[name](default_config(name).options)
    guide = moved_network(2) if method.uses_guide else None
    step = train_step(
        method, moved_network(1), guide, spec=NORM_SPECS[0], others=NORM_SPECS[1:], norm_choice="worst"
    )
    found = Averages()
    found.add(step(make_batch()), N)
    shares = {key: value for key, value in found.means().items() if key.startswith("worst_")}
    assert shares.keys() == {f"worst_{norm}" for norm in RADII}
    assert sum(shares.values()) == pytest.approx(1)


def test_the_worst_norms_of_a_mixed_batch_are_those_of_its_attacked_images() -> None:
    batch, specs = make_batch(), {"spec": NORM_SPECS[0], "others": NORM_SPECS[1:], "norm_choice": "worst"}
    found = []
    for method, images in ((Arda(ArdaOptions(adversarial_share=0.75)), N), (Madry(MadryOptions()), 6)):
        averages = Averages()
        step = train_step(method, moved_network(1), None, **specs)
        given = Batch(batch.x[:images], batch.labels[:images], batch.indices[:images])
        averages.add(step(given), images)
        found.append({key: value for key, value in averages.means().items() if key.startswith("worst_")})
    assert found[0] == pytest.approx(found[1])
    assert max(found[0].values()) < 1


def test_the_average_is_the_mean_of_the_losses_under_each_norm() -> None:
    batch, model = make_batch(), moved_network(1)
    reference = copy.deepcopy(model)
    losses = [
        mean_loss(reference, attacked_reference(copy.deepcopy(model), batch, norm), batch.labels)
        for norm in RADII
    ]
    torch.stack(losses).mean().backward()
    step = train_step(
        Madry(MadryOptions()), model, None, spec=NORM_SPECS[0], others=NORM_SPECS[1:], norm_choice="average"
    )
    logs = step(batch)
    assert_same_step(model, reference)
    each = [float(logs[f"train_adv_acc_{norm}"]) for norm in RADII]
    assert float(logs["train_adv_acc"]) == pytest.approx(sum(each) / 3)


@pytest.mark.parametrize(("choice", "graphs"), [("alternate", 3), ("worst", 2), ("average", 2)])
def test_a_captured_step_with_several_norms_is_the_plain_step(choice: str, graphs: int) -> None:
    specs = [PGDSpec(0.1, 0.05, 2), PGDSpec(0.5, 0.2, 2, norm="l2"), apgd_spec("l1")]
    options: dict[str, Any] = {"spec": specs[0], "others": specs[1:], "norm_choice": choice}
    recorder = SimulatedRecorder()
    got = train(make_step(make_method("madry"), "cpu", recorder=recorder, **options))
    want = train(make_step(make_method("madry"), "cpu", **options))
    assert recorder.captured == graphs
    assert repr(got[0]) == repr(want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_several_norms_and_l1_or_refuses_them_by_name(name: str) -> None:
    config = default_config(name)
    info = dataset_info("cifar10")
    assert info is not None
    method = METHODS[name](config.options)
    several = replace(config.attack, norms="linf,l2,l1")
    if name in OWN_ATTACK:
        with pytest.raises(UserError, match=f"norms linf,l2,l1: method {name} .*leave --norms out"):
            resolved_attack(several, info, method, [])
    else:
        notes: list[str] = []
        found = resolved_attack(several, info, method, notes)
        assert found.radii() == {"linf": 0.031, "l2": 0.5, "l1": 12.0}
        assert found.eval_radii() == {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
        other = resolved_attack(replace(config.attack, norms="l2,linf"), info, method, [])
        assert other.eval_radii() == {"l2": 0.5, "linf": 8 / 255}
        assert [spec.norm for spec in found.specs()] == ["linf", "l2", "l1"]
        assert found.specs()[2].step_size == pytest.approx(12 / 0.031 * found.step_size)
        assert "one of linf 0.031 (7.91/255), l2 0.5, l1 12 per batch" in notes[-1]
        assert resolved_attack(found, info, method, []) == found
    one = replace(config.attack, norm="l1")
    if name in ("fgsm_pgi", "n_fgsm", "nu_at", "liet", "grad_align", "dyart", "vat"):
        with pytest.raises(UserError, match=name):
            resolved_attack(one, info, method, [])
        return
    resolved = resolved_attack(one, info, method, [])
    assert (resolved.eps, resolved.eval_eps, resolved.norm) == (12.0, 12.0, "l1")


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_without_a_separate_attack_does_not_ignore_its_batch_norm_in_silence(
    name: str, mode: Any
) -> None:
    config, info = default_config(name), dataset_info("cifar10")
    assert info is not None
    method, notes = METHODS[name](config.options), list[str]()
    if method.searches and "attack_bn" not in method.unused_attack:
        return
    try:
        resolved_attack(replace(config.attack, attack_bn=mode), info, method, notes)
    except UserError as error:
        notes.append(str(error))
    said = "\n".join(notes)
    assert f"attack_bn {mode} has no effect: method {name}" in said or f"--attack-bn eval, got {mode}" in said


TARGETED = ("alp", "ard", "arda", "iad", "madry", "mail", "mart")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_target_classes_or_refuses_them_by_name(name: str) -> None:
    config = default_config(name)
    info = dataset_info("cifar10")
    assert info is not None
    method = METHODS[name](config.options)
    attack = replace(config.attack, targeted="random")
    if name not in TARGETED:
        with pytest.raises(UserError, match=f"targeted random: the attack of method {name}"):
            resolved_attack(attack, info, method, [])
        return
    notes: list[str] = []
    assert resolved_attack(attack, info, method, notes).specs()[0].target == "random"
    assert "towards a random class" in notes[-1]
    recorder, spec = SimulatedRecorder(), PGDSpec(0.1, 0.05, 2, target="random")
    got = train(make_step(make_method(name), "cpu", recorder=recorder, spec=spec, seed=3))
    want = train(make_step(make_method(name), "cpu", spec=spec, seed=3))
    assert recorder.captured >= 1
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    "given",
    [
        ["--targeted", "random"],
        ["--targeted", "least", "--attack", "apgd"],
        ["--attack", "apgd"],
        ["--norm", "l1"],
        ["--attack", "apgd", "--norm", "l1", "--start", "uniform"],
        ["--norms", "linf,l2,l1", "--norm-eps", "0.1,1,auto"],
        ["--norms", "l1,linf", "--norm-choice", "worst"],
        ["--norms", "linf,l1", "--norm-choice", "average", "--attack", "apgd"],
    ],
    ids=" ".join,
)
def test_a_run_trains_and_resumes_exactly(given: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ["--method", "madry", "--steps", "2", *given]
    assert main(["train", "--run-dir", str(whole), *TINY, *given]) == 0
    assert main(["train", "--run-dir", str(parts), *TINY, *given, "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    for name in (p.name for p in (whole / "last").glob("*.safetensors")):
        assert (whole / "last" / name).read_bytes() == (parts / "last" / name).read_bytes()
    assert timeless(whole) == timeless(parts)


def timeless(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("train_seconds", "images_per_s")} for row in rows]


def test_validation_and_evaluation_of_several_norms_count_what_withstands_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "eval.json"
    given = ["--method", "madry", "--steps", "2", "--norms", "linf,l2", "--norm-eps", "0.05,0.6"]
    assert main(["train", "--run-dir", str(run), *TINY, *given]) == 0
    for row in timeless(run):
        both = [row["val_pgd10_acc_linf"], row["val_pgd10_acc_l2"]]
        assert sum(both) - 1 <= row["val_pgd10_acc"] <= min(both)
        assert {"train_adv_acc_linf", "train_adv_acc_l2"} <= row.keys()
        mean = sum(row[f"train_adv_acc_{norm}"] for norm in ("linf", "l2")) / 2
        assert row["train_adv_acc"] == pytest.approx(mean, abs=0.2)
    capsys.readouterr()
    asked = ["--attacks", "clean,pgd5", "--num-images", "60", "--checkpoints", "last"]
    assert main(["eval", str(run), *asked, "--json", str(file)]) == 0
    records = json.loads(file.read_text())["results"]
    assert [(r["norm"], r["eps"]) for r in records] == [("linf", 0.05), ("l2", 0.6)]
    standing = [unpack_bits(r["worst"]["robust_bits"], r["images"]) for r in records]
    union = int((standing[0] & standing[1]).sum())
    assert {r["union"]["correct"] for r in records} == {union}
    assert "of the images stay correct under every attack of linf, l2" in capsys.readouterr().out
    assert main(["eval", str(run), *asked, "--attacks", "pgd5", "--json", str(file)]) == 0
    records = json.loads(file.read_text())["results"]
    # PGD keeps misclassified images misclassified, so without clean accuracy the union is the same.
    assert {r["union"]["correct"] for r in records} == {union}
    capsys.readouterr()
    assert main(["eval", str(run), *asked, "--attacks", "clean", "--json", str(file)]) == 0
    assert [r["union"] for r in json.loads(file.read_text())["results"]] == [None, None]
    assert "stay correct under every attack of linf" not in capsys.readouterr().out
    assert main(["eval", str(run), *asked, "--norm", "l2", "--json", str(file)]) == 0
    (alone,) = json.loads(file.read_text())["results"]
    assert (alone["norm"], alone["eps"], alone["union"]) == ("l2", 0.6, None)
    assert main(["eval", str(run), *asked, "--eps", "0.1"]) == 2
    assert "was trained against linf, l2; say which with --norm" in capsys.readouterr().err


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
    for given, message in (
        (["--norms", "linf"], "--norms must be two or more different norms"),
        (["--norms", "linf,linf"], "norms must be two or more different norms"),
        (["--norms", "linf,l0"], "norm of --norms"),
        (["--norms", "linf,l2", "--norm", "l2"], "--norm l2 is not the first of --norms linf,l2"),
        (["--norms", "linf,l2", "--norm-eps", "0.1"], "--norm-eps must be a radius for each of --norms"),
        (["--norms", "linf,l2", "--norm-eps", "0.1,-1"], "(l2) must be above 0"),
        (["--norms", "linf,l2", "--norm-eps", "0.1,0.5", "--eps", "0.2"], "leave --eps out"),
        (["--norm-choice", "worst"], "--norm-choice has no effect: needs --norms"),
        (["--norm", "l0"], "l0"),
    ):
        assert message in refusal(capsys, *run, *given)
    assert not (tmp_path / "run").exists()
