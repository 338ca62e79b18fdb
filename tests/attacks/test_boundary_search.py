"""Boundary search: a loop transcription of the published algorithm, and invariants."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.boundary_reference import phi, published_search
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attacks.boundary_search import (
    Boundary,
    BoundarySpec,
    boundary,
    boundary_start,
    nearly_nearest,
    run_boundary,
)
from fastdynat.errors import UserError
from fastdynat.execution.graphed_call import WARM_UP_CALLS

N, K, SHAPE = 6, 5, (3, 4, 4)


def relu_network(seed: int, bias: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, K)).double()
    with torch.no_grad():
        net[3].weight.mul_(8)  # margins of order one, the boundary inside the box
        net[3].bias.add_(bias)
    return net


def images(seed: int, n: int = N) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
def test_search_walks_the_published_path(seed: int) -> None:
    net, x = relu_network(seed), images(seed)
    spec = BoundarySpec(temperature=5.0)
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % K  # misclassified: takes no part
    start = boundary_start(x, spec.eps_start)
    got = boundary(net, x, y, spec, x_start=start)
    for i in range(N):
        best, distance = published_search(net, x[i], int(y[i]), start[i], spec)
        assert bool(got.found[i]) == (distance is not None)
        torch.testing.assert_close(got.x_adv[i], best, rtol=0, atol=1e-9)
        assert float(got.distance[i]) == pytest.approx(distance or 0.0, abs=1e-9)
    assert got.found.sum() >= 3, "too few points to compare"
    assert float(got.margin[got.found].abs().max()) < 1e-2
    assert got.gradients == N * spec.steps


def test_on_a_linear_network_the_point_is_the_projection() -> None:
    """Two classes: the soft margin is linear, and R = phi / ||w||_1 where no pixel meets the box."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    x = 0.5 + 0.2 * (images(1) - 0.5)
    y = net(x).argmax(1)
    w = net[1].weight[y] - net[1].weight[1 - y]
    value = net(x).gather(1, y[:, None])[:, 0] - net(x).gather(1, 1 - y[:, None])[:, 0]
    radius = value / w.abs().sum(1)
    projection = x - radius[:, None, None, None] * w.sign().view_as(x)
    # Beyond the plane by a part in 1e9, so that the point found is the projection itself.
    exact = boundary(net, x, y, BoundarySpec(eta=1 + 1e-9, eps_start=0.0, flat_pixel_test=False))
    assert bool(exact.usable.all())
    # All pixels move as far, so that none is left to be flat.
    assert not bool(boundary(net, x, y, BoundarySpec(eta=1 + 1e-9, eps_start=0.0)).usable.any())
    torch.testing.assert_close(exact.x_adv, projection, rtol=0, atol=1e-8)
    torch.testing.assert_close(exact.distance, radius, rtol=1e-8, atol=0)
    torch.testing.assert_close(exact.grad_norm, w.abs().sum(1))
    # The published setting: a random start, 5 % beyond; less than 2 % of it is left.
    published = boundary(net, x, y, BoundarySpec())
    assert bool(((published.distance > radius) & (published.distance < 1.02 * radius)).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 6), bias=st.sampled_from([0.0, 3.0, 50.0]))
def test_what_always_holds(seed: int, steps: int, bias: float) -> None:
    net, x = relu_network(seed % 100, bias), images(seed)
    y = torch.randint(K, (N,), generator=torch.Generator().manual_seed(seed))
    got = boundary(net, x, y, BoundarySpec(steps=steps), generator=torch.Generator().manual_seed(seed))
    assert bool(((got.x_adv >= 0) & (got.x_adv <= 1)).all())
    torch.testing.assert_close((got.x_adv - x).abs().flatten(1).amax(1), got.distance, rtol=0, atol=0)
    for i in range(N):
        before, after = (float(phi(net, image, int(y[i]), 5.0).detach()) for image in (x[i], got.x_adv[i]))
        assert float(got.margin[i]) == pytest.approx(after, abs=1e-9)
        assert not bool(got.found[i]) or (before > 1e-9 and after < 0)
        assert bool(got.found[i]) or torch.equal(got.x_adv[i], x[i])
    assert bool((got.found | ~got.usable).all())


