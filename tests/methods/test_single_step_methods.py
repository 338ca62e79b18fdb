"""FGSM-RS, N-FGSM, Free and VAT: one step against float64 transcriptions of the formulas, and limits."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graph_sim import SimulatedRecorder
from support.stepping import (
    EPS,
    LR,
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
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.data import UNLABELLED, Batch, open_train
from fastdynat.errors import UserError
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.methods import (
    Free,
    FreeOptions,
    Madry,
    MadryOptions,
    NFgsm,
    NFgsmOptions,
    Vat,
    VatOptions,
    method_class,
)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def update(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    """The gradients of the plain cross-entropy in train mode, left in .grad; returns the loss."""
    log_probs = torch.log_softmax(model.train()(x_adv), 1)
    loss = sum(-log_probs[i, y[i]] for i in range(N)) / N
    loss.backward()
    return loss.detach()


def ce_sign(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    loss = -torch.log_softmax(model.eval()(x), 1)[torch.arange(N), y].sum()
    return torch.autograd.grad(loss, x)[0].sign()


def test_fgsm_rs_is_one_clipped_step_of_five_quarters_eps(batch: Batch) -> None:
    method = method_class("fgsm_rs")(method_class("fgsm_rs").options_type())
    ours = method.attack_defaults
    assert (ours.start, ours.steps, ours.step_ratio) == ("uniform", 1, 1.25)
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = train_step(method, model, None, spec=PGDSpec(EPS, ours.step_ratio * EPS, 1, start=ours.start))
    start = drawn_start(batch.x, "uniform")
    logs = step(batch)

    x_adv = start + 1.25 * EPS * ce_sign(reference, start, batch.labels)
    x_adv = torch.minimum(torch.maximum(x_adv, batch.x - EPS), batch.x + EPS).clamp(0, 1)
    torch.testing.assert_close(logs["loss"], update(reference, x_adv, batch.labels))
    assert_same_step(model, reference)


def test_n_fgsm_leaves_the_ball(batch: Batch) -> None:
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = train_step(NFgsm(NFgsmOptions(noise=2.0)), model, None, spec=PGDSpec(EPS, EPS, 1))
    start = drawn_start(batch.x, "uniform", eps=2 * EPS)
    logs = step(batch)

    x_adv = (start + EPS * ce_sign(reference, start, batch.labels)).clamp(0, 1)
    assert float((x_adv - batch.x).abs().max()) > 2 * EPS
    torch.testing.assert_close(logs["loss"], update(reference, x_adv, batch.labels))
    assert_same_step(model, reference)


def test_n_fgsm_at_a_large_radius_is_clipped_to_the_image_range_only(batch: Batch) -> None:
    """(k + 1) eps above 1 would be no valid radius; the box alone bounds the step then."""
    model = moved_network(1)
    logs = train_step(NFgsm(NFgsmOptions(noise=3.0)), model, None, spec=PGDSpec(0.4, 0.4, 1))(batch)
    assert bool(logs["loss"].isfinite())


def reference_free(model: nn.Module, batches: list[Batch], replays: int) -> Tensor:
    """Wong et al.'s train_free loop, with its clamps; delta goes on from batch to batch."""
    delta = torch.zeros(N, 3, 8, 8, dtype=torch.float64)
    for batch in batches:
        n = len(batch.x)
        for _ in range(replays):
            x_adv = (batch.x + delta[:n]).clamp(0, 1).requires_grad_()
            loss = -torch.log_softmax(model.train()(x_adv), 1)[torch.arange(n), batch.labels].mean()
            grads = torch.autograd.grad(loss, [x_adv, *model.parameters()])
            new = (x_adv.detach() - batch.x + EPS * grads[0].sign()).clamp(-EPS, EPS)
            delta[:n] = (batch.x + new).clamp(0, 1) - batch.x
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads[1:], strict=True):
                    p -= LR * g
    return delta


