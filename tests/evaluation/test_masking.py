"""Gradient-masking checks: silent on networks without masking, loud on those known to mask."""

import copy
from math import comb
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.splits import load_train
from torch import Tensor, nn

from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import parse_attack
from fastdynat.attacks.registry import split_names
from fastdynat.commands.main import main
from fastdynat.data import ImageSet, load_test
from fastdynat.errors import UserError
from fastdynat.evaluation.masking import MaskingReport, at_least, check_masking
from fastdynat.evaluation.measure import Stopped
from fastdynat.runs import load_network

CPU = torch.device("cpu")
EPS = 0.1


def digits(count: int | None = None) -> ImageSet:
    found = load_test("digits", None)[1]
    return ImageSet(found.images[:count], found.labels[:count])


def trained(seed: int, *, adversarially: bool) -> nn.Sequential:
    """A network of two layers on 8x8 digits, by the loop of Madry et al. with two steps."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    data = load_train("digits", None, val_size=100, seed=0).train
    x, labels = data.images / 255, data.labels
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for batch in (rows for _ in range(12) for rows in torch.randperm(len(x)).split(128)):
        seen = x[batch]
        if adversarially:
            seen = pgd(net, seen, AttackGoal("ce", labels[batch]), PGDSpec(EPS, EPS, 2)).x_adv
        optimizer.zero_grad()
        F.cross_entropy(net(seen), labels[batch]).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def other() -> nn.Sequential:
    """Another network trained as `madry` was."""
    return trained(1, adversarially=True)


@pytest.fixture(scope="module")
def madry() -> nn.Sequential:
    return trained(0, adversarially=True)


def report(
    net: nn.Module, count: int = 150, *, norm: str = "linf", eps: float = EPS, **options: object
) -> MaskingReport:
    return check_masking(
        net, digits(count), norm=norm, eps=eps, device=CPU, batch_size=100, seed=1, **options
    )


def warned(found: MaskingReport) -> set[str]:
    return {check.name for check in found.warnings}


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Quantised(Wrapped):
    """Rounding has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * 15).round() / 15)


class Noisy(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.05 * torch.randn_like(x))


class Shattered(Wrapped):
    """A fine sawtooth on every pixel: gradients that are there and point nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.02 * torch.sin(400 * x))


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 1.5)])
def test_a_network_trained_as_it_should_be_raises_no_warning(
    madry: nn.Sequential, other: nn.Sequential, norm: str, eps: float
) -> None:
    told: list[float] = []
    found = report(madry, norm=norm, eps=eps, source=other, advance=told.append)
    by_name = {m.attack: m.accuracy for m in found.measurements}
    assert by_name["pgd20"] > 0.3
    assert warned(found) == set(), found.warnings
    assert all(check.evidence and not check.remedy for check in found.checks)
    assert sum(told) == pytest.approx(150)
    assert "pgd20 on another network" in by_name


def test_a_network_that_is_not_robust_is_not_suspected_of_pretending_to_be() -> None:
    assert warned(report(trained(0, adversarially=False))) == set()


def test_large_logits_are_found_to_saturate_the_cross_entropy(madry: nn.Sequential) -> None:
    """The effect of defensive distillation, without its training."""
    loud = copy.deepcopy(madry)
    with torch.no_grad():
        loud[-1].weight.mul_(100)
        loud[-1].bias.mul_(100)
    found = report(loud)
    assert warned(found) == {"gradients"}  # our attacks rescale, and break as many as without the factor
    gradients = next(check for check in found.warnings if check.name == "gradients")
    assert "margin 0.0 %, dlr 0.0 %" in gradients.evidence
    assert "apgd-t" in gradients.remedy
    plain = {m.attack: m.correct for m in report(madry).measurements}
    for m in found.measurements:
        if m.attack in ("fgsm", "pgd20", "pgd50-2"):
            assert abs(m.correct - plain[m.attack]) <= 0.03 * m.images


def test_a_quantiser_is_found_to_have_no_gradient(madry: nn.Sequential) -> None:
    found = report(Quantised(madry), source=madry)
    assert {"gradients", "unbounded attack", "black box"} <= warned(found)
    gradients = next(check for check in found.warnings if check.name == "gradients")
    assert "ce 100.0 %, margin 100.0 %, dlr 100.0 %" in gradients.evidence
    assert "BPDA" in gradients.remedy


def test_random_answers_are_found(madry: nn.Sequential) -> None:
    assert "repeated answers" in warned(report(Noisy(madry), 60))


def test_shattered_gradients_lose_to_another_networks(madry: nn.Sequential) -> None:
    assert "black box" in warned(report(Shattered(madry), source=madry))


def test_remedies_name_attacks() -> None:
    found = report(Quantised(trained(0, adversarially=True)), 60)
    commands = [
        check.remedy for check in found.warnings if check.remedy.startswith("fastdynat eval RUN --attacks ")
    ]
    assert commands
    for command in commands:
        for name in split_names(command.split("--attacks ")[1].split(";")[0]):
            parse_attack(name, eps=EPS, step_size=EPS)


def test_checks_stop_and_refuse_norms_they_do_not_know(madry: nn.Sequential) -> None:
    told: list[float] = []
    with pytest.raises(Stopped):
        report(madry, advance=told.append, should_stop=lambda: bool(told))
    with pytest.raises(UserError, match="l7"):
        report(madry, norm="l7")


def exact_chance(more: int, less: int) -> float:
    """McNemar's exact test: the chance of so many of both if either were as likely."""
    total = more + less
    return sum(comb(total, k) for k in range(more, total + 1)) / 2**total


@pytest.mark.parametrize("images", [200, 2000])
def test_the_bound_of_a_difference_agrees_with_the_exact_test(images: int) -> None:
    for less in range(8):
        for more in range(40):
            positive = at_least(more, less, images) > 0
            chance = exact_chance(more, less)
            if chance < 0.005:
                assert positive, (more, less)
            if chance > 0.03:
                assert not positive, (more, less)


@pytest.mark.slow
def test_defensive_distillation_is_flagged_and_honest_training_is_not(tmp_path: Path) -> None:
    flags = [
        "--temperature",
        "20",
        "--epochs",
        "12",
        "--lr",
        "1",
        "--schedule",
        "onecycle",
        "--batch-size",
        "32",
    ]
    flags += ["--val-every", "12", "--quiet"]
    teacher, student, honest = (str(tmp_path / name) for name in ("teacher", "student", "honest"))
    assert main(["train", "--method", "natural", "--run-dir", teacher, *flags]) == 0
    assert (
        main(["train", "--method", "distillation", "--guide-from", teacher, "--run-dir", student, *flags])
        == 0
    )
    flags = ["--batch-size", "32", "--epochs", "5", "--quiet"]
    assert main(["train", "--method", "madry", "--run-dir", honest, *flags]) == 0
    nets = {
        run: load_network((Path(run) / "last").resolve() / "model.safetensors")[0]
        for run in (student, honest)
    }
    found = report(nets[student], 359)
    accuracy = {m.attack: m.accuracy for m in found.measurements}
    assert accuracy["fgsm"] > 0.4
    assert accuracy["cw20"] < 0.02
    assert {"gradients", "loss", "scale of the logits"} <= warned(found)
    assert warned(report(nets[honest], 359, source=nets[student])) == set()