@pytest.mark.parametrize("case", ["all wrong", "none found", "no gradient"])
def test_nothing_found_is_finite(case: str) -> None:
    net, x = relu_network(0), images(0)
    y = net(x).argmin(1) if case == "all wrong" else net(x).argmax(1)
    if case == "none found":  # the boundary is far outside the box
        y = torch.zeros_like(y)
        with torch.no_grad():
            net[3].bias[0] += 1e4
    if case == "no gradient":
        with torch.no_grad():
            net[3].weight.zero_()
    got = boundary(net, x, y, BoundarySpec(steps=4))
    assert not bool(got.found.any())
    assert not bool(got.usable.any())
    assert torch.equal(got.x_adv, x)
    assert torch.equal(got.distance, torch.zeros_like(got.distance))
    assert bool(got.grad_norm.isfinite().all())
    assert int(got.zero_grads) == (N * 4 if case == "no gradient" else 0)


def test_an_image_that_is_not_a_number_spoils_no_other() -> None:
    net, x = relu_network(0), images(0)
    y, start = net(x).argmax(1), boundary_start(x, 0.03)
    want = boundary(net, x, y, BoundarySpec(), x_start=start)
    x[2] = float("nan")
    with attack_mode(net, "eval"):
        got = run_boundary(Ascent(net), x, y, start, spec=BoundarySpec())
    others = torch.arange(N) != 2
    torch.testing.assert_close(got.x_adv[others], want.x_adv[others])
    assert not bool(got.found[2])


def test_start_is_half_the_radius_away() -> None:
    x = 0.5 + 0.1 * images(3)
    away = (boundary_start(x, 0.2) - x).abs().flatten(1).amax(1)
    torch.testing.assert_close(away, torch.full_like(away, 0.1))
    assert bool((boundary_start(images(3), 1.0) <= 1).all())
    assert torch.equal(boundary_start(x, 0.0), x)


def test_quality_filter_counts_pixels() -> None:
    """Ten pixels move by (nearly) the maximum, two by less: at least ten must move against the gradient."""
    moved = torch.cat([torch.full((10,), 0.02), torch.full((2,), 0.01)]).double()
    moved[3] = -0.0199
    against = -moved.sign()
    one_wrong, small_wrong, flat = against.clone(), against.clone(), against.clone()
    one_wrong[3] *= -1
    small_wrong[10:] *= -1
    flat[5] *= 1e-6  # moved * grad is above -1e-7
    rows = torch.stack([against, one_wrong, small_wrong, flat, against])
    margin = torch.tensor([-0.01, -0.01, -0.29, -0.01, -0.3])
    want = torch.tensor([True, False, True, False, False])
    assert torch.equal(nearly_nearest(moved.expand(5, -1), margin, rows), want)
    # The third test is passed by a pixel of the other two whose gradient is at most 0.1, and by nothing where
    # there is none.
    rows[0, 10], rows[2, 11] = 0.1, -0.11
    want = torch.tensor([True, False, False, False, False])
    assert torch.equal(nearly_nearest(moved.expand(5, -1), margin, rows, flat_pixel_test=True), want)
    assert not bool(
        nearly_nearest(moved.expand(5, -1)[:, :10], margin, rows[:, :10], flat_pixel_test=True).any()
    )


