"""The attack loop: its end points, its objectives, and the state it leaves untouched."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import AttackGoal, kl_from_log_probs, margin, soft_cross_entropy
from fastdynat.attack_engine.network_modes import attack_mode, frozen_twin
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks import NamedAttack, RestartedPGD, parse_attack
from fastdynat.attacks.registry import split_names
from fastdynat.errors import UserError
from fastdynat.ops import pgd_step_l2

NORMS = ("linf", "l2")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 8, 8)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(10, (8,))


def distance(delta: Tensor, norm: str) -> Tensor:
    return delta.abs().flatten(1).amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)


@pytest.mark.filterwarnings(
    "ignore:.* gradients were zero"
)  # of the KL from the network's own prediction, at the image
@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(1e-3, 1.0),
    ratio=st.floats(0.05, 4.0),
    steps=st.integers(1, 4),
    start=st.sampled_from(["none", "uniform", "gaussian"]),
    loss=st.sampled_from(["ce", "kl", "margin"]),
    seed=st.integers(0, 99),
)
def test_stays_in_the_ball_and_the_image_range(
    norm: str, eps: float, ratio: float, steps: int, start: str, loss: str, seed: int
) -> None:
    torch.manual_seed(seed)
    x, y, model = torch.rand(4, 3, 8, 8), torch.randint(10, (4,)), tiny_cnn(seed)
    goal = AttackGoal(loss, model.eval()(x).detach().log_softmax(1) if loss == "kl" else y)  # type: ignore[arg-type]
    result = pgd(model, x, goal, PGDSpec(eps, eps * ratio, steps, norm=norm, start=start))
    assert float(distance(result.x_adv - x, norm).max()) <= eps * (1 + 1e-5) + 1e-6
    assert float(result.x_adv.min()) >= 0
    assert float(result.x_adv.max()) <= 1
    assert not result.x_adv.requires_grad
    assert result.gradients == 4 * steps


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_raises_the_loss_of_every_image_and_targeted_lowers_it(
    images: Tensor, labels: Tensor, norm: str, loss: str
) -> None:
    model = tiny_cnn().eval()
    spec = PGDSpec(
        0.1 if norm == "linf" else 1.0, 0.02 if norm == "linf" else 0.2, 10, norm=norm, start="none"
    )
    goal = AttackGoal(loss, labels)  # type: ignore[arg-type]
    with torch.no_grad():
        before = goal.per_image(model(images))
        away = goal.per_image(model(pgd(model, images, goal, spec).x_adv))
        towards = goal.per_image(
            model(pgd(model, images, AttackGoal(loss, labels, targeted=True), spec).x_adv)
        )  # type: ignore[arg-type]
    assert bool((away > before).all())
    assert bool((towards < before).all())


def test_one_step_is_the_closed_form(images: Tensor, labels: Tensor) -> None:
    model, eps = tiny_cnn().eval(), 8 / 255
    x = images.clone().requires_grad_()
    F.cross_entropy(model(x), labels).backward()
    assert x.grad is not None
    expected = (images + eps * x.grad.sign()).clamp(0, 1)
    attack = parse_attack("fgsm", eps=eps, step_size=eps / 4)
    assert attack.search is not None
    torch.testing.assert_close(
        attack.search(Ascent(model), images, labels).x_adv, expected, rtol=0, atol=1e-6
    )


def test_the_margin_is_positive_exactly_on_mistakes_and_losses_match_their_formulas() -> None:
    logits, labels = torch.randn(64, 10, dtype=torch.float64), torch.randint(10, (64,))
    assert torch.equal(margin(logits, labels) > 0, logits.argmax(1) != labels)
    for i in range(64):
        others = torch.cat([logits[i, : labels[i]], logits[i, labels[i] + 1 :]])
        assert margin(logits, labels)[i] == others.max() - logits[i, labels[i]]
    p = torch.randn(64, 10, dtype=torch.float64).softmax(1)
    q = logits.softmax(1)
    torch.testing.assert_close(kl_from_log_probs(p.log(), logits), (p * (p / q).log()).sum(1))
    torch.testing.assert_close(soft_cross_entropy(logits, p), -(p * q.log()).sum(1))


@pytest.mark.parametrize("gap", [150.0, 1e4])
def test_kl_has_a_finite_gradient_where_softmax_underflows(gap: float) -> None:
    """TRADES' KLDivLoss on probabilities gives NaN from a logit gap of about 104 on."""
    logits = torch.tensor([[gap, 0.0, -gap]], requires_grad=True)
    reference = torch.tensor([[0.0, gap, 0.0]]).log_softmax(1)
    (gradient,) = torch.autograd.grad(AttackGoal("kl", reference).per_image(logits).sum(), logits)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().sum()) > 0


