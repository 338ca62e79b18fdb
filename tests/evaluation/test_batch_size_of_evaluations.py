"""Evaluations beside `measure` draw per image as well: their results are those of any batch size."""

from dataclasses import astuple
from typing import Any

import pytest
import torch
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import parse_attack
from fastdynat.attacks.boundary_search import BoundarySpec
from fastdynat.data import ImageSet
from fastdynat.evaluation import saliency
from fastdynat.evaluation.boundary_speed import boundary_speed
from fastdynat.evaluation.curves import accuracy_over_eps
from fastdynat.evaluation.fidelity import check_fidelity
from fastdynat.evaluation.probes import ProbedNetwork
from fastdynat.evaluation.saliency import explain
from fastdynat.evaluation.transfer import transfer_matrix
from fastdynat.ops.image_draws import ImageDraws

N, CPU, SIZES = 40, torch.device("cpu"), (1, 7, 40)


def case(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    model = tiny_cnn(0, dtype=dtype).eval()
    x = torch.randint(256, (N, 3, 8, 8), generator=torch.Generator().manual_seed(3)).to(dtype) / 255
    with torch.no_grad():
        labels = model(x).argmax(1)
    return model, x, labels


def image_set() -> ImageSet:
    _, x, labels = case()
    return ImageSet((x * 255).round().to(torch.uint8), labels)


def how(size: int) -> dict[str, Any]:
    return {"device": CPU, "batch_size": size, "seed": 2}


def test_a_transfer_matrix() -> None:
    networks, attack = {"a": tiny_cnn(0), "b": tiny_cnn(1)}, parse_attack("pgd2", eps=0.03, step_size=0.01)
    found = [transfer_matrix(networks, image_set(), attack, **how(size)) for size in SIZES]
    assert found[0] == found[1] == found[2]
    assert 0 < found[0].accuracy[0][0] < 1
    assert found[0] != transfer_matrix(networks, image_set(), attack, device=CPU, batch_size=40, seed=3)


def test_a_curve() -> None:
    model, _, _ = case()
    curves = [accuracy_over_eps(model, image_set(), "pgd2-2", [0, 0.01, 0.02, 0.03], **how(s)) for s in SIZES]
    assert curves[0] == curves[1] == curves[2]
    assert len(set(curves[0].accuracy)) > 2


def test_missing_gradients_are_counted_at_the_same_starts() -> None:
    model, _, _ = case()
    found = []
    for size in SIZES:
        probed = ProbedNetwork(model, image_set(), CPU, size, 2, lambda: False, lambda images: None)
        found.append(probed.without_gradient("linf", 0.1))
    assert found[0] == found[1] == found[2]
    assert 0 < found[0][1] < N  # some starts are misclassified


@pytest.mark.parametrize("chunk", [256, 5])
def test_an_explanation(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, labels = case(torch.float64)
    given: dict[str, Any] = {"samples": 3, "noise": 0.2}
    whole = explain(model, x, labels, generator=ImageDraws.of(2, range(N), CPU), **given)
    monkeypatch.setattr(saliency, "CHUNK", chunk)
    rows = torch.tensor([5, 3, 30])
    part = explain(model, x[rows], labels[rows], generator=ImageDraws.of(2, rows, CPU), **given)
    torch.testing.assert_close(part.smooth_grad, whole.smooth_grad[rows])
    other = explain(model, x[rows], labels[rows], generator=ImageDraws.of(3, rows, CPU), **given)
    assert not torch.allclose(other.smooth_grad, part.smooth_grad)


def test_the_speed_of_the_boundary() -> None:
    model, x, labels = case(torch.float64)
    move = {name: 1e-3 * torch.ones_like(p) for name, p in model.named_parameters()}
    spec = BoundarySpec(steps=20, eps_start=0.3, temperature=20.0)

    def speed(rows: Tensor) -> list[Tensor]:
        draws = ImageDraws.of(2, rows, CPU)
        found = boundary_speed(model, x[rows], labels[rows], move, spec, generator=draws)
        return [found.margin, found.speed]

    parts = [speed(rows) for rows in torch.arange(N).split(7)]
    for part, whole in zip(zip(*parts, strict=True), speed(torch.arange(N)), strict=True):
        torch.testing.assert_close(torch.cat(part), whole, equal_nan=True)
        assert int(whole.isfinite().sum()) > N // 2


def test_fidelity() -> None:
    model, x, labels = case(torch.float64)
    engine, spec = AttackEngine(model, x[:2]), PGDSpec(0.05, 0.02, 2)
    found = [
        check_fidelity(engine, model, zip(x.split(size), labels.split(size), strict=True), spec, seed=2)
        for size in (7, 40)
    ]
    assert astuple(found[0]) == pytest.approx(astuple(found[1]), rel=1e-9, abs=1e-12)
