"""APGD as the attack of training, against a transcription of the published algorithm in float64 loops."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.apgd_reference import apgd_reference
from support.graph_sim import SimulatedRecorder
from support.networks import tiny_cnn
from support.plain_attack import with_statistics
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import aimed, pgd, run_pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks.ball import inside
from fastdynat.errors import UserError
from fastdynat.ops.image_draws import ImageDraws

EPS = {"linf": 0.03, "l2": 0.3, "l1": 3.0}
N, CLASSES = 6, 10
STEPS = (1, 2, 3, 10, 40)


def images(seed: int = 0) -> Tensor:
    x = torch.rand(N, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.round(decimals=1)  # many pixels are at 0 or 1


def victim() -> nn.Module:
    """Smooth and without pooling, which makes entries of a gradient equal: rounding would then order them."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(6 * 9, CLASSES), Sharp()).double()
    return with_statistics(model).eval().requires_grad_(False)


class Sharp(nn.Module):
    """Logits in which ascent with large steps overshoots."""

    def forward(self, z: Tensor) -> Tensor:
        return z + 2 * torch.sin(8 * z)


def targets(kind: str, model: nn.Module, x: Tensor) -> AttackGoal:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    if kind == "classes":
        return AttackGoal("ce", labels)
    mixed = torch.rand(N, CLASSES, dtype=torch.float64, generator=generator).softmax(1)
    return AttackGoal("ce", mixed) if kind == "mixed" else AttackGoal("kl", mixed.log())


def loss_of(kind: str, model: nn.Module, goal: AttackGoal) -> Callable[[Tensor, int], Tensor]:
    def loss(z: Tensor, i: int) -> Tensor:
        scores = model(z[None])[0]
        log_q = scores - scores.exp().sum().log()
        if kind == "classes":
            return -log_q[goal.target[i]]
        p = goal.target[i] if kind == "mixed" else goal.target[i].exp()
        entropy = 0 if kind == "mixed" else (p * p.log()).sum()
        return entropy - (p * log_q).sum()

    return loss


def spec_of(norm: str, steps: int, **kwargs: Any) -> PGDSpec:
    return PGDSpec(EPS[norm], 1.0, steps, norm=norm, algorithm="apgd", **{"start": "none", **kwargs})


@pytest.mark.parametrize("kind", ["classes", "mixed", "kl"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_point_is_the_published_algorithms(norm: str, kind: str) -> None:
    model, x = victim(), images()
    goal = targets(kind, model, x)
    halved = 0
    for steps in STEPS:
        expected = apgd_reference(loss_of(kind, model, goal), x, norm=norm, eps=EPS[norm], steps=steps)
        found = pgd(model, x, goal, spec_of(norm, steps), warn=False)
        torch.testing.assert_close(found.x_adv, expected, rtol=0, atol=1e-9)
        assert inside(found.x_adv, x, norm, EPS[norm]).all()
        assert found.gradients == N * steps
        halved += int((found.x_adv != x).sum())
    assert halved > 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_start_outside_of_the_ball_is_brought_into_it(norm: str) -> None:
    model, x = victim(), images()
    goal = targets("classes", model, x)
    start = x + torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = apgd_reference(
        loss_of("classes", model, goal), x, norm=norm, eps=EPS[norm], steps=3, start=start
    )
    found = pgd(model, x, goal, spec_of(norm, 3), x_start=start)
    torch.testing.assert_close(found.x_adv, expected, rtol=0, atol=1e-9)
    none = pgd(model, x, goal, spec_of(norm, 0), x_start=start)
    assert inside(none.x_adv, x, norm, EPS[norm]).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_loss_never_falls_below_that_of_the_image(norm: str) -> None:
    model, x = victim(), images(4)
    goal = targets("classes", model, x)
    before = goal.per_image(model(x))
    for steps in STEPS:
        after = goal.per_image(model(pgd(model, x, goal, spec_of(norm, steps)).x_adv))
        assert (after >= before).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_image_is_attacked_as_if_it_were_alone_also_from_its_own_start(norm: str) -> None:
    model, x = victim(), images()
    goal = targets("classes", model, x)
    spec = spec_of(norm, 5, start="uniform")
    together = pgd(model, x, goal, spec, generator=ImageDraws.of(3, range(N), "cpu"))
    for i in range(N):
        one = AttackGoal("ce", goal.target[i : i + 1])
        alone = pgd(model, x[i : i + 1], one, spec, generator=ImageDraws.of(3, [i], "cpu"))
        torch.testing.assert_close(alone.x_adv[0], together.x_adv[i], rtol=0, atol=1e-9)


def test_gradients_that_are_zero_or_not_numbers_are_counted_and_move_nothing() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            factors = torch.ones(len(x), 1)
            factors[:2, 0] = torch.tensor([0.0, torch.nan])
            return x.flatten(1)[:, :4] * factors

    x = images().float()
    goal = AttackGoal("ce", torch.zeros(N, dtype=torch.int64))
    for norm in EPS:
        found = pgd(Broken(), x, goal, spec_of(norm, 2), warn=False)
        assert int(found.zero_grads) == 4
        torch.testing.assert_close(found.x_adv[:2], x[:2])
        assert (found.x_adv[2:] != x[2:]).flatten(1).any(1).all()


def test_a_confident_network_is_attacked_where_the_cross_entropy_rounds_to_0() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(CLASSES, 192, generator=torch.Generator().manual_seed(0)) * 50)
    x = images().float()
    labels = model(x).argmax(1)
    goal = AttackGoal("ce", labels)
    sure = goal.per_image(model(x)) == 0
    assert sure.any()
    found = pgd(model, x, goal, spec_of("linf", 2), rescale=True)
    order = goal.order(model(found.x_adv)) > goal.order(model(x))
    assert order.all()


def test_tracking_counts_the_points_whose_gradient_was_taken() -> None:
    model, x = victim(), images()
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % CLASSES
    found = pgd(model, x, AttackGoal("ce", labels, track=True), spec_of("linf", 3))
    assert found.kept is not None
    assert found.kept[0] <= 2
    assert (found.kept[1:] >= 1).all()
    assert found.kept.max() <= 3


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_engine_captures_it_once_and_follows_new_weights(norm: str) -> None:
    model = with_statistics(tiny_cnn(3)).eval()
    x = images().float()
    recorder = SimulatedRecorder()
    engine = AttackEngine(model, x, recorder=recorder)
    for call in range(6):
        y = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(call))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        engine.refresh()
        found = engine.run(x, AttackGoal("ce", y), spec_of(norm, 3))
        expected = pgd(model, x, AttackGoal("ce", y), spec_of(norm, 3), warn=False)
        torch.testing.assert_close(found.x_adv, expected.x_adv, rtol=0, atol=1e-4)
    assert (recorder.captured, recorder.replayed) == (1, 3)
    assert not engine.fallbacks.texts