def test_the_caller_is_left_alone() -> None:
    net = tiny_cnn(0).train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.rand(4, 3, 8, 8)
    with torch.inference_mode():
        result = boundary(
            net, x, torch.arange(4), BoundarySpec(steps=2), generator=torch.Generator().manual_seed(0)
        )
    assert not result.x_adv.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [module.training for module in net] == [True, False, True, True, True, True, True]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps >= 1"),
        ({"eta": 0.9}, "eta"),
        ({"eps_start": 8}, "eps_start"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_numbers_that_cannot_work(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BoundarySpec(**values)


# ---- on the engine


def engine_and_batch(n: int = 16, **switches: Any) -> tuple[AttackEngine, nn.Module, Tensor, Tensor]:
    net = tiny_cnn(0)
    with torch.no_grad():
        net[6].weight.mul_(40)
    x = torch.rand(n, 3, 8, 8)
    recorder = switches.pop("recorder", None)
    engine = AttackEngine(
        net, x[:2], switches=AttackSwitches(**switches), fallbacks=NoFallbacks(), recorder=recorder
    )
    return engine, net, x, net.eval()(x).argmax(1)


def search(engine: AttackEngine, x: Tensor, y: Tensor, spec: BoundarySpec, *start: Tensor) -> Boundary:
    return engine.captured(partial(run_boundary, spec=spec), x, y, *start, key=spec, passes=spec.steps)


def test_the_engine_finds_what_the_plain_network_finds() -> None:
    engine, net, x, y = engine_and_batch()
    start = boundary_start(x, 0.03)
    got, want = (
        search(engine, x, y, BoundarySpec(), start),
        boundary(net, x, y, BoundarySpec(), x_start=start),
    )
    assert torch.equal(got.found, want.found)
    assert int(want.found.sum()) > 10
    torch.testing.assert_close(
        got.distance, want.distance, rtol=1e-3, atol=1e-5
    )  # the engine folds batch norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_points_are_on_the_full_precision_boundary(dtype: torch.dtype) -> None:
    engine, net, x, y = engine_and_batch(dtype=dtype, channels_last=True)
    start = boundary_start(x, 0.03)
    got, want = (
        search(engine, x, y, BoundarySpec(), start),
        boundary(net, x, y, BoundarySpec(), x_start=start),
    )
    assert got.margin.dtype == got.grad_norm.dtype == got.distance.dtype == got.x_adv.dtype == torch.float32
    both = got.found & want.found
    assert int(both.sum()) > 10
    # Rounding moves the boundary by what it does to the logits, and sends single images to other points.
    error = (got.distance - want.distance)[both].abs().median()
    assert float(error) < (0.01 if dtype is torch.bfloat16 else 3e-4)
    assert float((got.grad_norm / want.grad_norm - 1)[both].abs().median()) < (
        0.05 if dtype is torch.bfloat16 else 0.01
    )


def test_margin_gradient_is_autograds() -> None:
    engine, net, x, y = engine_and_batch()
    leaf = x.clone().requires_grad_()
    z = net.eval()(leaf)
    others = z.masked_fill(F.one_hot(y, 10).bool(), float("-inf"))
    want = z.gather(1, y[:, None])[:, 0] - torch.logsumexp(5 * others, 1) / 5
    margin, grad = engine.margin_and_grad(x, y, 5.0)
    torch.testing.assert_close(margin, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), leaf)[0], rtol=1e-3, atol=1e-5)


def test_captured_it_is_the_same_search() -> None:
    recorder = SimulatedRecorder()
    graphed, _, x, y = engine_and_batch(recorder=recorder, fold=False)
    plain, *_ = engine_and_batch(fold=False)
    for call in range(WARM_UP_CALLS + 2):
        torch.manual_seed(call)
        got = search(graphed, x, y, BoundarySpec(steps=4))
        torch.manual_seed(call)
        want = search(plain, x, y, BoundarySpec(steps=4))
        for name in ("x_adv", "found", "distance", "margin", "grad_norm", "usable", "zero_grads"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert (recorder.captured, recorder.replayed) == (1, 2)


@needs("cxx")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_it_is_one_graph_and_the_same_search(dtype: torch.dtype | None) -> None:
    compiled, _, x, y = engine_and_batch(dtype=dtype, compile="default")
    plain, *_ = engine_and_batch(dtype=dtype)
    start = boundary_start(x, 0.03)
    counters.clear()
    got = search(compiled, x, y, BoundarySpec(), start)
    search(compiled, x, y, BoundarySpec(steps=5))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    want = search(plain, x, y, BoundarySpec(), start)
    both = got.found & want.found
    assert int(both.sum()) > 10
    tight = dtype is None
    torch.testing.assert_close(
        got.distance[both], want.distance[both], rtol=1e-3 if tight else 0.1, atol=1e-5 if tight else 4e-3
    )
