"""IKL against a float64 transcription of its formulas: the loss, whole steps, and the prior over epochs."""

import copy
import math

import pytest
import torch
from support.stepping import (
    K,
    N,
    assert_same_step,
    drawn_start,
    make_batch,
    moved_network,
    train_step,
)
from support.transcriptions import attack, kl_goal, log_probs
from torch import Tensor, nn

from fastdynat.commands.main import main
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import Ikl, IklOptions
from fastdynat.methods.ikl import weighted_gap
from fastdynat.training.step import TrainStep


def transcribed_loss(
    clean: Tensor, adv: Tensor, labels: Tensor, weights: Tensor, *, beta: float = 20.0, alpha: float = 4.0
) -> Tensor:
    """Over pairs of classes, image by image; `labels` and `weights` have a row per image."""
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(labels)):
        w = weights[i]
        for j in range(K):
            for k in range(K):
                apart = (clean[i, j] - clean[i, k]) - (adv[i, j] - adv[i, k])
                loss = loss + beta * 0.25 * w[j] * w[k] * apart**2
        loss = loss - alpha * (log_probs(clean[i]).exp().detach() * log_probs(adv[i])).sum()
        loss = loss - (labels[i] * log_probs(clean[i])).sum()
    return loss / len(labels)


def one_hot(labels: Tensor) -> Tensor:
    return torch.eye(K, dtype=torch.float64)[labels]


def some_prior() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(K, K, dtype=torch.float64, generator=generator).softmax(1)


def step_with_prior(model: nn.Module, prior: Tensor, **options: float) -> TrainStep:
    step = train_step(Ikl(IklOptions(**options)), model, None)
    step.method.buffers["prior"].copy_(prior)
    return step


def sums_of(clean: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    sums = torch.zeros(K, K, dtype=torch.float64)
    for i in range(len(labels)):
        sums[labels[i]] += (clean[i].detach() / temperature).softmax(0)
    return sums


def test_the_weighted_gap_is_the_sum_over_pairs() -> None:
    gap, weights = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    pairs = weights[:, :, None] * weights[:, None, :] * (gap[:, :, None] - gap[:, None, :]) ** 2
    torch.testing.assert_close(weighted_gap(gap, weights), pairs.sum((1, 2)) / 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"mse_weight": 3.0, "soft_weight": 0.5, "temperature": 1.0}, {"mse_weight": 0.0}],
)
def test_a_step_equals_the_transcription(options: dict[str, float]) -> None:
    batch, model = make_batch(), moved_network(1)
    reference, prior = copy.deepcopy(model), some_prior()
    step = step_with_prior(model, prior, **options)
    start = drawn_start(batch.x, "gaussian")
    logs = step(batch)
    x_adv, _ = attack(reference, batch.x, start, kl_goal(reference, batch.x))
    adv = reference(x_adv)  # the attacked batch first: running statistics depend on the order
    clean = reference(batch.x)
    beta, alpha = options.get("mse_weight", 20.0), options.get("soft_weight", 4.0)
    loss = transcribed_loss(clean, adv, one_hot(batch.labels), prior[batch.labels], beta=beta, alpha=alpha)
    loss.backward()
    torch.testing.assert_close(logs["loss"], loss.detach())
    assert_same_step(model, reference)
    wanted = sums_of(clean, batch.labels, options.get("temperature", 4.0))
    torch.testing.assert_close(step.method.buffers["sums"], wanted)
    torch.testing.assert_close(step.method.buffers["prior"], prior)


def test_weight_perturbation_ascends_the_same_loss() -> None:
    """In the direction of the transcription's gradient; one update is counted once in the prior's sums."""
    batch, model, prior, gamma = make_batch(), moved_network(1), some_prior(), 0.01
    reference = copy.deepcopy(model)
    step = train_step(Ikl(IklOptions()), model, None, awp=gamma)
    step.method.buffers["prior"].copy_(prior)
    start = drawn_start(batch.x, "gaussian")
    step(batch)
    x_adv, _ = attack(reference, batch.x, start, kl_goal(reference, batch.x))
    proxy = copy.deepcopy(reference)
    labels, weights = one_hot(batch.labels), prior[batch.labels]
    transcribed_loss(proxy(batch.x), proxy(x_adv), labels, weights).backward()
    moves = {}
    with torch.no_grad():
        for (name, p), q in zip(reference.named_parameters(), proxy.parameters(), strict=True):
            if p.dim() >= 2:
                assert q.grad is not None
                moves[name] = gamma * p.norm() * q.grad / q.grad.norm()
                p += moves[name]
    adv = reference(x_adv)
    clean = reference(batch.x)
    transcribed_loss(clean, adv, labels, weights).backward()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name in moves:
                p -= moves[name]
    assert_same_step(model, reference)
    torch.testing.assert_close(step.method.buffers["sums"], sums_of(clean, batch.labels))


