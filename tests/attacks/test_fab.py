"""FAB: the reference's verdicts and distances, analytic distances of linear networks, invariants."""

from typing import Any

import pytest
import torch
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.lengths import length
from fastdynat.attacks import Nearest, fab, parse_attack
from fastdynat.attacks.fab import FAB
from fastdynat.attacks.plane_search import project_on_hyperplane_l1
from fastdynat.errors import UserError

NORMS = ("linf", "l2", "l1")
DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
EPS = {"linf": 0.04, "l2": 0.3, "l1": 1.5}
N, STEPS, TARGETS = 10, 20, 3


def robustish(seed: int = 0) -> nn.Module:
    """Boundaries at all distances, some of them within EPS."""
    net = tiny_cnn(seed).eval()
    with torch.no_grad():
        net[6].weight.mul_(10)
    return net.requires_grad_(False)


def batch(net: nn.Module, n: int = N) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = net(x).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # misclassified as it is
    return x, labels


def nearest(net: nn.Module, x: Tensor, labels: Tensor, **numbers: Any) -> Nearest:
    result = FAB(nearest=True, **numbers)(Ascent(net), x, labels)
    assert isinstance(result, Nearest)
    return result


def peer(net: nn.Module, norm: str, targeted: bool) -> Any:
    from pyautoattack.fab_pt import FABAttack_PT

    # It is in float32 throughout.
    return FABAttack_PT(
        net,
        norm={"linf": "Linf"}.get(norm, norm.upper()),
        n_iter=STEPS,
        eps=EPS[norm],
        targeted=targeted,
        device="cpu",
        n_target_classes=TARGETS,
    )


