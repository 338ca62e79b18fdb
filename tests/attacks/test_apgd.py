"""APGD: targeted loss against autograd, step-size reviews against a list by hand, the authors' package."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import needs
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine import apgd_steps as moves
from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import margin
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attacks import APGD, parse_attack, run_apgd, stages
from fastdynat.attacks.apgd_loss import targeted_dlr
from fastdynat.errors import UserError

EPS = {"linf": 0.02, "l2": 0.2, "l1": 1.2}
N, CLASSES = 24, 10


def images(seed: int = 0) -> Tensor:
    return torch.rand(N, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def victim() -> tuple[nn.Module, Tensor, Tensor]:
    """A float64 network, images, and labels, most of which it predicts."""
    model, x = tiny_cnn(3, dtype=torch.float64).eval().requires_grad_(False), images()
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % CLASSES
    return model, x, y


def attack(spec: APGD, x: Tensor, y: Tensor, model: nn.Module, **kwargs: Any) -> Any:
    with attack_mode(model, "eval"), torch.enable_grad():
        return run_apgd(Ascent(model), x, y, spec, **kwargs)


def test_reviews_come_when_the_paper_says() -> None:
    assert moves.checkpoints(100, "linf") == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert moves.checkpoints(10, "l2") == {2: 2, **dict.fromkeys(range(3, 11), 1)}
    assert moves.checkpoints(100, "l1") == dict.fromkeys(range(4, 101, 4), 4)


def test_larger_balls_take_the_first_steps() -> None:
    spec = APGD(loss="ce", eps=1.0, norm="l1", steps=99, larger_eps=True)
    assert spec.phases() == [(3.0, 30), (2.0, 30), (1.0, 39)]


def test_targeted_dlr_is_its_formula_and_the_gradient_autograds() -> None:
    logits = torch.randn(50, 7, dtype=torch.float64).requires_grad_()
    labels = torch.randint(7, (50,))
    target = (labels + torch.randint(1, 7, (50,))) % 7
    order = logits.sort(1, descending=True).values
    rows = torch.arange(50)
    expected = (logits[rows, target] - logits[rows, labels]) / (order[:, 0] - (order[:, 2] + order[:, 3]) / 2)
    grad = torch.autograd.grad(expected.sum(), logits)[0]
    value, found = targeted_dlr(logits.detach(), labels, target)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(found, grad)
    flat, nothing = targeted_dlr(torch.ones(2, 5), labels[:2] % 5, target[:2] % 5)
    assert flat.tolist() == [0, 0]
    assert not nothing.any()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-t"])
def test_results_are_in_the_ball_and_what_they_claim(loss: Any, norm: str) -> None:
    model, x, y = victim()
    spec = APGD(loss=loss, eps=EPS[norm], norm=norm, steps=15, targets=3, larger_eps=norm == "l1")
    end = attack(spec, x, y, model)
    length = torch.linalg.vector_norm(
        (end.x_adv - x).flatten(1), {"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1
    )
    assert float(length.max()) <= EPS[norm] * (1 + 1e-9)
    assert float(end.x_adv.min()) >= 0
    assert float(end.x_adv.max()) <= 1
    assert torch.equal(model(end.x_adv).argmax(1) != y, end.broken)
    assert end.broken[:3].all()
    assert 0 < int(end.broken.sum()) < N
    torch.testing.assert_close(end.x_adv[:3], x[:3])


def test_an_image_is_attacked_as_if_it_were_alone() -> None:
    model, x, y = victim()
    spec = APGD(loss="dlr-t", eps=EPS["linf"], steps=40, targets=2)
    starts = [moves.start(x, "linf", spec.eps) for _ in range(2)]
    together = attack(spec, x, y, model, x_starts=starts)
    for i in range(0, N, 3):
        alone = attack(spec, x[i : i + 1], y[i : i + 1], model, x_starts=[s[i : i + 1] for s in starts])
        torch.testing.assert_close(alone.x_adv[0], together.x_adv[i], rtol=0, atol=1e-9)
        assert bool(alone.broken) == bool(together.broken[i])


def test_equal_generators_and_zero_gradients() -> None:
    model, x, y = victim()
    spec = APGD(loss="ce", eps=EPS["linf"], steps=5)
    ends = [attack(spec, x, y, model, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(ends[0].x_adv, ends[1].x_adv)
    assert (int(ends[0].zero_grads), ends[0].gradients) == (0, N - 3)

    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x.round() + 0 * x)

    x = x.round()
    end = attack(spec, x, Dead()(x).argmax(1), Dead())
    assert (int(end.zero_grads), end.gradients) == (N, N)


def test_names() -> None:
    def search(name: str, norm: str = "linf") -> Any:
        return parse_attack(name, eps=0.1, step_size=0.02, norm=norm).search

    assert search("apgd-ce") == APGD(loss="ce", eps=0.1)
    assert search("apgd-dlr20-3") == APGD(loss="dlr", eps=0.1, steps=20, restarts=3)
    assert search("apgd-t", "l1") == APGD(loss="dlr-t", eps=0.1, norm="l1", targets=5, larger_eps=True)
    with pytest.raises(UserError, match="steps of APGD must be >= 1, got 0"):
        search("apgd-ce0")
    with pytest.raises(
        UserError, match="no l0 form of it is known, only linf, l2 and l1; use pgd20 under l0"
    ):
        search("apgd-ce", "l0")


def test_versions() -> None:
    assert [s.search for s in stages("linf", 0.1, "rand")] == [
        APGD(loss=k, eps=0.1, eot=20) for k in ("ce", "dlr")
    ]
    custom = stages("l1", 0.1, "custom", ["apgd-ce", "apgd-t"])
    plain = APGD(loss="ce", eps=0.1, norm="l1", restarts=5, targets=5)
    assert [s.search for s in custom] == [plain, replace(plain, loss="dlr-t", restarts=1, targets=9)]
    for bad, names in (
        ("fast", ()),
        ("custom", ()),
        ("rand", ("apgd-ce",)),
        ("custom", ("apgd-ce", "apgd-ce")),
    ):
        with pytest.raises(UserError):
            stages("linf", 0.1, bad, names)


@pytest.mark.parametrize("what", [{"loss": "mse"}, {"eps": 0.0}, {"restarts": 0}, {"larger_eps": True}])
def test_bad_numbers_are_refused(what: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        APGD(**{"loss": "ce", "eps": 0.1, **what})


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)  # the package's own tensors have the default type
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def peers_run(
    spec: APGD, model: nn.Module, x: Tensor, y: Tensor, start: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The package's single run: the point with the highest loss, the robust images, the highest loss."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    numbers: dict[str, Any] = {
        "n_iter": spec.steps,
        "norm": spec.norm.capitalize(),
        "eps": spec.eps,
        "device": "cpu",
    }
    if spec.loss == "dlr-t":
        peer: Any = APGDAttack_targeted(model, **numbers)
        peer.y_target = target
    else:
        peer = APGDAttack(model, loss=spec.loss, **numbers)
    peer.init_hyperparam(x)
    best, stands, loss, _ = peer.attack_single_run(x, y, x_init=start)
    return best, stands.bool(), loss


@pytest.mark.peer
@needs("pyautoattack")
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-t"])
def test_a_run_is_the_packages(loss: Any, norm: str) -> None:
    model, x, y = victim()
    spec = APGD(loss=loss, eps=EPS[norm], norm=norm, targets=3)
    starts = [moves.start(x, norm, spec.eps) for _ in range(3 if loss == "dlr-t" else 1)]
    order = model(x).argsort(1)
    stands, loss_found = model(x).argmax(1) == y, torch.full((N,), -math.inf)
    best = x.clone()
    for rank, start in enumerate(starts):
        point, still, value = peers_run(spec, model, x, y, start, order[:, -2 - rank])
        higher = value > loss_found
        best[higher], loss_found[higher] = point[higher], value[higher]
        stands &= still
    end = attack(spec, x, y, model, x_starts=starts)
    assert torch.equal(end.broken, ~stands)
    assert 2 < int(stands.sum()) < N - 3
    torch.testing.assert_close(end.loss[stands], loss_found[stands], rtol=0, atol=1e-4)
    torch.testing.assert_close(end.x_adv[stands], best[stands], rtol=0, atol=1e-6)


@pytest.mark.peer
@needs("pyautoattack")
@pytest.mark.parametrize("loss", ["ce", "dlr-t"])
def test_a_run_in_l1_is_the_packages(loss: Any) -> None:
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted, L1_projection

    model, x, y = victim()
    model, x = model.float(), x.float()
    spec = APGD(loss=loss, eps=EPS["l1"], norm="l1", targets=1, larger_eps=True)
    torch.manual_seed(5)
    noise = torch.randn_like(x)
    start = x + noise + L1_projection(x, noise, 3 * spec.eps)
    torch.testing.assert_close(moves.project_on_l1_ball(x + noise, x, 3 * spec.eps), start, rtol=0, atol=1e-5)
    kind = APGDAttack if loss == "ce" else APGDAttack_targeted
    peer = kind(model, norm="L1", eps=spec.eps, device="cpu", use_largereps=True)
    peer.init_hyperparam(x)
    peer.y_target = model(x).argsort(1)[:, -2]
    torch.manual_seed(5)
    balls, counts = zip(*spec.phases(), strict=True)
    _, stands, highest, _ = peer.decr_eps_pgd(x, y, list(balls), list(counts))
    stands = stands.bool() & (model(x).argmax(1) == y)
    end = attack(spec, x, y, model, x_starts=[start])
    assert torch.equal(end.broken, ~stands)
    assert 2 < int(stands.sum()) < N - 3
    torch.testing.assert_close(end.loss[stands], highest[stands], rtol=0, atol=1e-3)


class Noisy(nn.Module):
    """A linear network whose logits get Gaussian noise at every call."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(192, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=192**-0.5, generator=generator)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        clean = self.linear(x.flatten(1))
        return clean + 0.1 * torch.randn_like(clean)

    def share_wrong(self, x: Tensor, y: Tensor) -> float:
        """Share of misclassifications over many draws."""
        return float(torch.stack([self(x).argmax(1) != y for _ in range(200)]).float().mean())


