"""Half precision: weights that autocast alone would cast are held cast, all others as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat import PGD
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.network_comparison import HALF_TOLERANCES
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.execution.fallbacks import SilentFallbacks

HALF = torch.bfloat16


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h)


class Island(Plain):
    def head(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return self.fc(h.float())


class IslandOfOneDevice(Plain):
    """Which could be traced, but for the region."""

    def head(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.fc(h.float())


class Inner(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(h.float())


class IslandInside(Plain):
    """In a module of its own: the rest is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Inner(16, 10)


class Cosine(Plain):
    def head(self, h: Tensor) -> Tensor:
        return F.linear(F.normalize(h), F.normalize(self.fc.weight))


class Turned(Plain):
    def head(self, h: Tensor) -> Tensor:
        return h @ self.fc.weight.T


NETWORKS = [Plain, Island, IslandOfOneDevice, IslandInside, Cosine, Turned]


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator)


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own logits and the gradient of its cross-entropy, under autocast."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", HALF):
        logits = model(leaf).float()
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y), leaf)[0]


@pytest.mark.parametrize("kind", NETWORKS)
def test_only_weights_that_their_layers_alone_read_are_cast(kind: type[Plain]) -> None:
    model, (x, _) = kind().eval(), images()
    replica = AttackReplica(model, x[:2], dtype=HALF, fold=False)
    found = {name: parameter.dtype for name, parameter in replica.network.named_parameters()}
    head = HALF if kind is Plain else torch.float32
    assert (found["conv.weight"], found["norm.weight"], found["fc.weight"]) == (HALF, torch.float32, head)
    with torch.no_grad(), torch.autocast("cpu", HALF):
        torch.testing.assert_close(replica.network(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_attack_is_that_of_the_network(kind: type[Plain], last: bool) -> None:
    model, (x, y) = kind().eval(), images()
    switches, silent = AttackSwitches(dtype=HALF, channels_last=last), SilentFallbacks()
    engine = AttackEngine(model, x[:2], switches=switches, fallbacks=silent)
    assert engine.switches.channels_last is last
    for _ in range(2):
        want, want_grad = loss_gradient(model, x, y)
        most, most_grad = HALF_TOLERANCES[HALF]
        got, grad = engine.logits(x), engine.gradient(x, AttackGoal("ce", y))
        assert float((got - want).abs().max()) <= most * float(want.abs().max())
        cosine = F.cosine_similarity(grad.flatten(), want_grad.flatten(), dim=0)  # its scale is free
        assert float(cosine) > 1 - most_grad / 10
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        engine.refresh()


def test_a_region_of_autocast_stays_in_a_folded_network() -> None:
    x, _ = images()
    whole, part = (AttackReplica(kind().eval(), x[:2]) for kind in (IslandOfOneDevice, IslandInside))
    assert (whole.num_folded, part.num_folded) == (0, 1)
    assert "sets autocast itself" in whole.note
    assert any(type(module) is Inner for module in part.network.modules())
    with torch.autocast("cpu", HALF):
        assert part.network(x).dtype == torch.float32


# The first of some processors, where it takes as long as in float32.
@pytest.mark.filterwarnings("ignore:amp=", "ignore:batch norm is not folded")
def test_the_drop_in_attacks_a_replica_of_such_a_network() -> None:
    model, (x, y) = Island().eval(), images()
    pgd = PGD(model, steps=3, amp=HALF, channels_last=True)
    x_adv = pgd(x, y)
    assert "bfloat16 replica" in pgd.path
    assert "channels-last" in pgd.path
    with torch.no_grad():
        assert float(F.cross_entropy(model(x_adv), y)) > float(F.cross_entropy(model(x), y))