def test_gradients_modes_and_buffers_are_left_alone(images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn(dropout=0.5).train()
    model[1].eval()  # a batch norm that the user froze, in a network in train mode
    F.cross_entropy(model(images), labels).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for bn in ("eval", "frozen"):
        pgd(model, images, AttackGoal("ce", labels), PGDSpec(0.1, 0.05, 2), bn=bn)
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))  # type: ignore[arg-type]
    assert all(p.requires_grad for p in model.parameters())


def test_modes_come_back_after_an_error_inside_the_attack(images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn().train()
    with pytest.raises(RuntimeError, match="shapes"), attack_mode(model, "frozen"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert model.training
    assert model[1].track_running_stats


def test_the_three_bn_modes(images: Tensor, labels: Tensor) -> None:
    """eval: running statistics; train: the batch's, running ones move; frozen: the batch's, nothing moves."""
    goal, spec = AttackGoal("ce", labels), PGDSpec(0.1, 0.05, 2, start="none")
    results, moved = {}, {}
    for bn in ("eval", "train", "frozen"):
        model = tiny_cnn().eval()
        before = model[1].running_mean.clone()
        results[bn] = pgd(model, images, goal, spec, bn=bn).x_adv
        moved[bn] = not torch.equal(before, model[1].running_mean)
    assert moved == {"eval": False, "train": True, "frozen": False}
    assert torch.equal(results["train"], results["frozen"])
    assert not torch.equal(results["eval"], results["frozen"])
    with pytest.raises(UserError, match="did you mean 'frozen'"):
        pgd(tiny_cnn(), images, goal, spec, bn="frosen")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(images: Tensor, labels: Tensor, context: type) -> None:
    model, spec = tiny_cnn(), PGDSpec(0.1, 0.05, 2, start="none")
    expected = pgd(model, images, AttackGoal("ce", labels), spec).x_adv
    with context():
        x, y = images.clone(), labels.clone()  # inference tensors, under inference_mode
        adv = pgd(model, x, AttackGoal("ce", y), spec).x_adv
    assert torch.equal(adv, expected)
    adv.requires_grad_()  # an ordinary tensor, fit for training on


def test_the_twin_shares_memory_but_not_mode_or_gradients(images: Tensor) -> None:
    model = tiny_cnn(dropout=0.5).train()
    twin = frozen_twin(model, "eval")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    model(images)  # moves the running statistics
    assert torch.equal(twin(images), model.eval()(images))
    assert not any(p.requires_grad for p in twin.parameters())
    model.load_state_dict(tiny_cnn(seed=5).state_dict())
    assert torch.equal(twin(images), model(images))


def test_zero_gradients_are_counted() -> None:
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # The second half of the batch does not depend on its image.
            on = torch.tensor([1.0, 0.0]).repeat_interleave(x.shape[0] // 2)[:, None]
            return on * x.flatten(1)[:, :10]

    with pytest.warns(UserWarning, match="12 of 24 gradients were zero or not finite"):
        result = pgd(Dead(), torch.rand(6, 3, 8, 8), AttackGoal("ce", torch.arange(6)), PGDSpec(0.1, 0.05, 4))
    assert int(result.zero_grads) == 3 * 4
    assert result.gradients == 6 * 4


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_l2_step_does_not_depend_on_the_gradients_scale(scale: float) -> None:
    x, gradient = torch.full((4, 3, 8, 8), 0.5), torch.randn(4, 3, 8, 8)
    expected = pgd_step_l2(x, gradient.double().float(), x, step_size=0.1, eps=1.0)
    actual = pgd_step_l2(x, gradient * scale, x, step_size=0.1, eps=1.0)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(distance(actual - x, "l2"), torch.full((4,), 0.1))


def test_a_nan_gradient_moves_nothing_and_is_counted() -> None:
    class Overflowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0 + 1).log().sqrt().flatten(1)[:, :10]  # infinite slope at 0, times 0

    x = torch.rand(4, 3, 8, 8)
    for norm in NORMS:
        with pytest.warns(UserWarning, match="8 of 8 gradients were zero or not finite"):
            result = pgd(
                Overflowing(),
                x,
                AttackGoal("ce", torch.arange(4)),
                PGDSpec(0.1, 0.05, 2, norm=norm, start="none"),
            )
        assert torch.equal(result.x_adv, x)
        assert int(result.zero_grads) == 8


def test_restarts_fool_at_least_as_often_and_keep_what_fools(images: Tensor, labels: Tensor) -> None:
    model = tiny_cnn().eval()
    labels = model(images).argmax(1)
    one, five = PGDSpec(0.03, 0.02, 2), PGDSpec(0.03, 0.02, 2, restarts=5)
    goal = AttackGoal("ce", labels)
    # The first run of five draws the same start as the single one.
    single = pgd(model, images, goal, one, generator=torch.Generator().manual_seed(0)).x_adv
    many = pgd(model, images, goal, five, generator=torch.Generator().manual_seed(0)).x_adv
    fooled, fooled_many = goal.reached(model(single)), goal.reached(model(many))
    assert bool((fooled <= fooled_many).all())
    assert bool((goal.per_image(model(many)) >= goal.per_image(model(single)))[fooled == fooled_many].all())


def test_starts(images: Tensor) -> None:
    assert torch.equal(start_point(images, "none", norm="linf", eps=0.1), images)
    middle = torch.full((512, 1, 4, 4), 0.5)
    noise = start_point(middle, "gaussian", norm="linf", eps=0.1) - middle
    assert abs(float(noise.mean())) < 5e-5
    assert abs(float(noise.std()) - 0.001) < 5e-5
    delta = start_point(middle, "uniform", norm="linf", eps=0.2) - middle
    assert abs(float(delta.mean())) < 0.01
    assert abs(float(delta.std()) - 0.4 / math.sqrt(12)) < 0.005
    radius = distance(start_point(middle, "uniform", norm="l2", eps=0.2) - middle, "l2")
    assert float(radius.max()) <= 0.2
    assert abs(float(radius.mean()) - 0.1) < 0.01


def test_steps_zero_returns_the_start_and_an_equal_seed_the_same_attack(
    images: Tensor, labels: Tensor
) -> None:
    goal = AttackGoal("ce", labels)
    assert torch.equal(pgd(tiny_cnn(), images, goal, PGDSpec(0.1, 0.05, 0, start="none")).x_adv, images)
    edge = pgd(tiny_cnn(), images.round(), goal, PGDSpec(0.1, 0.05, 0, start="gaussian")).x_adv
    assert (float(edge.min()), float(edge.max())) == (0, 1)
    spec = PGDSpec(0.1, 0.05, 2)
    a, b = (
        pgd(tiny_cnn(), images, goal, spec, generator=torch.Generator().manual_seed(3)).x_adv
        for _ in range(2)
    )
    assert torch.equal(a, b)


def test_a_given_start_is_used(images: Tensor, labels: Tensor) -> None:
    goal, spec = AttackGoal("ce", labels), PGDSpec(0.1, 0.05, 0)
    start = (images + 0.05).clamp(0, 1)
    assert torch.equal(pgd(tiny_cnn(), images, goal, spec, x_start=start).x_adv, start)
    with pytest.raises(UserError, match="restarts must be 1"):
        pgd(tiny_cnn(), images, goal, PGDSpec(0.1, 0.05, 1, restarts=2), x_start=start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attack_is_as_strong_in_float32(dtype: torch.dtype) -> None:
    """Compares the float32 losses reached, not pixels: signs of tiny gradients differ between precisions."""
    model = tiny_cnn(classes=10)
    with torch.no_grad():
        model[-1].weight.mul_(20)  # a confident network, on which plain fp16 loses whole images
    x = torch.rand(64, 3, 8, 8)
    y = model.eval()(x).argmax(1)
    spec, goal = PGDSpec(0.05, 0.0125, 10, start="none"), AttackGoal("ce", y)
    full, half = pgd(model, x, goal, spec), pgd(model, x, goal, spec, amp_dtype=dtype)
    with torch.no_grad():
        reached = [float(goal.per_image(model(r.x_adv)).mean()) for r in (full, half)]
    assert reached[1] > 0.98 * reached[0]
    assert int(half.zero_grads) == int(full.zero_grads)


@needs("cxx")
@pytest.mark.parametrize("norm", NORMS)
def test_a_compiled_network_gives_the_same_attack(norm: str) -> None:
    model = tiny_cnn(dtype=torch.float64)
    x, y = torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.randint(10, (8,))
    spec = PGDSpec(0.1, 0.02, 10, norm=norm, start="none")
    expected = pgd(model, x, AttackGoal("ce", y), spec).x_adv
    compiled = pgd(torch.compile(model), x, AttackGoal("ce", y), spec).x_adv  # type: ignore[arg-type]
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps must be in"),
        ({"eps": 1.5}, "eps must be in"),
        ({"step_size": -0.1}, "step_size must be above 0"),
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"eps": float("nan")}, "eps must be one number in pixel units, such as 8/255, got nan"),
        ({"eps": "8/255"}, "eps must be one number"),
        ({"eps": torch.ones(2, 1, 1, 1)}, "eps must be one number"),
        ({"step_size": float("nan")}, "step_size must be one number"),
        ({"step_size": float("inf")}, "step_size must be above 0 and finite"),
        ({"restarts": 0}, "restarts must be >= 1"),
        ({"norm": "linff"}, "did you mean 'linf'"),
        ({"start": "unifrom"}, "did you mean 'uniform'"),
    ],
)
def test_bad_numbers_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"eps": 0.1, "step_size": 0.05, "steps": 1}
    with pytest.raises(UserError, match=message):
        PGDSpec(**{**good, **change})  # type: ignore[arg-type]


