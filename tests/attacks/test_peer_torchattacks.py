"""Our PGD and torchattacks' from the same start: the same images to 1e-6."""

import pytest
import torch
from conftest import needs
from support.networks import tiny_cnn
from torch import Tensor

from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec

pytestmark = [pytest.mark.peer, needs("torchattacks")]


# Not a power of two: torchattacks averages the loss over the batch, we add it up. In float64 the rounding
# that this causes cannot flip the sign of a gradient that is not itself rounding noise.
BATCH = 6


def peers_start(x: Tensor, norm: str, eps: float) -> Tensor:
    """Where torchattacks begins, drawn as it draws: our own starts come from another generator."""
    if norm == "linf":
        return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    direction = torch.empty_like(x).normal_()
    length = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + direction * (torch.zeros_like(length).uniform_(0, 1) / length * eps)).clamp(0, 1)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=needs("cxx"))], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_equals_torchattacks(norm: str, compiled: bool, random_start: bool) -> None:
    import torchattacks

    eps, step = (8 / 255, 2 / 255) if norm == "linf" else (1.0, 0.2)
    model = tiny_cnn(dtype=torch.float64).eval()
    x, y = torch.rand(BATCH, 3, 8, 8, dtype=torch.float64), torch.randint(10, (BATCH,))
    peer = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm](
        model, eps, step, 10, random_start=random_start
    )
    torch.manual_seed(11)
    expected = peer(x, y)
    ours = torch.compile(model) if compiled else model
    torch.manual_seed(11)
    start = peers_start(x, norm, eps) if random_start else x
    actual = pgd(ours, x, AttackGoal("ce", y), PGDSpec(eps, step, 10, norm=norm), x_start=start).x_adv  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert float((actual - x).abs().max()) > 1e-3


def test_fgsm_and_targeted_equal_torchattacks() -> None:
    import torchattacks

    eps = 8 / 255
    model = tiny_cnn(dtype=torch.float64).eval()
    x, y = torch.rand(BATCH, 3, 8, 8, dtype=torch.float64), torch.randint(10, (BATCH,))
    fgsm = PGDSpec(eps, eps, 1, start="none")
    torch.testing.assert_close(
        pgd(model, x, AttackGoal("ce", y), fgsm).x_adv, torchattacks.FGSM(model, eps)(x, y), rtol=0, atol=1e-6
    )
    peer = torchattacks.PGD(model, eps, eps / 4, 10, random_start=False)
    peer.set_mode_targeted_by_label(quiet=True)
    target = (y + 1) % 10
    spec = PGDSpec(eps, eps / 4, 10, start="none")
    actual = pgd(model, x, AttackGoal("ce", target, targeted=True), spec).x_adv
    torch.testing.assert_close(actual, peer(x, target), rtol=0, atol=1e-6)
