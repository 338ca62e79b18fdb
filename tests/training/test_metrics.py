"""Curves, margins, transfer matrices and saliency, against linear networks and explicit formulas."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attacks import NamedAttack, parse_attack
from fastdynat.attacks.interface import Nearest
from fastdynat.data import ImageSet
from fastdynat.errors import UserError
from fastdynat.evaluation import saliency
from fastdynat.evaluation.curves import accuracy_over_eps, curve_of_distances
from fastdynat.evaluation.margins import margins
from fastdynat.evaluation.measure import Stopped, measure
from fastdynat.evaluation.outcome import Measurement, wilson
from fastdynat.evaluation.saliency import explain, gini, sobel, spearman
from fastdynat.evaluation.transfer import transfer_matrix

CPU = torch.device("cpu")


def images(count: int, *, low: int = 0, high: int = 256, classes: int = 10) -> ImageSet:
    return ImageSet(
        torch.randint(low, high, (count, 3, 8, 8), dtype=torch.uint8), torch.randint(classes, (count,))
    )


def linear(classes: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes)).to(dtype)


def linf_distances(net: nn.Sequential, data: ImageSet) -> Tensor:
    """Distances of images from the plane between two classes; 0 where misclassified."""
    weight = net[1].weight.double()
    logits = net.double()(data.images.double() / 255)
    net.float()
    lead = logits.gather(1, data.labels[:, None]) - logits.gather(1, 1 - data.labels[:, None])
    return (lead.squeeze(1) / (weight[0] - weight[1]).abs().sum()).clamp_min(0).detach()


def of_distances(distances: list[float]) -> Measurement:
    robust, labels = (
        torch.zeros(len(distances), dtype=torch.bool),
        torch.zeros(len(distances), dtype=torch.int64),
    )
    return Measurement.of(
        "nearest",
        robust,
        labels,
        classes=1,
        seconds=1.0,
        batch_size=1,
        distances=torch.tensor(distances, dtype=torch.double),
    )


def test_the_curves_of_a_linear_network_are_those_of_its_distances() -> None:
    """No pixel is near 0 or 1, so that FGSM is the exact attack on a linear network."""
    net, data = linear(2), images(60, low=100, high=156, classes=2)
    distances = linf_distances(net, data)
    middle = distances[distances > 0].sort().values
    eps = [0.0, *(float(a + b) / 2 for a, b in zip(middle[:-1:6], middle[1::6], strict=False))]
    expected = [float((distances > e).double().mean()) for e in eps]
    told: list[float] = []
    ran = accuracy_over_eps(net, data, "fgsm", eps, device=CPU, batch_size=25, seed=0, advance=told.append)
    known = curve_of_distances(of_distances(distances.tolist()), "linf", eps)
    assert ran.accuracy == known.accuracy == expected
    assert ran.eps == known.eps == eps
    assert ran.ci == [wilson(round(60 * share), 60) for share in expected]
    assert sum(told) == pytest.approx(60 * len(eps))
    assert len(set(expected)) > 3


def test_a_curve_keeps_the_order_of_its_radii_and_never_rises() -> None:
    net, data = tiny_cnn().eval(), images(40)
    data.labels.copy_(net(data.images / 255).argmax(1))
    curve = accuracy_over_eps(net, data, "pgd2", [0.02, 0, 0.005, 0.01], device=CPU, batch_size=16, seed=0)
    by_eps = [a for _, a in sorted(zip(curve.eps, curve.accuracy, strict=True))]
    assert curve.eps == [0.02, 0, 0.005, 0.01]
    assert by_eps == sorted(by_eps, reverse=True)
    assert by_eps[0] == 1 > by_eps[-1]
    assert by_eps[1] == measure(net, data, parse_attack("pgd2", eps=0.005, step_size=0.00125), **HOW).accuracy


HOW = {"device": CPU, "batch_size": 16, "seed": 0}


def test_curves_refuse_what_they_cannot_draw() -> None:
    net, data = linear(2), images(4, classes=2)
    with pytest.raises(UserError, match=r"must be >= 0 .* got \[-0.1\]"):
        accuracy_over_eps(net, data, "fgsm", [-0.1], **HOW)
    with pytest.raises(UserError, match="clean does not depend on the radius"):
        accuracy_over_eps(net, data, "clean", [0.1], **HOW)
    with pytest.raises(UserError, match="gives no distances"):
        curve_of_distances(measure(net, data, NamedAttack("clean"), **HOW), "linf", [0.1])
    with pytest.raises(UserError, match="at least one bin, got 0"):
        margins(of_distances([0.1]), "linf", bins=0)


@given(
    st.lists(st.one_of(st.floats(0, 5, width=32), st.just(math.inf)), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_margins_count_every_image_once(distances: list[float], bins: int) -> None:
    got = margins(of_distances(distances), "l2", bins=bins)
    ordered = sorted(distances)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    assert got.median == (None if math.isinf(middle) else pytest.approx(middle))
    finite = [d for d in distances if math.isfinite(d)]
    assert got.found == len(finite) / len(distances)
    assert sum(got.counts) == len(finite)
    assert len(got.edges) == bins + 1 == len(got.counts) + 1
    for low, high, count in zip(got.edges[:-1], got.edges[1:], got.counts, strict=True):
        assert count >= sum(low < d < high for d in finite)


@dataclass(frozen=True)
class Claims:
    """Says that it found every image's neighbour at 0.01, which is the image itself."""

    norm: str = "linf"

    def __call__(self, ascent: Any, x: Tensor, labels: Tensor, **ignored: Any) -> Nearest:
        found, distance = torch.ones(len(x), dtype=torch.bool), torch.full((len(x),), 0.01)
        return Nearest(x.clone(), torch.tensor(0), 0, found=found, distance=distance)