def test_the_compiled_attack_is_the_eager_one() -> None:
    model = with_statistics(tiny_cnn(3)).eval()
    x, goal = images().float(), AttackGoal("ce", torch.arange(N))
    engine = AttackEngine(model, x, switches=AttackSwitches(compile="default"))
    found = engine.run(x, goal, spec_of("l2", 3))
    expected = run_pgd(Ascent(engine.replica.network), x, goal, spec_of("l2", 3))
    torch.testing.assert_close(found.x_adv, expected.x_adv, rtol=0, atol=1e-5)
    assert not engine.fallbacks.texts


def test_half_precision_stays_in_the_ball_and_raises_the_loss() -> None:
    model = with_statistics(tiny_cnn(3)).eval()
    x = images().float()
    goal = AttackGoal("ce", model(x).argmax(1))
    engine = AttackEngine(model, x, switches=AttackSwitches(dtype=torch.bfloat16))
    for norm in EPS:
        found = engine.run(x, goal, spec_of(norm, 3))
        assert found.x_adv.dtype == torch.float32
        assert inside(found.x_adv, x, norm, EPS[norm]).all()
        assert goal.per_image(model(found.x_adv)).mean() > goal.per_image(model(x)).mean()


@pytest.mark.parametrize("algorithm", ["pgd", "apgd"])
@pytest.mark.parametrize("kind", ["classes", "mixed"])
def test_the_least_likely_class_is_aimed_at(kind: str, algorithm: str) -> None:
    model, x = victim(), images()
    goal = targets(kind, model, x)
    own = goal.target if kind == "classes" else goal.target.argmax(1)
    chosen = []
    for scores, label in zip(model(x).tolist(), own.tolist(), strict=True):
        chosen.append(min((k for k in range(CLASSES) if k != label), key=scores.__getitem__))
    towards = AttackGoal("ce", torch.tensor(chosen), targeted=True)
    spec = replace(spec_of("linf", 3), algorithm=algorithm, step_size=0.01)
    found = pgd(model, x, goal, replace(spec, target="least"))
    torch.testing.assert_close(found.x_adv, pgd(model, x, towards, spec).x_adv)
    assert (towards.per_image(model(found.x_adv)) > towards.per_image(model(x))).all()


def test_random_targets_are_drawn_per_image_from_the_other_classes() -> None:
    model, x, labels = victim(), images(), torch.arange(N)
    spec = replace(spec_of("linf", 1), target="random")
    seen: set[tuple[int, ...]] = set()
    for seed in range(30):
        goal = AttackGoal("ce", labels)
        together = aimed(Ascent(model), x, goal, spec, ImageDraws.of(seed, range(N), "cpu"))
        alone = aimed(
            Ascent(model), x[2:3], AttackGoal("ce", labels[2:3]), spec, ImageDraws.of(seed, [2], "cpu")
        )
        assert together.targeted
        assert (together.target != labels).all()
        assert ((together.target >= 0) & (together.target < CLASSES)).all()
        assert int(alone.target) == int(together.target[2])
        seen.add(tuple(together.target.tolist()))
    assert len(seen) == 30
    assert {found for row in seen for found in row} == set(range(CLASSES))


def test_targets_of_other_goals_are_refused() -> None:
    model, x = victim(), images()
    spec = replace(spec_of("linf", 1), target="least")
    for goal, what in (
        (targets("kl", model, x), "kl"),
        (AttackGoal("ce", torch.arange(N), track=True), "tracked"),
        (AttackGoal("ce", torch.arange(N), targeted=True), "targeted"),
    ):
        with pytest.raises(UserError, match=f"the goal is {what}"):
            pgd(model, x, goal, spec)
    with pytest.raises(UserError, match="target"):
        replace(spec, target="second")


def test_bad_algorithms_are_refused() -> None:
    with pytest.raises(UserError, match="attack algorithm"):
        PGDSpec(0.1, 0.1, 2, algorithm="newton")
    with pytest.raises(UserError, match="apgd is defined for linf, l2 and l1, got norm l0"):
        PGDSpec(3, 0.1, 2, norm="l0", start="none", algorithm="apgd")
