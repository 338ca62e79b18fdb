"""The evaluation's norm-ball attacks: their formulas in float64, their invariants and their names."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.fallbacks import NoFallbacks
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal, margin
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import diameter, start_point, usual_step
from fastdynat.attack_engine.target_classes import RULES, target_classes
from fastdynat.attacks import MIM, Attack, AttackResult, RestartedPGD, parse_attack
from fastdynat.attacks.restarts import until_broken
from fastdynat.errors import UserError

EPS, STEP = 8 / 255, 2 / 255
RADII = {"linf": 8 / 255, "l2": 0.5, "l1": 4.0, "l0": 5.0}
SEED = 7


@dataclass(frozen=True)
class Case:
    """A network and images, in float64."""

    model: nn.Module = field(default_factory=lambda: tiny_cnn(dtype=torch.float64).eval())
    x: Tensor = field(default_factory=lambda: torch.rand(6, 3, 8, 8, dtype=torch.float64))
    y: Tensor = field(default_factory=lambda: torch.randint(10, (6,)))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def search(name: str, norm: str = "linf") -> Attack:
    eps = RADII[norm]
    found = parse_attack(name, eps=eps, step_size=usual_step(norm, eps), norm=norm).search
    assert found is not None
    return found


def attacked(case: Case, attack: Attack) -> Tensor:
    return attack(Ascent(case.model), case.x, case.y, generator=seeded()).x_adv


def gradient(case: Case, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(case.model(leaf)).sum(), leaf)[0]


def linf(moved: Tensor, x: Tensor, eps: float = EPS) -> Tensor:
    return (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_the_three_fgsm() -> None:
    case = Case()

    def step(start: Tensor, size: float) -> Tensor:
        g = gradient(case, start, lambda z: F.cross_entropy(z, case.y, reduction="none"))
        return linf(start + size * g.sign(), case.x)

    start = start_point(case.x, "uniform", norm="linf", eps=EPS, generator=seeded())
    assert_same(attacked(case, search("fgsm")), step(case.x, EPS))
    assert_same(attacked(case, search("fgsm-rs")), step(start, EPS))
    assert_same(attacked(case, search("fgsm-small")), step(case.x, STEP))
    assert float((start - case.x).abs().max()) > EPS / 2


def margin_loss(y: Tensor) -> Callable[[Tensor], Tensor]:
    """max_{k != y} z_k - z_y, written with a mask."""
    return lambda z: (z - 1e9 * F.one_hot(y, z.shape[1])).amax(1) - z.gather(1, y[:, None])[:, 0]


def confident(y: Tensor, kappa: float) -> Callable[[Tensor], Tensor]:
    """GAIRAT's loss: max(z_y - max_{k != y} z_k + kappa, 0), negated, since it is descended."""
    return lambda z: -(kappa - margin_loss(y)(z)).clamp_min(0)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("bim", lambda y: lambda z: F.cross_entropy(z, y, reduction="none")),
        ("cw10", margin_loss),
        ("cw10-k50", lambda y: confident(y, 50)),
        ("cw10-k0", lambda y: confident(y, 0)),
        ("cw10-k0.05", lambda y: confident(y, 0.05)),
        ("bim@next", lambda y: lambda z: -F.cross_entropy(z, (y + 1) % 10, reduction="none")),
        ("cw10-k0.05@next", lambda y: lambda z: -(margin_loss((y + 1) % 10)(z) + 0.05).clamp_min(0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sign_steps_follow_the_formula(
    name: str, loss: Callable[[Tensor], Callable[[Tensor], Tensor]]
) -> None:
    case = Case()
    x = (
        case.x
        if name.startswith("bim")
        else start_point(case.x, "uniform", norm="linf", eps=EPS, generator=seeded())
    )
    for _ in range(10):
        x = linf(x + STEP * gradient(case, x, loss(case.y)).sign(), case.x)
    assert_same(attacked(case, search(name)), x)
    assert float((x - case.x).abs().max()) > EPS / 2


def test_confidence_zero_stops_at_the_boundary_and_fifty_does_not() -> None:
    case = Case()
    case = Case(case.model, case.x, case.model(case.x).argmax(1))
    stopped, plain, fifty = (attacked(case, search(name)) for name in ("cw10-k0", "cw10", "cw10-k50"))
    assert_same(fifty, plain)
    reached = [margin(case.model(x), case.y) for x in (stopped, plain)]
    assert bool((reached[1] > reached[0] + 1e-3).any())
    goal = AttackGoal("margin", case.y, confidence=0.5)
    logits = 3 * torch.randn(6, 10, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    assert_same(goal.logit_grad(logits), torch.autograd.grad(goal.per_image(leaf).sum(), leaf)[0])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("goal", ["", "@next"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_mim_follows_the_formula(norm: str, goal: str, decay: float) -> None:
    case, eps = Case(), RADII[norm]
    towards, sign = ((case.y + 1) % 10, -1) if goal else (case.y, 1)
    x, v = case.x, torch.zeros_like(case.x)
    for _ in range(10):
        g = gradient(case, x, lambda z: sign * F.cross_entropy(z, towards, reduction="none"))
        v = decay * v + g / g.abs().sum((1, 2, 3), keepdim=True)  # the paper's sum, where ours is a mean
        if norm == "linf":
            x = linf(x + eps / 4 * v.sign(), case.x)
        else:
            delta = x + eps / 4 * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - case.x
            x = (case.x + delta * (eps / delta.flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1, 1)).clamp(
                0, 1
            )
    spec = PGDSpec(eps, eps / 4, 10, norm=norm, start="none")
    assert_same(attacked(case, MIM("ce", spec, goal[1:] or None, decay=decay)), x)
    assert search("mim" + goal, norm) == MIM("ce", spec, goal[1:] or None)


def slide(x: np.ndarray, g: np.ndarray, x0: np.ndarray, step: float, eps: float) -> np.ndarray:
    """One image's L1 step: the 1 % largest entries that have room; the projection by bisection."""
    g = np.where(((x > 1 - 1e-6) & (g > 0)) | ((x < 1e-6) & (g < 0)), 0, g)
    chosen = np.argsort(-np.abs(g))[: max(1, round(0.01 * g.size))]
    moved = x.copy()
    moved[chosen] += step / len(chosen) * np.sign(g[chosen])
    low, high = 0.0, 2.0
    for _ in range(200):
        tau = (low + high) / 2
        z = np.clip(x0 + np.sign(moved - x0) * np.maximum(np.abs(moved - x0) - tau, 0), 0, 1)
        low, high = (tau, high) if np.abs(z - x0).sum() > eps else (low, tau)
    z = np.clip(moved, 0, 1)
    if np.abs(z - x0).sum() <= eps:
        return z
    return np.clip(x0 + np.sign(moved - x0) * np.maximum(np.abs(moved - x0) - high, 0), 0, 1)


def sparse(x: np.ndarray, g: np.ndarray, x0: np.ndarray, step: float, pixels: float) -> np.ndarray:
    """One image's L0 step on (3, 64): move, then keep the pixels that are farthest away."""
    z = np.clip(x + step * g / np.abs(g).sum(), 0, 1)
    kept = np.argsort(-((z - x0) ** 2).sum(0), kind="stable")[: int(pixels)]
    out = x0.copy()
    out[:, kept] = z[:, kept]
    return out


@pytest.mark.parametrize("norm", ["l1", "l0"])
@pytest.mark.parametrize("name", ["bim10", "cw10", "pgd10@next"])
def test_pgd_under_l1_and_l0_follows_the_formula(norm: str, name: str) -> None:
    case, eps = Case(), RADII[norm]
    loss: Callable[[Tensor], Tensor] = margin_loss(case.y)
    if name != "cw10":
        towards, sign = ((case.y + 1) % 10, -1) if name.endswith("next") else (case.y, 1)
        loss = lambda z: sign * F.cross_entropy(z, towards, reduction="none")  # noqa: E731
    x = case.x
    if norm == "l1" and not name.startswith("bim"):
        x = start_point(x, "uniform", norm="l1", eps=eps, generator=seeded())
    for _ in range(10):
        g = gradient(case, x, loss)
        shape, one = ((6, 192), slide) if norm == "l1" else ((6, 3, 64), sparse)
        rows = (t.reshape(shape).numpy() for t in (x, g, case.x))
        x = torch.tensor(
            np.stack([one(*row, usual_step(norm, eps), eps) for row in zip(*rows, strict=True)])
        ).reshape(x.shape)
    assert_same(attacked(case, search(name, norm)), x)


def exists(name: str, norm: str) -> bool:
    return not (name.startswith("mim") and norm in ("l1", "l0")) and not (
        norm == "l0" and ("fgsm" in name or "-2" in name)
    )


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(
        ["fgsm", "fgsm-rs", "fgsm-small", "bim3", "mim3", "pgd3", "pgd3-2", "cw3", "cw3-k1", "cw3-k0-2"]
    ),
    rule=st.sampled_from(["", *(f"@{rule}" for rule in RULES)]),
    norm=st.sampled_from(list(RADII)),
    size=st.floats(0.01, 1.0),
    ratio=st.floats(0.05, 4.0),
    seed=st.integers(0, 99),
)
def test_stays_in_the_ball_and_the_image_range(
    name: str, rule: str, norm: str, size: float, ratio: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x, y, model = torch.rand(4, 3, 8, 8).round(decimals=1), torch.randint(10, (4,)), tiny_cnn(seed).eval()
    eps = (
        max(1.0, round(64 * size))
        if norm == "l0"
        else size * diameter(norm, (3, 8, 8)) / (1 if norm == "linf" else 8)
    )
    assume(exists(name, norm))
    attack = parse_attack(name + rule, eps=eps, step_size=eps * ratio, norm=norm).search
    assert attack is not None
    result = attack(Ascent(model), x, y, generator=seeded())
    delta = (result.x_adv - x).double()
    away = {
        "linf": delta.abs().amax((1, 2, 3)),
        "l2": delta.flatten(1).norm(dim=1),
        "l1": delta.abs().sum((1, 2, 3)),
        "l0": (delta != 0).any(1).sum((1, 2)).double(),
    }[norm]
    assert float(away.max()) <= eps * (1 + 1e-5) + (0 if norm == "l0" else 1e-6)
    assert 0 <= float(result.x_adv.min()) <= float(result.x_adv.max()) <= 1
    assert result.gradients >= int(result.zero_grads) >= 0
    again = attack(Ascent(model), x, y, generator=seeded())
    assert torch.equal(again.x_adv, result.x_adv)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(["bim10", "mim10", "cw10"]),
    rule=st.sampled_from(["least", "second", "next"]),
    norm=st.sampled_from(list(RADII)),
    seed=st.integers(0, 99),
)
def test_a_target_comes_nearer(name: str, rule: str, norm: str, seed: int) -> None:
    assume(exists(name, norm))
    torch.manual_seed(seed)
    x, model = torch.rand(4, 3, 8, 8, dtype=torch.float64), tiny_cnn(seed, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(x)
        y = logits.argmax(1)
        towards = target_classes(rule, logits, y)[:, 0]
        attack = search(f"{name}@{rule}", norm)
        goal = AttackGoal(attack.loss, towards, targeted=True)  # type: ignore[attr-defined]
        with torch.enable_grad():
            x_adv = attack(Ascent(model), x, y, generator=seeded()).x_adv
        assert bool((goal.per_image(model(x_adv)) > goal.per_image(logits)).all())


def test_targets() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    labels = torch.tensor([0, 0, 3])
    chosen = {rule: target_classes(rule, logits, labels).tolist() for rule in RULES if rule != "random"}
    assert chosen == {
        "second": [[2], [3], [0]],
        "least": [[3], [1], [2]],
        "next": [[1], [1], [0]],
        "all": [[2, 1, 3], [3, 2, 1], [0, 1, 2]],
    }
    many = torch.randint(4, (4000,))
    drawn = target_classes("random", torch.zeros(4000, 4), many, generator=seeded())[:, 0]
    assert torch.equal(drawn, target_classes("random", torch.zeros(4000, 4), many, generator=seeded())[:, 0])
    counts = torch.bincount((drawn - many) % 4, minlength=4)
    assert counts[0] == 0
    assert int(counts[1:].min()) > 4000 / 3 - 5 * (4000 * 2 / 9) ** 0.5
    # The label is no target even where the logits are NaN or infinite.
    for broken in (float("nan"), float("inf"), float("-inf")):
        classes = target_classes("all", torch.full((3, 4), broken), labels)
        assert [sorted(row) for row in classes.tolist()] == [[1, 2, 3], [1, 2, 3], [0, 1, 2]]


@dataclass(frozen=True)
class Counting(RestartedPGD):
    """Records the number of images and the result of each run."""

    runs: list[tuple[int, Tensor]] = field(default_factory=list, compare=False)

    def climb(self, ascent, x, goal, x_start, tick):  # type: ignore[no-untyped-def]
        result = super().climb(ascent, x, goal, x_start, tick)
        self.runs.append((len(x), x_start))
        return result


def borderline() -> tuple[nn.Module, Tensor, Tensor]:
    """A network and images that it gets right, of which some fall to a small attack."""
    torch.manual_seed(3)
    model, x = tiny_cnn(3).eval(), torch.rand(48, 3, 8, 8)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(("restarts", "target"), [(4, None), (1, "all"), (2, "all")])
def test_only_images_that_stand_are_attacked_again(restarts: int, target: str | None) -> None:
    model, x, y = borderline()
    spec = PGDSpec(0.03, 0.015, 2, restarts=restarts)
    attack, shares = Counting("ce", spec, target), list[float]()
    result = attack(Ascent(model), x, y, generator=seeded(), tick=shares.append)
    sizes = [size for size, _ in attack.runs]
    # The same runs one by one, on all images: an image falls to the attack exactly if it falls to one of
    # them.
    generator, standing, expected = seeded(), torch.ones(48, dtype=torch.bool), []
    classes = y[:, None] if target is None else target_classes(target, model(x), y)
    for towards in classes.unbind(1):
        for _ in range(restarts):
            expected.append(int(standing.sum()))
            start = start_point(x, "uniform", norm="linf", eps=0.03, generator=generator)
            goal = AttackGoal("ce", towards, targeted=target is not None)
            x_adv = RestartedPGD("ce", spec).climb(Ascent(model), x, goal, start, lambda share: None).x_adv
            standing &= model(x_adv).argmax(1) == y
    assert torch.equal(model(result.x_adv).argmax(1) == y, standing)
    assert 0 < int(standing.sum()) < expected[1] < 48
    # Those that are misclassified by a hair are attacked again as well.
    assert all(size >= least for size, least in zip(sizes, expected, strict=False))
    assert sizes[0] == 48 > sizes[-1]
    assert result.gradients == 2 * sum(sizes)
    assert shares == sorted(shares)


def test_a_single_run_is_on_every_image_and_ends_at_its_last_iterate() -> None:
    model, x, y = borderline()
    wrong = (y + 1) % 10  # no image is classified as labelled
    attack = Counting("ce", PGDSpec(0.03, 0.015, 2))
    attack(Ascent(model), x, wrong, generator=seeded())
    assert [size for size, _ in attack.runs] == [48]
    again = Counting("ce", PGDSpec(0.03, 0.015, 2, restarts=5))
    again(Ascent(model), x, wrong, generator=seeded())
    assert again.runs[0][0] == 48
    assert len(again.runs) == 1 or again.runs[1][0] < 10


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_strong(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = tiny_cnn(), torch.rand(64, 3, 8, 8)
    y = model.eval()(x).argmax(1)
    goal = AttackGoal("ce", y)
    attack = search("bim10", norm)
    fast = AttackEngine(model, x[:2], switches=AttackSwitches(dtype=dtype)).ascent
    results = [attack(ascent, x, y) for ascent in (Ascent(model), fast)]
    with torch.no_grad():
        clean, full, half = (
            float(goal.per_image(model(images)).mean()) for images in (x, *(r.x_adv for r in results))
        )
    assert results[1].x_adv.dtype == torch.float32
    assert half - clean > 0.97 * (full - clean) > 0


@pytest.mark.slow
@needs("cxx")
def test_a_compiled_mim_is_the_same_attack() -> None:
    case, attack = Case(), search("mim10@next")
    compiled = AttackEngine(
        case.model,
        case.x[:2],
        switches=AttackSwitches(compile="default", fold=False),
        fallbacks=NoFallbacks(),
    )
    assert_same(attack(compiled.ascent, case.x, case.y).x_adv, attacked(case, attack))


def test_starts_under_l1() -> None:
    middle = torch.full((2000, 1, 2, 3), 0.5, dtype=torch.float64)
    delta = (start_point(middle, "uniform", norm="l1", eps=0.4, generator=seeded()) - middle).flatten(1)
    radius = delta.abs().sum(1)
    assert float(radius.max()) <= 0.4
    assert abs(float(radius.mean()) - 0.2) < 0.01
    share = delta.abs() / radius[:, None]  # uniform on the simplex: a Dirichlet variable of ones
    assert abs(float(share.mean()) - 1 / 6) < 1e-9
    assert abs(float(share.var()) - 5 / (36 * 7)) < 0.001
    assert abs(float(delta.sign().mean())) < 0.03


@pytest.mark.parametrize(
    ("name", "norm", "message"),
    [
        ("fgsm", "l0", "use pgd20 under l0"),
        ("fgsm-rs@next", "l0", "use pgd20 under l0"),
        ("mim", "l1", "only linf and l2; use pgd20 under l1"),
        ("mim5", "l0", "use pgd5 under l0"),
        ("bim-3", "linf", "restarts would repeat it; use pgd10-3"),
        ("pgd20-5", "l0", "leave the restarts out"),
        ("pgd20-k50", "linf", "use cw20-k50"),
        ("pgd0", "linf", "steps and restarts"),
        ("cw20-k50-0", "linf", "steps and restarts"),
        ("pgd20@leest", "linf", "did you mean 'least'"),
        ("pgd20@", "linf", "unknown target ''"),
        ("fgsm_rs", "linf", "did you mean 'fgsm-rs'"),
        ("bmi", "linf", "did you mean .*'bim'"),
        ("cw20-50k", "linf", "did you mean 'cw20-k50'"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(name: str, norm: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        search(name, norm)


def test_names() -> None:
    def pgd(steps: int, **kwargs: object) -> PGDSpec:
        return PGDSpec(EPS, STEP, steps, **kwargs)  # type: ignore[arg-type]

    assert search("cw20-k50-5@all") == RestartedPGD("margin", pgd(20, restarts=5), "all", 50.0)
    assert search("cw-k0.5") == RestartedPGD("margin", pgd(20), confidence=0.5)
    assert search("CW20-3") == RestartedPGD("margin", pgd(20, restarts=3))
    assert search("bim") == search("bim10") == RestartedPGD("ce", pgd(10, start="none"))
    assert search("fgsm-rs@least") == RestartedPGD("ce", PGDSpec(EPS, EPS, 1), "least")
    assert search("pgd20", "l0") == RestartedPGD("ce", PGDSpec(5, 50, 20, norm="l0", start="none"))
    assert search("mim", "l2").norm == "l2"
    with pytest.raises(UserError, match=r"whole number of pixels that may change, got 2\.5"):
        PGDSpec(2.5, 1, 1, norm="l0", start="none")
    with pytest.raises(UserError, match="start must be none under l0"):
        PGDSpec(2, 1, 1, norm="l0")


def test_an_image_that_is_misclassified_as_confidently_as_asked_has_no_masked_gradient() -> None:
    case = Case()
    broken = Case(case.model, case.x, (case.model(case.x).argmax(1) + 1) % 10)
    result = search("cw5-k0")(Ascent(case.model), broken.x, broken.y, generator=seeded())
    assert (int(result.zero_grads), result.gradients) == (0, 30)

    def flat(x: Tensor) -> Tensor:  # the first class by far, whatever the image
        return 0 * case.model(x) + torch.eye(10, dtype=x.dtype)[0]

    result = search("cw5-k0")(Ascent(flat), case.x, torch.zeros_like(case.y), generator=seeded())
    assert (int(result.zero_grads), result.gradients) == (30, 30)


def test_a_run_that_ends_without_a_verdict_gives_way_to_the_next() -> None:
    """Equal logits have no range; NaN, as in half precision, is no margin."""
    x, labels = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    bad, good = torch.full_like(x, 0.5), torch.ones_like(x)

    for nothing in (0.0, torch.nan):

        def logits(x: Tensor, nothing: float = nothing) -> Tensor:
            light = x.mean((1, 2, 3))
            return torch.where(
                (light == 1)[:, None], torch.tensor([0.0, 1.0]), torch.tensor([nothing, nothing])
            )

        def attempt(x_adv: Tensor) -> Any:
            return lambda rows, tick: AttackResult(x_adv[rows], torch.zeros((), dtype=torch.int64), len(rows))

        result = until_broken(Ascent(logits), x, labels, [attempt(bad), attempt(good)])
        assert torch.equal(result.x_adv, good)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_no_image_up(dtype: torch.dtype) -> None:
    """Only the second run fools the network; the pass in half precision errs by a tenth about the first."""
    x, labels = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    first, second = torch.full_like(x, 0.5), torch.ones_like(x)

    def network(x: Tensor) -> Tensor:
        return torch.stack([torch.full((len(x),), 0.8), x.float().mean((1, 2, 3)), torch.zeros(len(x))], 1)

    def noisy(x: Tensor) -> Tensor:
        light = x.float().mean((1, 2, 3))
        return torch.where((light == 0.5)[:, None], torch.tensor([0.8, 0.9, 0.0]), network(x)).to(dtype)

    def attempt(x_adv: Tensor) -> Any:
        return lambda rows, tick: AttackResult(x_adv[rows], torch.zeros((), dtype=torch.int64), len(rows))

    ascent = Ascent(noisy, dtype=dtype, judge=network, strict=True)
    result = until_broken(ascent, x, labels, [attempt(first), attempt(second)])
    assert torch.equal(result.x_adv, second)