def noisy_task() -> tuple[Noisy, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Noisy(1), images().float()
    return model, x, model.linear(x.flatten(1)).argmax(1)


@pytest.mark.peer
@needs("pyautoattack")
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_a_random_network_is_fooled_as_often_as_by_the_package(loss: Any, norm: str) -> None:
    """The first misclassified iterate is one by a lucky draw; most draws at it are right."""
    from pyautoattack.autopgd_base import APGDAttack

    model, x, y = noisy_task()
    spec = APGD(loss=loss, eps=2 * EPS[norm], norm=norm, steps=20, eot=20)
    peer = APGDAttack(
        model,
        loss=loss,
        norm=norm.capitalize(),
        eps=spec.eps,
        n_iter=20,
        eot_iter=20,
        device="cpu",
        n_restarts=1,
    )
    theirs = model.share_wrong(peer.perturb(x, y), y)
    ours = model.share_wrong(attack(spec, x, y, model).x_adv, y)
    assert 0.3 < theirs < 0.95
    assert ours > theirs - 0.01


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_transfer_attack_runs_all_steps(norm: str) -> None:
    """It fools another network as often as the last misclassified of all iterates, computed plainly."""
    model, x, y = victim()
    other = tiny_cnn(3, dtype=torch.float64).eval().requires_grad_(False)
    for parameter in other.parameters():
        parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    spec = APGD(loss="ce", eps=EPS[norm], norm=norm, steps=15)
    start = moves.start(x, norm, spec.eps)
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return model(x)

    def run(final: bool) -> Tensor:
        ascent = Ascent(Watched(), final=final)
        found: Tensor = run_apgd(ascent, x, y, spec, x_starts=[start]).x_adv
        return found

    found = run(final=False)
    want = seen[1].clone()
    assert len(seen) == spec.steps + 2  # the images, the start and every step, all of all images
    for z in seen[1:]:
        wrong = model(z).argmax(1) != y
        want[wrong] = z[wrong]
    fell = model(want).argmax(1) != y
    assert int(fell.sum()) > 3
    assert torch.equal(found[fell], want[fell])
    first = run(final=True)
    reached = [margin(other(z), y) for z in (found, first)]
    assert float(reached[0].mean()) > float(reached[1].mean())
    assert int((reached[0] > 0).sum()) >= int((reached[1] > 0).sum())
