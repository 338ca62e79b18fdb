"""One training step against a float64 transcription of the published formulas, independent of our code."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.stepping import (
    EPS,
    STEP,
    STEPS,
    K,
    N,
    assert_same_step,
    drawn_start,
    make_batch,
    moved_network,
    tiny_network,
    train_step,
)
from torch import Tensor, nn

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods import (
    Dynat,
    DynatOptions,
    Inner,
    Madry,
    MadryOptions,
    Natural,
    NaturalOptions,
    Networks,
)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def reference_dynat_step(
    model: nn.Module, guide: nn.Module, x: Tensor, y: Tensor, noise: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Algorithms A.2-A.5 image by image: label, attack, both losses with gradients, and the BN buffers."""
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
    model, guide = moved_network(1), tiny_network(2)
    reference_model, reference_guide = copy.deepcopy(model), copy.deepcopy(guide)
    step = train_step(Dynat(DynatOptions(beta=beta)), model, guide)

    noise = (drawn_start(batch.x, "gaussian") - batch.x) / 0.001
    logs = step(batch)
    loss, guide_loss = reference_dynat_step(
        reference_model, reference_guide, batch.x, batch.labels, noise, beta
    )

    torch.testing.assert_close(logs["loss"], loss)
    torch.testing.assert_close(logs["guide_loss"], guide_loss)
    assert_same_step(model, reference_model)
    assert_same_step(guide, reference_guide)


class Oracle(nn.Module):
    """A guide that knows the labels: l_nat = y."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels, self.scale = labels, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.one_hot(self.labels, K).to(x.dtype)


@pytest.mark.parametrize("clean_pass", [False, True])
def test_with_true_labels_dynat_is_madry_bitwise(batch: Batch, clean_pass: bool) -> None:
    """`l_nat = y`: the same weights and buffers bit for bit after three float32 updates, any momentum."""
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
        def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
            assert inner.goal is not None
            assert torch.equal(inner.goal.target, batch.labels)
            attacked = attack(batch.x, inner.goal)  # the engine's own stays at hand
            assert attacked.gradients == N * STEPS
            return AttackResult(batch.x, attacked.zero_grads, attacked.gradients)

    models = []
    for method in (Search(MadryOptions()), Natural(NaturalOptions())):
        model = tiny_network(1)
        train_step(method, model, None)(batch)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