def test_free_updates_weights_and_perturbation_from_one_pass(batch: Batch) -> None:
    other = Batch(batch.x.flip(0)[:5], batch.labels.flip(0)[:5], batch.indices[:5])
    model = moved_network(1)
    reference = copy.deepcopy(model)
    method = Free(FreeOptions(replays=3))
    step = train_step(method, model, None, spec=PGDSpec(EPS, EPS, 1, start="none"))
    for b in (batch, other, batch):
        step(b)
    delta = reference_free(reference, [batch, other, batch], 3)
    torch.testing.assert_close(method.buffers["delta"], delta)
    assert 0 < float(delta.abs().max()) <= EPS + 1e-12
    for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, 1), torch.log_softmax(q_logits, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def unmoved(model: nn.Module, x: Tensor) -> Tensor:
    """Train-mode logits of a copy: the same parameters, other running statistics."""
    twin = copy.deepcopy(model).train()
    return torch.func.functional_call(twin, dict(model.named_parameters()), (x,))


@pytest.mark.parametrize("hidden", [0, 3, N])
def test_vat_follows_the_power_method(batch: Batch, hidden: int) -> None:
    labels = batch.labels.clone()
    labels[:hidden] = UNLABELLED
    batch = Batch(batch.x, labels, batch.indices)
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = train_step(Vat(VatOptions(xi=0.01, power_iterations=2, vat_weight=3.0, radius=0.7)), model, None)
    torch.manual_seed(4)
    logs = step(batch)

    torch.manual_seed(4)
    d = torch.randn_like(batch.x)
    clean = reference.train()(batch.x)
    for _ in range(2):
        d = (d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).requires_grad_()
        # The gradient with respect to d is 0.01 times this one, which only the direction is taken of.
        d = torch.autograd.grad(kl(clean.detach(), unmoved(reference, batch.x + 0.01 * d)).sum(), d)[0]
    r = 0.7 * d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    log_probs = torch.log_softmax(clean, 1)
    own = [-log_probs[i, labels[i]] for i in range(N) if labels[i] >= 0]
    loss = (sum(own) / len(own) if own else 0.0) + 3.0 * kl(
        clean.detach(), unmoved(reference, batch.x + r)
    ).mean()
    loss.backward()
    torch.testing.assert_close(logs["loss"], loss.detach())
    if hidden < N:
        assert_same_step(model, reference)
    else:  # nothing but the divergence
        torch.testing.assert_close(model[0].weight.grad, reference[0].weight.grad)


def test_the_power_method_finds_the_direction_of_the_largest_curvature() -> None:
    """With many iterations the direction is the top eigenvector of the divergence's Hessian."""
    model = moved_network(1)
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    nets = train_step(Vat(VatOptions()), model, None).networks
    method = Vat(VatOptions(xi=1e-4, power_iterations=60, radius=1.0))
    batch = Batch(x, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    found = method.perturb(
        nets.views, batch, method.inner(nets.views, batch), Attacker(nets.attack, PGDSpec(1.0, 1.0, 1))
    )
    r = (found.x_adv - x).flatten()
    jacobian = torch.autograd.functional.jacobian(lambda x: unmoved(model, x), x).view(K, -1)
    p = unmoved(model, x).softmax(1)[0]
    fisher = jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian
    top = torch.linalg.eigh(fisher).eigenvectors[:, -1]
    assert abs(float(r.detach() @ top.detach())) == pytest.approx(1.0, abs=1e-4)


def test_vat_without_its_term_is_natural_training(batch: Batch) -> None:
    model = moved_network(1)
    reference = copy.deepcopy(model)
    train_step(Vat(VatOptions(vat_weight=0.0)), model, None)(batch)
    update(reference, batch.x, batch.labels)
    assert_same_step(model, reference)


def test_vat_by_pgd_attacks_the_divergence_under_linf(batch: Batch) -> None:
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = train_step(Vat(VatOptions(search="pgd")), model, None)
    x_adv = drawn_start(batch.x, "gaussian")
    logs = step(batch)
    spec = step.spec
    reference.eval()
    clean = reference(batch.x).detach()
    for _ in range(spec.steps):
        x_adv = x_adv.detach().requires_grad_()
        grad = torch.autograd.grad(kl(clean, reference(x_adv)).sum(), x_adv)[0]
        x_adv = x_adv.detach() + spec.step_size * grad.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, batch.x - EPS), batch.x + EPS).clamp(0, 1)
    logits = reference.train()(batch.x)
    loss = F.cross_entropy(logits, batch.labels) + kl(logits.detach(), unmoved(reference, x_adv)).mean()
    torch.testing.assert_close(logs["loss"], loss.detach())


def test_the_radius_of_vat_defaults_to_the_corners_of_the_ball() -> None:
    x = torch.zeros(1, 3, 4, 4)
    engine: Any = None
    for sizes, eps in ((None, 0.1), (torch.tensor([0.02, 0.1]), 0.02)):  # the run's, and those of a ramp
        linf = Attacker(engine, PGDSpec(0.1, 0.1, 1), sizes=sizes)
        assert float(Vat(VatOptions())._radius(linf, x)) == pytest.approx(eps * math.sqrt(48))
        l2 = Attacker(engine, PGDSpec(0.1, 0.1, 1, norm="l2"), sizes=sizes)
        assert float(Vat(VatOptions())._radius(l2, x)) == pytest.approx(eps)


@pytest.mark.parametrize("gap", [150.0, 1000.0])
def test_vat_is_finite_at_large_gaps(gap: float) -> None:
    model = tiny_network(1).float()
    with torch.no_grad():
        model[4].weight *= gap / float(model(torch.rand(4, 3, 8, 8)).std())
    batch = make_batch()
    step = train_step(Vat(VatOptions()), model, None, clip_grad=1.0)
    logs = step(Batch(batch.x.float(), batch.labels, batch.indices))
    assert all(bool(v.isfinite()) for v in logs.values())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