def test_the_network_judges_distances() -> None:
    net, data = tiny_cnn(0).eval(), images(12)
    data.labels.copy_(net(data.images / 255).argmax(1))
    data.labels[3] = (data.labels[3] + 1) % 10
    found = measure(net, data, NamedAttack("claims", Claims()), **HOW)
    assert found.distances == [0.0 if i == 3 else None for i in range(12)]


@pytest.mark.parametrize("name", ["pgd3-2", "deepfool-linf"])
def test_a_transfer_matrix_agrees_with_measurements_of_each_pair_and_attacks_once_per_network(
    name: str,
) -> None:
    nets = {name: tiny_cnn(seed).eval() for seed, name in enumerate("abc")}
    data, told = images(40), []
    data.labels.copy_(nets["a"](data.images / 255).argmax(1))
    attack = parse_attack(name, eps=0.02, step_size=0.01)
    got = transfer_matrix(nets, data, attack, **HOW, advance=told.append)
    assert (got.names, got.attack) == (["a", "b", "c"], name)
    for source, row in zip(nets.values(), got.accuracy, strict=True):
        assert row == [measure(net, data, attack, **HOW, source=source).accuracy for net in nets.values()]
    assert got.clean == [measure(net, data, NamedAttack("clean"), **HOW).accuracy for net in nets.values()]
    assert got.accuracy[0][0] < got.clean[0] == 1
    assert sum(told) == pytest.approx(3 * 40)


def test_a_transfer_matrix_restores_modes_stops_and_needs_an_attack() -> None:
    net, data = tiny_cnn(dropout=0.5).train(), images(20)
    modes = [m.training for m in net.modules()]
    fgsm, told = parse_attack("fgsm", eps=0.1, step_size=0.1), []
    with pytest.raises(Stopped):
        transfer_matrix({"a": net}, data, fgsm, **HOW, advance=told.append, should_stop=lambda: bool(told))
    assert told == [16]
    assert [m.training for m in net.modules()] == modes
    with pytest.raises(UserError, match="got 1 networks and 'clean'"):
        transfer_matrix({"a": net}, data, NamedAttack("clean"), **HOW)


@pytest.mark.parametrize("chunk", [256, 5])
def test_saliency_of_a_linear_network_is_its_weights(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "CHUNK", chunk)
    net, x, labels = (
        linear(4, torch.double),
        torch.rand(6, 3, 8, 8, dtype=torch.double),
        torch.randint(4, (6,)),
    )
    got = explain(net, x, labels, samples=7, generator=torch.Generator().manual_seed(3), reference=net)
    weight = net[1].weight.detach()[labels].view_as(x)
    maps = weight.abs().amax(1)
    shown = (maps / maps.flatten(1).quantile(0.99, dim=1)[:, None, None]).clamp(0, 1).float()
    torch.testing.assert_close(got.saliency, shown)
    torch.testing.assert_close(got.smooth_grad, shown)
    assert got.edge_alignment == pytest.approx(spearman(maps, sobel(x)).mean().item())
    assert got.smooth_edge_alignment == pytest.approx(got.edge_alignment)
    assert got.reference_alignment == pytest.approx(1)
    assert got.concentration == pytest.approx(gini(maps).mean().item())
    projected = [(w * i).sum().abs() / w.norm() for w, i in zip(weight, x, strict=True)]
    assert got.image_alignment == pytest.approx(float(sum(projected)) / 6)