def test_the_prior_of_an_epoch_is_the_mean_prediction_of_the_one_before() -> None:
    batch, method = make_batch(), Ikl(IklOptions())
    labels = batch.labels.clamp_max(K - 2)  # no image of the last class
    model = moved_network(1)
    step = train_step(method, model, None)
    step.start_epoch(0)
    assert torch.equal(method.buffers["prior"], torch.full((K, K), 1 / K, dtype=torch.float64))
    expected = torch.zeros(K, K, dtype=torch.float64)
    for rows in (slice(0, 5), slice(5, N)):
        twin = copy.deepcopy(model)
        expected += sums_of(twin(batch.x[rows]), labels[rows])
        step(Batch(batch.x[rows], labels[rows], batch.indices[rows]))
    assert torch.equal(method.buffers["prior"], torch.full((K, K), 1 / K, dtype=torch.float64))
    step.start_epoch(1)
    seen = labels.unique()
    torch.testing.assert_close(
        method.buffers["prior"][seen], expected[seen] / expected[seen].sum(1, keepdim=True)
    )
    assert torch.equal(method.buffers["prior"][K - 1], torch.full((K,), 1 / K, dtype=torch.float64))
    assert not method.buffers["sums"].any()


def test_a_resumed_epoch_goes_on_with_its_sums() -> None:
    batch, model = make_batch(), moved_network(1)
    step = train_step(Ikl(IklOptions()), model, None)
    for epoch in (0, 1):
        step.start_epoch(epoch)
        step(batch)
    saved = {name: tensor.clone() for name, tensor in step.method.buffers.items()}
    resumed = train_step(Ikl(IklOptions()), copy.deepcopy(model), None)
    for name, tensor in resumed.method.buffers.items():
        tensor.copy_(saved[name])
    resumed.start_epoch(1)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in resumed.method.buffers.items())
    assert float(saved["sums"].sum()) == pytest.approx(N)


def test_mixed_labels_weigh_by_their_classes() -> None:
    """The prior of a mixed image is the mixture of its classes' priors, and so is its share in the sums."""
    batch, prior = make_batch(), some_prior()
    other = (batch.labels + 1) % K
    mixed = 0.75 * one_hot(batch.labels) + 0.25 * one_hot(other)
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = step_with_prior(model, prior)
    start = drawn_start(batch.x, "gaussian")
    logs = step(Batch(batch.x, batch.labels, batch.indices, mixed=mixed))
    x_adv, _ = attack(reference, batch.x, start, kl_goal(reference, batch.x))
    adv, clean = reference(x_adv), reference(batch.x)
    loss = transcribed_loss(clean, adv, mixed, 0.75 * prior[batch.labels] + 0.25 * prior[other])
    loss.backward()
    torch.testing.assert_close(logs["loss"], loss.detach())
    assert_same_step(model, reference)
    wanted = 0.75 * sums_of(clean, batch.labels) + 0.25 * sums_of(clean, other)
    torch.testing.assert_close(step.method.buffers["sums"], wanted)


@pytest.mark.parametrize("gap", [150.0, 1000.0])
def test_certain_logits_have_finite_losses_and_gradients(gap: float) -> None:
    method = Ikl(IklOptions())
    method.num_classes = K
    method.buffers = method.make_buffers(torch.zeros(2, 3, 8, 8))
    clean, adv = (
        (gap * torch.eye(K)[rows]).requires_grad_() for rows in (torch.tensor([0, 1]), torch.tensor([0, 2]))
    )
    batch = Batch(torch.rand(2, 3, 8, 8), torch.tensor([0, 3]), torch.arange(2))
    loss = method.loss(clean, adv, batch)
    assert loss.dtype == torch.float32
    assert all(bool(g.isfinite().all()) for g in (loss, *torch.autograd.grad(loss, (clean, adv))))


def test_options_are_checked() -> None:
    for bad, message in (
        ({"mse_weight": -1.0}, "mse_weight must be >= 0, got -1"),
        ({"soft_weight": math.nan}, "soft_weight must be >= 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            Ikl(IklOptions(**bad))  # type: ignore[arg-type]


def test_temperature_without_its_weight_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "ikl", "--mse-weight", "0", "--temperature", "2"]) == 2
    assert "--temperature has no effect: needs --mse-weight above 0" in capsys.readouterr().err