METHODS: dict[str, Any] = {
    "fgsm_rs": lambda: method_class("fgsm_rs")(method_class("fgsm_rs").options_type()),
    "n_fgsm": lambda: NFgsm(NFgsmOptions()),
    "free": lambda: Free(FreeOptions(replays=2)),
    "vat": lambda: Vat(VatOptions()),
    "vat-pgd": lambda: Vat(VatOptions(search="pgd")),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_captured_step_is_the_step(name: str, batch: Batch) -> None:
    spec = PGDSpec(EPS, EPS, 1, start=METHODS[name]().attack_defaults.start)
    results = []
    for recorder in (None, SimulatedRecorder()):
        model, method = moved_network(1), METHODS[name]()
        step = train_step(method, model, None, spec=spec, recorder=recorder)
        torch.manual_seed(2)
        for shift in range(WARM_UP_CALLS + 3):
            step(Batch(batch.x.roll(shift, 0), batch.labels.roll(shift, 0), batch.indices))
        results.append({**model.state_dict(), **method.buffers})
        assert recorder is None or recorder.captured == 1
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("name", ["fgsm_rs", "n_fgsm", "vat", "vat-pgd"])
def test_weight_perturbation_goes_around_them(name: str, batch: Batch) -> None:
    spec = PGDSpec(EPS, EPS, 1, start=METHODS[name]().attack_defaults.start)
    results = []
    for gamma in (0.0, 0.05):
        model = moved_network(1)
        torch.manual_seed(2)
        train_step(METHODS[name](), model, None, spec=spec, awp=gamma)(batch)
        results.append(model.state_dict())
    plain, moved = results
    assert not torch.equal(plain["0.weight"], moved["0.weight"])
    torch.testing.assert_close(plain["0.weight"], moved["0.weight"], rtol=0, atol=0.05)
    assert torch.equal(plain["1.num_batches_tracked"], moved["1.num_batches_tracked"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NFgsm(NFgsmOptions(noise=0.0)), "noise must be above 0"),
        (lambda: Free(FreeOptions(replays=0)), "replays must be >= 1"),
        (lambda: Vat(VatOptions(xi=0.0)), "xi must be above 0"),
        (lambda: Vat(VatOptions(radius=-1.0)), "radius must be above 0"),
        (lambda: Vat(VatOptions(power_iterations=0)), "power_iterations must be >= 1"),
        (lambda: Vat(VatOptions(vat_weight=math.nan)), "vat_weight must be >= 0"),
        (lambda: METHODS["fgsm_rs"]().check_attack(PGDSpec(0.1, 0.1, 7), "eval"), "fgsm_rs takes 1 step"),
        (
            lambda: METHODS["n_fgsm"]().check_attack(PGDSpec(0.1, 0.1, 1, norm="l2"), "eval"),
            "is a method for linf",
        ),
        (
            lambda: METHODS["n_fgsm"]().check_attack(PGDSpec(0.1, 0.1, 1, start="none"), "eval"),
            "uniform noise",
        ),
        (
            lambda: METHODS["free"]().check_attack(PGDSpec(0.1, 0.1, 10, start="none"), "eval"),
            "1 step per replay",
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_labels_are_hidden_class_by_class() -> None:
    all_labels = open_train("digits", None, val_size=None, seed=1).train_images().labels
    shown = open_train("digits", None, val_size=None, seed=1, labelled=100).train_images().labels
    kept = shown != UNLABELLED
    assert int(kept.sum()) == 100
    assert torch.equal(shown[kept], all_labels[kept])
    assert int(torch.bincount(shown[kept]).min()) >= 9


@pytest.mark.parametrize("labelled", [0, 10**6])
def test_a_number_of_labels_that_leaves_nothing_unlabelled_is_refused(labelled: int) -> None:
    with pytest.raises(UserError, match="leave --labelled out"):
        open_train("digits", None, val_size=None, seed=1, labelled=labelled)


def test_one_step_methods_are_madry_with_another_attack(batch: Batch) -> None:
    """FGSM-RS with PGD's numbers is Madry's step bit for bit."""
    results = []
    for method in (METHODS["fgsm_rs"](), Madry(MadryOptions())):
        model = moved_network(1)
        torch.manual_seed(2)
        train_step(method, model, None, start="uniform")(batch)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_less_than_a_label_for_each_class_is_refused() -> None:
    with pytest.raises(UserError, match="labelled 3 is less than one label for each of the 10 classes"):
        open_train("digits", None, val_size=None, seed=1, labelled=3)
