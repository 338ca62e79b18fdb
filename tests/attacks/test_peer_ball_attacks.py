"""The norm-ball attacks beside torchattacks' and foolbox's from the same starts: the same images to 1e-5.

What they do otherwise is not compared: torchattacks has L1 and L0 attacks of other kinds only; foolbox's MIM
adds up signs under L-inf and L2-normalised gradients under L2, where Dong et al. add up L1-normalised ones;
foolbox's L1 projection ends outside the ball (it takes (0.3, 0.2) to (0.233, 0.133) for a radius of 0.3).
"""

from typing import Any

import pytest
import torch
from conftest import needs
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.target_classes import target_classes
from fastdynat.attacks import parse_attack

# foolbox imports a name that SciPy has moved.
pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning"),
]
EPS, STEP = 8 / 255, 2 / 255
SIZES = {"linf": (EPS, STEP), "l2": (1.0, 0.2), "l1": (4.0, 1.0)}
FOOLBOX = {"linf": "Linf", "l2": "L2"}


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    """Six images, not a power of two: torchattacks averages, and in float64 that flips no sign."""
    model = tiny_cnn(dtype=torch.float64).eval()
    return model, torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randint(10, (6,))


def ours(name: str, case: tuple[nn.Module, Tensor, Tensor], norm: str = "linf") -> Tensor:
    model, x, y = case
    eps, step_size = SIZES[norm]
    search = parse_attack(name, eps=eps, step_size=step_size, norm=norm).search
    assert search is not None
    return search(Ascent(model), x, y).x_adv


def assert_same(actual: Tensor, expected: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert float((actual - x).abs().max()) > 1e-3


@needs("torchattacks")
@pytest.mark.parametrize("rule", [None, "next", "least", "second"])
@pytest.mark.parametrize("name", ["fgsm", "bim10", "mim10"])
def test_torchattacks(name: str, rule: str | None, case: tuple[nn.Module, Tensor, Tensor]) -> None:
    import torchattacks

    model, x, y = case
    peer: Any = {
        "fgsm": lambda: torchattacks.FGSM(model, EPS),
        "bim10": lambda: torchattacks.BIM(model, EPS, STEP, 10),
        "mim10": lambda: torchattacks.MIFGSM(model, EPS, STEP, 10, decay=1.0),
    }[name]()
    labels = y
    if rule == "least":
        peer.set_mode_targeted_least_likely(kth_min=1, quiet=True)
    elif rule is not None:
        peer.set_mode_targeted_by_label(quiet=True)
        labels = target_classes(rule, model(x), y)[:, 0]
    assert_same(ours(name if rule is None else f"{name}@{rule}", case), peer(x, labels), x)


def foolbox_run(attack: Any, model: nn.Module, x: Tensor, criterion: Any, eps: float) -> Tensor:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return attack.run(wrapped, x, criterion, epsilon=eps)


@needs("foolbox")
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", list(FOOLBOX))
@pytest.mark.parametrize("name", ["fgsm", "bim10"])
def test_foolbox(name: str, norm: str, targeted: bool, case: tuple[nn.Module, Tensor, Tensor]) -> None:
    import foolbox

    (model, x, y), (eps, step) = case, SIZES[norm]
    # foolbox's FGSM refuses targets; it is BIM with one step of eps.
    size, steps = (eps, 1) if name == "fgsm" else (step, 10)
    kind = getattr(foolbox.attacks, f"{FOOLBOX[norm]}BasicIterativeAttack")
    criterion = (
        foolbox.criteria.TargetedMisclassification((y + 1) % 10)
        if targeted
        else foolbox.criteria.Misclassification(y)
    )
    expected = foolbox_run(kind(abs_stepsize=size, steps=steps, random_start=False), model, x, criterion, eps)
    assert_same(ours(name + "@next" * targeted, case, norm), expected, x)


@needs("foolbox")
@pytest.mark.parametrize("norm", list(FOOLBOX))
def test_foolbox_pgd_from_its_own_start(norm: str, case: tuple[nn.Module, Tensor, Tensor]) -> None:
    import foolbox

    (model, x, y), (eps, step) = case, SIZES[norm]
    begun: list[Tensor] = []

    class Told(getattr(foolbox.attacks, f"{FOOLBOX[norm]}ProjectedGradientDescentAttack")):  # type: ignore[misc]
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            start = super().get_random_start(x0, epsilon)
            begun.append(start.raw.clamp(0, 1))
            return start

    criterion = foolbox.criteria.Misclassification(y)
    expected = foolbox_run(Told(abs_stepsize=step, steps=20), model, x, criterion, eps)
    actual = pgd(model, x, AttackGoal("ce", y), PGDSpec(eps, step, 20, norm=norm), x_start=begun[0]).x_adv
    assert_same(actual, expected, x)


@needs("foolbox")
@pytest.mark.parametrize("targeted", [False, True])
def test_foolbox_slide_until_it_projects(targeted: bool, case: tuple[nn.Module, Tensor, Tensor]) -> None:
    """The entries that move and by how much, for images that no step takes out of the ball or the range."""
    import foolbox

    model, x, y = case
    x, (eps, step) = 0.4 + 0.2 * x, (0.6, 0.06)
    criterion = (
        foolbox.criteria.TargetedMisclassification((y + 1) % 10)
        if targeted
        else foolbox.criteria.Misclassification(y)
    )
    peer = foolbox.attacks.SparseL1DescentAttack(quantile=0.99, abs_stepsize=step, steps=10)
    expected = foolbox_run(peer, model, x, criterion, eps)
    target = (y + 1) % 10 if targeted else y
    spec = PGDSpec(eps, step, 10, norm="l1", start="none")
    actual = pgd(model, x, AttackGoal("ce", target, targeted=targeted), spec).x_adv
    assert_same(actual, expected, x)
    assert 0 < float(expected.min()) < float(expected.max()) < 1