@pytest.mark.peer
@needs("pyautoattack")
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_verdicts_and_distances_are_the_references(norm: str, targeted: bool) -> None:
    net = robustish()
    x, labels = batch(net)
    reference = peer(net, norm, targeted)
    want = net(reference.perturb(x, labels)).argmax(1) == labels
    numbers: dict[str, Any] = {"eps": EPS[norm], "norm": norm, "targets": TARGETS * targeted, "steps": STEPS}
    got = net(FAB(**numbers)(Ascent(net), x, labels).x_adv).argmax(1) == labels
    assert torch.equal(got, want)
    assert 1 < int(want.sum()) < N - 1, "a verdict that cannot go wrong"
    distances = []
    for reference.target_class in range(2, TARGETS + 2) if targeted else [0]:
        x_adv = reference.attack_single_run(x, labels, is_targeted=targeted)
        fooled = net(x_adv).argmax(1) != labels
        distances.append(length(x_adv - x, norm).where(fooled, float("inf")))
    found = nearest(net, x, labels, **numbers)
    torch.testing.assert_close(found.distance, torch.stack(distances).amin(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("targets", [0, 9])
@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_network_the_distance_is_the_formulas(norm: str, targets: int) -> None:
    """min over the rivals k of (z_y - z_k) / ||w_y - w_k||*, where no pixel meets the box."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).double()
    with torch.no_grad():
        net[1].weight.mul_(torch.linspace(0.1, 2, 48))
        net[1].bias.copy_(0.05 * torch.randn(10) - net[1].weight.sum(1) / 2)
    x = 0.5 + 0.02 * (torch.rand(N, 3, 4, 4, dtype=torch.float64) - 0.5)
    z = net(x).detach()
    labels = z.argmax(1)
    w = net[1].weight.detach()
    normals = torch.linalg.vector_norm(w[labels][:, None] - w, ord=DUAL[norm], dim=2)
    distances = (z.gather(1, labels[:, None]) - z) / normals
    want = distances.scatter(1, labels[:, None], float("inf")).amin(1)
    assert float(want.max()) < 0.4
    found = nearest(net, x, labels, eps=0.1, norm=norm, targets=targets, steps=10, eta=1 + 1e-9)
    torch.testing.assert_close(found.distance, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(length(found.x_adv - x, norm), found.distance)


@pytest.mark.parametrize("targets", [0, TARGETS])
@pytest.mark.parametrize("norm", NORMS)
def test_a_verdict_is_whether_the_nearest_is_within_eps(norm: str, targets: int) -> None:
    net = robustish()
    x, labels = batch(net)
    numbers: dict[str, Any] = {"eps": EPS[norm], "norm": norm, "targets": targets, "steps": STEPS}
    result, found = FAB(**numbers)(Ascent(net), x, labels), nearest(net, x, labels, **numbers)
    broken = found.distance <= EPS[norm]
    away = length(result.x_adv - x, norm)
    assert 1 < int(broken.sum()) < N
    assert torch.equal(net(result.x_adv).argmax(1) != labels, broken)
    assert torch.equal(away > 0, broken & (found.distance > 0))
    assert float(away.max()) <= EPS[norm] * (1 + 1e-6)
    assert float(found.distance[0]) == 0
    assert torch.equal(found.x_adv[0], x[0])
    for adversarial in (result.x_adv, found.x_adv):
        assert float(adversarial.min()) >= 0
        assert float(adversarial.max()) <= 1
    rivals = targets or 9
    assert found.gradients == (N - 1) * STEPS * rivals > result.gradients
    assert int(result.zero_grads) == 0


def test_taking_finished_images_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = robustish().double()
    x, labels = batch(net.float())
    net, x = net.double(), x.double()
    attack = FAB(eps=EPS["linf"], targets=4, steps=25, restarts=2)
    results = []
    for every in (1, 7, 1000):
        monkeypatch.setattr(fab, "EVERY", every)
        results.append(attack(Ascent(net), x, labels, generator=torch.Generator().manual_seed(5)))
    for other in results[1:]:
        torch.testing.assert_close(other.x_adv, results[0].x_adv, rtol=0, atol=1e-12)
        assert other.gradients == results[0].gradients


def test_the_nearest_is_found_anywhere_but_counts_only_in_the_ball() -> None:
    net = robustish()
    x, labels = batch(net)
    eps = float(nearest(net, x, labels, eps=0.1).distance[1:].median())
    found = nearest(net, x, labels, eps=eps)
    assert found.found.all()
    assert 0 < int(found.outside.sum()) < len(x)


def test_restarts_find_more_and_follow_the_generator() -> None:
    net = robustish()
    x, labels = batch(net)
    once = nearest(net, x, labels, eps=0.1, steps=1)
    runs = [
        FAB(eps=0.1, steps=1, restarts=3, nearest=True)(
            Ascent(net), x, labels, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0].x_adv, runs[1].x_adv)
    assert not torch.equal(runs[0].x_adv, runs[2].x_adv)
    assert bool((runs[0].distance <= once.distance).all())  # type: ignore[attr-defined]
    assert runs[0].gradients == 3 * once.gradients


def test_without_a_gradient_nothing_is_found_and_that_is_counted() -> None:
    net = robustish()
    with torch.no_grad():
        net[6].weight.zero_()
    x, _ = batch(net)
    result = nearest(net, x, net(x).argmax(1), eps=0.1, steps=3)
    assert not bool(result.found.any())
    assert torch.equal(result.x_adv, x)
    assert int(result.zero_grads) == result.gradients == N * 3 * 9


def test_ticks_come_in_order_and_end_at_one() -> None:
    net = robustish()
    x, labels = batch(net)
    seen: list[float] = []
    FAB(eps=0.01, targets=3, steps=12)(Ascent(net), x, labels, tick=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) > 6


# ---- the projection under L1


def dual_bound(x: Tensor, w: Tensor, gap: float) -> float:
    """The least ||d||_1 with w . d = -gap, 0 <= x + d <= 1, by the dual linear program; inf if infeasible.

    there is none. g(l) = l gap + sum_i min over d_i of |d_i| + l w_i d_i; the minimum is at 0 or at a bound.
    """
    steepest = 1 / w[w != 0].abs()
    lambdas = torch.cat([torch.zeros(1), steepest, -steepest]).double()[:, None]
    at_bounds = [d.abs() + lambdas * w * d for d in (-x, 1 - x)]
    values = lambdas[:, 0] * gap + torch.minimum(*at_bounds).clamp_max(0).sum(1)
    reach = float((w.abs() * torch.where(w * gap > 0, x, 1 - x)).sum())
    return float(values.max()) if reach >= abs(gap) else float("inf")


@given(seed=st.integers(0, 10**6), size=st.integers(1, 12), scale=st.sampled_from([0.01, 1.0, 30.0]))
@settings(deadline=None)
def test_l1_projection_is_the_nearest_point(seed: int, size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, size, dtype=torch.float64, generator=generator)
    at = torch.rand(5, size, dtype=torch.float64, generator=generator)
    w = torch.randn(5, size, dtype=torch.float64, generator=generator).mul(2).round().div(2)  # ties and zeros
    value = scale * torch.randn(5, dtype=torch.float64, generator=generator)
    z = project_on_hyperplane_l1(x, w, value, at)
    assert bool(((z >= 0) & (z <= 1)).all())
    gaps = value + (w * (x - at)).sum(1)
    for i in range(5):
        least = dual_bound(x[i], w[i], float(gaps[i])) if w[i].any() else float("inf")
        left = float(value[i] + (w[i] * (z[i] - at[i])).sum())
        if least < float("inf"):
            assert left == pytest.approx(0, abs=1e-9)
            assert float((z[i] - x[i]).abs().sum()) == pytest.approx(least, abs=1e-9)
        else:  # as far as the box goes
            end = (w[i] * gaps[i] < 0).double()
            torch.testing.assert_close(z[i], torch.where(w[i] == 0, x[i], end))


def test_l1_projection_leaves_what_has_no_plane() -> None:
    x = torch.rand(4, 3, 2, 2)
    w, value = torch.randn_like(x), torch.ones(4)
    value[0], w[1], value[2] = float("nan"), 0.0, float("inf")
    w[3, 0, 0, 0] = float("inf")
    assert torch.equal(project_on_hyperplane_l1(x, w, value, x), x)


# ---- names and numbers


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("fab", FAB(eps=0.1)),
        ("fab-t", FAB(eps=0.1, targets=9)),
        ("fab-5", FAB(eps=0.1, restarts=5)),
        ("fab-min", FAB(eps=0.1, nearest=True)),
        ("fab-t-min-2", FAB(eps=0.1, targets=9, nearest=True, restarts=2)),
    ],
)
def test_names(name: str, want: FAB) -> None:
    assert parse_attack(name, eps=0.1, step_size=0.02).search == want


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"norm": "l0"}, "norm of FAB 'l0'"),
        ({"eps": 0.0}, "eps of FAB"),
        ({"restarts": 0}, "restarts of FAB"),
        ({"steps": 0}, "steps of FAB"),
        ({"eta": 0.5}, "eta of FAB"),
    ],
)
def test_numbers_that_cannot_work(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FAB(**{"eps": 0.1, **values})