def test_smooth_grad_averages_over_noise_in_proportion_to_the_images_range() -> None:
    """The logit ``sum x^3`` has the gradient 3 x^2, whose mean over noise of deviation s is 3 (x^2 + s^2)."""

    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.pow(3).sum((1, 2, 3)), x.sum((1, 2, 3))], 1)

    x = torch.linspace(0.2, 0.7, 64, dtype=torch.double).view(1, 1, 8, 8)
    labels = torch.zeros(1, dtype=torch.int64)
    got = explain(Cube(), x, labels, samples=4000, noise=0.4, generator=torch.Generator().manual_seed(0))
    mean = 3 * (x[:, 0] ** 2 + (0.4 * 0.5) ** 2)
    expected = (mean / mean.flatten().quantile(0.99)).clamp(0, 1)
    # The ratio of the smallest to the largest would be 0.08 without noise, and is 0.15 with it.
    torch.testing.assert_close(got.smooth_grad, expected.float(), rtol=0, atol=0.03)
    assert not torch.allclose(got.saliency, expected.float(), rtol=0, atol=0.03)


def test_explaining_leaves_modes_gradients_and_inference_mode_alone() -> None:
    net, x, labels = tiny_cnn(dropout=0.5).train(), torch.rand(3, 3, 8, 8), torch.tensor([1, 2, 3])
    modes = [m.training for m in net.modules()]
    with torch.inference_mode():
        inside = explain(net, x, labels, samples=2, generator=torch.Generator().manual_seed(0))
    outside = explain(net, x, labels, samples=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inside.smooth_grad, outside.smooth_grad)
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    leaf = x.clone().requires_grad_()
    net.eval()(leaf).gather(1, labels[:, None]).sum().backward()
    assert leaf.grad is not None
    assert outside.edge_alignment == pytest.approx(
        spearman(leaf.grad.abs().amax(1), sobel(x)).mean().item(), abs=1e-3
    )
    for wrong in ({"samples": 0}, {"noise": -0.1}):
        with pytest.raises(UserError, match="samples >= 1 and noise >= 0"):
            explain(net, x, labels, **wrong)


def test_sobel_by_hand() -> None:
    x = torch.rand(2, 3, 5, 6, dtype=torch.double)
    grey = x.mean(1)
    got = sobel(x)
    for n in range(2):
        for i in range(5):
            for j in range(6):

                def at(di: int, dj: int, n: int = n, i: int = i, j: int = j) -> float:
                    return float(grey[n, min(max(i + di, 0), 4), min(max(j + dj, 0), 5)])

                gx = sum(w * (at(d, 1) - at(d, -1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
                gy = sum(w * (at(1, d) - at(-1, d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
                assert float(got[n, i, j]) == pytest.approx(math.hypot(gx, gy))


@given(
    st.lists(st.integers(0, 4), min_size=16, max_size=16),
    st.lists(st.integers(0, 4), min_size=16, max_size=16),
)
def test_rank_correlation_with_ties(a: list[int], b: list[int]) -> None:
    maps = [torch.tensor(values, dtype=torch.float).view(1, 4, 4) for values in (a, b)]
    expected = 0.0 if len(set(a)) == 1 or len(set(b)) == 1 else spearmanr(a, b).statistic
    assert spearman(*maps).item() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(0, 10, width=32), min_size=9, max_size=9))
def test_gini_is_the_mean_difference_over_twice_the_mean(values: list[float]) -> None:
    total = sum(values)
    expected = sum(abs(a - b) for a in values for b in values) / (2 * 9 * total) if total else 0.0
    assert gini(torch.tensor(values, dtype=torch.double).view(1, 3, 3)).item() == pytest.approx(
        expected, abs=1e-12
    )


def test_a_network_without_gradients_has_black_maps_and_no_alignment() -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.round().flatten(1)[:, :2]

    got = explain(Steps(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), samples=2)
    assert not got.saliency.any()
    assert (got.edge_alignment, got.image_alignment, got.concentration) == (0, 0, 0)
