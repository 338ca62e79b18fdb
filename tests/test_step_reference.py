"""One training step against a loop-based float64 transcription of the published formulas, written without our code."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.attacks import AttackGoal, AttackResult, PGDSpec
from fastdynat.attacks.steps import start_point
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.engine.networks import NetworkSet
from fastdynat.engine.precision import Precision
from fastdynat.engine.step import TrainStep
from fastdynat.methods import Dynat, DynatOptions, Madry, MadryOptions, Natural, NaturalOptions
from fastdynat.methods.base import Attack, Method

EPS, STEP, STEPS, LR, N, K = 0.05, 0.02, 3, 0.1, 8, 4
CPU = torch.device("cpu")


def tiny_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, K)]
    return nn.Sequential(*layers).double()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(N, 3, 8, 8, dtype=torch.float64, generator=generator)
    return Batch(x, torch.randint(K, (N,), generator=generator), torch.arange(N))


def train_step(method: Method[Any], model: nn.Module, guide: nn.Module | None, **optim: Any) -> TrainStep:
    networks = NetworkSet(model, guide, image_shape=(3, 8, 8), device=CPU, attack_bn=optim.pop("attack_bn", "eval"))
    spec = PGDSpec(EPS, STEP, STEPS, start=optim.pop("start", "gaussian"))
    config = OptimConfig(lr=LR, epochs=1, weight_decay=0.0, momentum=0.0, **optim)
    return TrainStep(method, networks, spec, config, Precision("off", CPU), lambda step: 1.0)


def reference_dynat_step(
    model: nn.Module, guide: nn.Module, x: Tensor, y: Tensor, noise: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """algorithms A.2-A.5: label, attack, the two losses with their gradients, and the BN buffers, image by image."""
    guide.train()
    guide_logits = guide(x)
    labels = [int(guide_logits[i].detach().argmax()) for i in range(N)]
    model.eval()
    attacked = []
    for i in range(N):
        xi = x[i : i + 1] + 0.001 * noise[i : i + 1]
        for _ in range(STEPS):
            xi = xi.detach().requires_grad_()
            log_probs = torch.log(torch.exp(model(xi)) / torch.exp(model(xi)).sum())
            gradient = torch.autograd.grad(-log_probs[0, labels[i]], xi)[0]
            xi = xi.detach() + STEP * torch.sign(gradient)
            xi = torch.min(torch.max(xi, x[i : i + 1] - EPS), x[i : i + 1] + EPS)
            xi = torch.clamp(xi, 0, 1)
        attacked.append(xi)
    model.train()
    logits = model(torch.cat(attacked))
    loss = sum(-torch.log_softmax(logits[i], 0)[labels[i]] for i in range(N)) / N
    guide_loss = sum(-torch.log_softmax(guide_logits[i], 0)[y[i]] for i in range(N)) / N
    (beta * loss + guide_loss).backward()
    with torch.no_grad():
        model(x)  # the release's unused clean pass: moves running statistics only
    return beta * loss.detach(), guide_loss.detach()


@pytest.mark.parametrize("beta", [1.0, 0.2])
def test_dynat_step_equals_the_float64_transcription(batch: Batch, beta: float) -> None:
    model, guide = tiny_network(1), tiny_network(2)
    model.train()(torch.rand(16, 3, 8, 8, dtype=torch.float64))  # running statistics away from their start
    reference_model, reference_guide = copy.deepcopy(model), copy.deepcopy(guide)
    step = train_step(Dynat(DynatOptions(beta=beta)), model, guide)

    torch.manual_seed(7)
    logs = step(batch)
    torch.manual_seed(7)
    noise = (
        start_point(batch.x, "gaussian", norm="linf", eps=EPS) - batch.x
    ) / 0.001  # its distribution: test_ops_random_start
    loss, guide_loss = reference_dynat_step(reference_model, reference_guide, batch.x, batch.labels, noise, beta)

    torch.testing.assert_close(logs["loss"], loss)
    torch.testing.assert_close(logs["guide_loss"], guide_loss)
    for ours, reference in ((model, reference_model), (guide, reference_guide)):
        for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
            assert q.grad is not None
            assert float(q.grad.abs().sum()) > 0, name
            torch.testing.assert_close(p.grad, q.grad, msg=name)
            torch.testing.assert_close(p, q - LR * q.grad, msg=name)
        for (name, b), c in zip(ours.named_buffers(), reference.named_buffers(), strict=True):
            torch.testing.assert_close(b, c[1], msg=name)


class Oracle(nn.Module):
    """A guide that knows the labels: l_nat = y."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels, self.scale = labels, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.one_hot(self.labels, K).to(x.dtype)


@pytest.mark.parametrize("clean_pass", [False, True])
def test_with_true_labels_dynat_is_madry_bitwise(batch: Batch, clean_pass: bool) -> None:
    """`l_nat = y`: the same weights and buffers to the last bit after three updates (float32, momentum off or on alike)."""
    batch = Batch(batch.x.float(), batch.labels, batch.indices)
    results = []
    for method, guide in (
        (Dynat(DynatOptions(bn_clean_forward=clean_pass)), Oracle(batch.labels)),
        (Madry(MadryOptions(bn_clean_forward=clean_pass)), None),
    ):
        model = tiny_network(1).float()
        step = train_step(method, model, guide)
        torch.manual_seed(3)
        for _ in range(3):
            step(batch)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert not torch.equal(results[0]["0.weight"], tiny_network(1).float()[0].weight)


def test_a_method_may_bring_its_own_search(batch: Batch) -> None:
    """`perturb` replaces the engine's attack; returning the clean images gives natural training's update."""

    class Search(Madry):
        def perturb(self, batch: Batch, goal: AttackGoal, attack: Attack) -> AttackResult:
            assert torch.equal(goal.target, batch.labels)
            attacked = attack(batch.x, goal)  # the engine's own stays at hand
            assert attacked.gradients == N * STEPS
            return AttackResult(batch.x, attacked.zero_grads, attacked.gradients)

    models = []
    for method in (Search(MadryOptions()), Natural(NaturalOptions())):
        model = tiny_network(1)
        train_step(method, model, None)(batch)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