def test_bad_tensors_are_named(labels: Tensor) -> None:
    spec = PGDSpec(0.1, 0.05, 1)
    with pytest.raises(UserError, match="images must be float"):
        pgd(tiny_cnn(), torch.zeros(8, 3, 8, 8, dtype=torch.uint8), AttackGoal("ce", labels), spec)
    with pytest.raises(UserError, match=r"4 images but labels of shape \(8,\)"):
        pgd(tiny_cnn(), torch.rand(4, 3, 8, 8), AttackGoal("ce", labels), spec)


def test_names_of_the_evaluation() -> None:
    def parsed(names: str) -> list[NamedAttack]:
        return [parse_attack(name, eps=8 / 255, step_size=2 / 255) for name in split_names(names)]

    clean, fgsm, pgd20, strong, cw = parsed("clean, FGSM,pgd20,pgd50-10,cw")
    assert clean.search is None
    assert fgsm.search == RestartedPGD("ce", PGDSpec(8 / 255, 8 / 255, 1, start="none"))
    assert pgd20.search == RestartedPGD("ce", PGDSpec(8 / 255, 2 / 255, 20))
    assert strong.search == RestartedPGD("ce", PGDSpec(8 / 255, 2 / 255, 50, restarts=10))
    assert cw.search == RestartedPGD("margin", PGDSpec(8 / 255, 2 / 255, 20))
    for bad, message in [
        ("pdg20", "did you mean .*'pgd20'"),
        ("pgd", "unknown attack 'pgd'"),
        ("pgd0", "steps and restarts"),
        ("pgd99999999999999999999-1", "at most 100000"),
        ("pgd1000-101", "at most 100000"),
        ("", "no attack named"),
        ("fgsm,fgsm", "named twice"),
    ]:
        with pytest.raises(UserError, match=message):
            parsed(bad)
