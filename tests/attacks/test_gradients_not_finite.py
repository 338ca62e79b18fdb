"""Networks with finite logits whose gradient is not finite: no attack returns NaN, none hides it."""

import warnings
from typing import Any

import pytest
import torch
from support.networks import tiny_cnn
from support.short_attacks import missing_attacks, short_attack
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attacks import APGD, NamedAttack, Nearest
from fastdynat.attacks.ball import inside
from fastdynat.attacks.registry import entries
from fastdynat.data import ImageSet
from fastdynat.evaluation import AutoAttack, measure
from fastdynat.evaluation.outcome import unpack_bits
from fastdynat.ops.image_draws import ImageDraws

N, CPU = 8, torch.device("cpu")
EPS = {"linf": 0.1, "l2": 0.8, "l1": 6.0, "l0": 6.0}
NAMES = (
    "fgsm",
    "bim3",
    "mim3",
    "pgd3",
    "pgd3@random",
    "cw3",
    "apgd-ce4",
    "apgd-dlr4",
    "apgd-t4",
    "fab",
    "fab-t-min",
    "deepfool20",
    "deepfool-linf20",
    "cwl2-5x50",
    "sigmazero20",
)
OWN = {"deepfool20": "l2", "deepfool-linf20": "linf", "cwl2-5x50": "l2", "sigmazero20": "l0"}
CASES = [
    (name, norm)
    for name in NAMES
    for entry in entries()
    if entry.match(name)
    for norm in ((OWN[name],) if name in OWN else entry.norms)
]


class NoGradient(torch.autograd.Function):
    """The identity, with NaN as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(grad, torch.nan)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = tiny_cnn(0).eval().requires_grad_(False), kind

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.sqrt() if self.kind == "inf" else NoGradient.apply(x))
        return out


def images() -> Tensor:
    """Every fourth value is 0, where the root's gradient is infinite; the last image is black."""
    x = torch.randint(1, 256, (N, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    x.flatten()[::4] = 0
    x[-1] = 0
    return x


def named(name: str, norm: str) -> NamedAttack:
    return short_attack(name, norm, eps=EPS[norm], steps=10)


def test_every_registered_attack_is_here() -> None:
    assert missing_attacks((*NAMES, "square")) == []


@pytest.mark.parametrize("kind", ["inf", "nan"])
@pytest.mark.parametrize(("name", "norm"), CASES, ids=[f"{name} {norm}" for name, norm in CASES])
def test_images_stay_finite_and_useless_gradients_are_counted(name: str, norm: str, kind: str) -> None:
    model, x = Net(kind), images() / 255
    labels = model(x).argmax(1)
    ascent = Ascent(model, Underflow(rescale=True), allow_no_gradient=True)
    draws = ImageDraws.of(0, torch.arange(N), CPU)
    found = named(name, norm).run(ascent, x, labels, draws=draws)
    assert bool(found.x_adv.isfinite().all())
    if isinstance(found, Nearest):
        assert float(found.x_adv.min()) >= 0
        assert float(found.x_adv.max()) <= 1
        assert not bool(found.distance.isnan().any())
    else:
        assert bool(inside(found.x_adv, x, norm, EPS[norm]).all())
    assert found.gradients > 0
    if kind == "nan":
        assert int(found.zero_grads) == found.gradients
    else:
        moved = (found.x_adv != x).flatten(1).any(1)
        assert bool(moved[:-1].all())


@pytest.mark.parametrize("kind", ["inf", "nan"])
@pytest.mark.parametrize(
    ("name", "norm"), [case for case in CASES if case[1] != "l0" and case[0] != "sigmazero20"]
)
def test_a_measurement_and_autoattack_agree(name: str, norm: str, kind: str) -> None:
    model, x = Net(kind), images()
    labels = model(x / 255).argmax(1)
    attack = named(name, norm)
    measured = measure(model, ImageSet(x, labels), attack, device=CPU, batch_size=N, seed=1)
    evaluator = AutoAttack(
        model, norm, EPS[norm], seed=1, verbose=False, version="custom", attacks_to_run=[name], device="cpu"
    )
    evaluator.stages = [attack]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x_adv = evaluator.run_standard_evaluation(x / 255, labels)
    assert torch.equal(model(x_adv).argmax(1) == labels, unpack_bits(measured.robust_bits, N))


def test_one_draw_that_is_not_finite_leaves_the_others() -> None:
    model, calls = Net("inf").net, iter(range(10**6))

    def sometimes(x: Tensor) -> Tensor:
        out: Tensor = model(NoGradient.apply(x) if next(calls) % 2 else x)
        return out

    x = images() / 255
    spec = APGD(loss="ce", eps=0.1, steps=4, eot=2)
    found = spec(Ascent(sometimes), x, model(x).argmax(1), generator=torch.Generator().manual_seed(0))
    assert int(found.zero_grads) == 0


class Endless:
    """An attack of somebody else that returns NaN."""

    norm = "linf"

    def __call__(self, ascent: Ascent, x: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return torch.full_like(x, torch.nan)


def test_an_image_that_is_not_finite_does_not_count() -> None:
    model, x = Net("inf"), images()
    labels = model(x / 255).argmax(1)
    attack: Any = NamedAttack("endless", Endless())  # type: ignore[arg-type]
    assert measure(model, ImageSet(x, labels), attack, device=CPU, batch_size=N, seed=1).accuracy == 1
