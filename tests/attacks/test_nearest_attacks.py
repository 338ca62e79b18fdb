"""Nearest-adversarial attacks: float64 transcriptions, analytic distances and other libraries."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attacks import Attack, CarliniL2, DeepFool, Nearest, SigmaZero, parse_attack
from fastdynat.attacks.nearest import margin_goal
from fastdynat.data import ImageSet
from fastdynat.errors import UserError
from fastdynat.evaluation import measure
from fastdynat.evaluation.measure import attacked
from fastdynat.evaluation.outcome import unpack_bits

SEARCHES: list[Attack] = [
    CarliniL2(binary_steps=3, steps=20, c=0.1),
    DeepFool(),
    DeepFool(norm="linf"),
    SigmaZero(steps=40),
]


def frozen(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    return tiny_cnn(seed, dtype=dtype).eval().requires_grad_(False)


def images(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Away from 0 and 1, where others' tanh space ends."""
    return 0.1 + 0.8 * torch.rand(n, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def labelled(net: nn.Module, x: Tensor, wrong: int = 0) -> Tensor:
    """The network's own classes, so that there is something to attack; the first `wrong` ones changed."""
    labels = net(x).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 10
    return labels


def carlini_of_one(net: nn.Module, x: Tensor, label: int, s: CarliniL2, targeted: bool) -> float:
    """The paper's algorithm on one image (1, C, H, W), with torch.optim and autograd: the least distance."""
    best, c, lower, upper = math.inf, s.c, 0.0, math.inf
    for _ in range(s.binary_steps):
        w = torch.atanh((2 * x - 1).clamp(-0.999999, 0.999999)).requires_grad_()
        optimizer, hit, looked = torch.optim.Adam([w], lr=s.lr), False, math.inf
        for i in range(s.steps):
            x_adv = (w.tanh() + 1) / 2
            z = net(x_adv)[0]
            rival = torch.cat((z[:label], z[label + 1 :])).max()
            value = z[label] - rival if targeted else rival - z[label]
            squared = (x_adv - x).square().sum()
            loss = squared + c * (s.kappa - value).clamp_min(0)
            if value > s.kappa:
                hit, best = True, min(best, squared.item() ** 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if s.abort and (i + 1) % (s.steps // 10) == 0:
                if loss.item() > 0.9999 * looked:
                    break
                looked = loss.item()
        lower, upper = (lower, min(upper, c)) if hit else (max(lower, c), upper)
        c = (lower + upper) / 2 if upper < math.inf else 10 * c
    return best


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("kappa", "abort"), [(0.0, True), (0.0, False), (0.05, True)])
def test_carlini_is_the_published_algorithm_image_by_image(kappa: float, abort: bool, targeted: bool) -> None:
    net, x = frozen(), images(5)
    labels = labelled(net, x)
    labels = (labels + 3) % 10 if targeted else labels
    search = CarliniL2(binary_steps=4, steps=30, c=0.01, kappa=kappa, abort=abort)
    found = search.run(Ascent(net), x, margin_goal(labels, targeted))
    expected = [carlini_of_one(net, x[i : i + 1], int(labels[i]), search, targeted) for i in range(len(x))]
    torch.testing.assert_close(found.distance, torch.tensor(expected, dtype=x.dtype), rtol=1e-7, atol=0)
    assert found.found.any()


def hyperplane(classes: int, n: int = 6) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Linear classes, images, labels and normals: planes near enough that no pixel is clipped."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).double()
    x = 0.2 + 0.6 * torch.rand(n, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)  # type: ignore[union-attr]
    net.requires_grad_(False)
    return net, x, net(x).argmax(1), net[1].weight  # type: ignore[return-value]


def analytic(net: nn.Module, x: Tensor, labels: Tensor, weight: Tensor, dual: float) -> Tensor:
    z = net(x)
    gaps = z.gather(1, labels[:, None]) - z
    normals = torch.linalg.vector_norm(weight[labels][:, None] - weight[None], dual, dim=2)
    return torch.where(normals > 0, gaps / normals, math.inf).amin(1)


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("linf", 1.0)])
def test_deepfool_finds_the_analytic_distance_of_linear_classes(norm: str, dual: float) -> None:
    net, x, labels, weight = hyperplane(4)
    found = DeepFool(norm=norm, overshoot=1e-6)(Ascent(net), x, labels)
    assert found.found.all()
    torch.testing.assert_close(found.distance, analytic(net, x, labels, weight, dual), rtol=1e-5, atol=2e-4)
    assert (net(found.x_adv).argmax(1) != labels).all()


def test_carlini_comes_near_the_analytic_distance_of_linear_classes() -> None:
    net, x, labels, weight = hyperplane(
        2
    )  # with more, the class of the next higher logit need not have the nearest plane
    found = CarliniL2(binary_steps=6, steps=300, c=0.1, lr=0.003)(Ascent(net), x, labels)
    least = analytic(net, x, labels, weight, 2.0)
    assert (found.distance >= least * (1 - 1e-9)).all()
    torch.testing.assert_close(found.distance, least, rtol=0.02, atol=1e-3)


def test_sigma_zero_finds_the_fewest_pixels_of_linear_classes() -> None:
    """Two classes, one channel: as many pixels as must move to their end, the most telling first."""
    torch.manual_seed(1)
    weight = torch.randn(1, 48, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double().requires_grad_(False)
    x = torch.rand(8, 1, 6, 8, dtype=torch.float64)
    net[1].weight.copy_(torch.cat((weight, -weight)) / 2)  # type: ignore[operator]
    net[1].bias.zero_()  # type: ignore[operator]
    labels = net(x).argmax(1)
    value = (x.flatten(1) @ weight[0]).abs()
    sign = 1 - 2 * labels[:, None].double()
    gains = (
        torch.maximum(sign * weight * x.flatten(1), sign * weight * (x.flatten(1) - 1))
        .sort(1, descending=True)
        .values
    )
    fewest = (gains.cumsum(1) <= value[:, None]).sum(1) + 1
    found = SigmaZero(steps=300)(Ascent(net), x, labels)
    assert found.found.all()
    assert torch.equal(found.distance, (found.x_adv != x).flatten(1).sum(1).double())
    assert (found.distance >= fewest).all()
    assert float((found.distance - fewest).mean()) <= 1


@given(n=st.integers(1, 9), wrong=st.integers(0, 9), seed=st.integers(0, 5), which=st.sampled_from(SEARCHES))
@settings(deadline=None, max_examples=25)
def test_an_image_is_attacked_as_if_it_were_alone(n: int, wrong: int, seed: int, which: Attack) -> None:
    """So taking others out of the batch changes nothing, nor does their being there."""
    net, x = frozen(), images(n, seed)
    labels = labelled(net, x, wrong)
    together = which(Ascent(net), x, labels)
    assert isinstance(together, Nearest)
    alone = [which(Ascent(net), x[i : i + 1], labels[i : i + 1]) for i in range(n)]
    torch.testing.assert_close(together.x_adv, torch.cat([r.x_adv for r in alone]), rtol=0, atol=1e-7)
    assert together.gradients == sum(r.gradients for r in alone)
    check_contract(net, x, labels, together, which.norm)


def tied_below(x: Tensor) -> Tensor:
    """Three logits; those of classes 0 and 1 are equal up to a mean of 0.4, where class 0 is predicted."""
    rest = F.relu(x.mean((1, 2, 3)) - 0.4)
    return torch.stack((torch.zeros_like(rest), rest, torch.full_like(rest, -1)), 1)


def crossing_below(x: Tensor) -> Tensor:
    """A replica of `tied_below` whose logits cross where those are equal."""
    gap = x.mean((1, 2, 3)) - 0.4
    return torch.stack((torch.zeros_like(gap), gap, torch.full_like(gap, -1)), 1)


@pytest.mark.parametrize("replica", [True, False])
@pytest.mark.parametrize("name", ["deepfool", "deepfool-linf", "cwl2-5x100", "sigmazero200"])
def test_logits_that_are_equal_are_judged_by_the_predicted_class(name: str, replica: bool) -> None:
    """No margin ever is above 0. The nearest image is that of the mean 0.4."""
    x = 0.45 + 0.3 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    ascent = Ascent(crossing_below, judge=tied_below, strict=True) if replica else Ascent(tied_below)
    search = parse_attack(name, eps=1, step_size=1).search
    found = search(ascent, x, torch.ones(6, dtype=torch.int64))
    assert isinstance(found, Nearest)
    assert bool(found.found.all())
    assert bool((tied_below(found.x_adv).argmax(1) == 0).all())
    gap = x.mean((1, 2, 3)) - 0.4
    if name != "sigmazero200":
        nearest = gap if name == "deepfool-linf" else 4 * gap  # 16 pixels
        assert bool((found.distance > 0.999 * nearest).all())
        assert bool((found.distance < 1.1 * nearest + 1e-3).all())


@pytest.mark.parametrize("index", [0, 2])
def test_a_targeted_attack_on_equal_logits_ends_at_the_target_only_if_it_is_predicted(index: int) -> None:
    def network(x: Tensor) -> Tensor:
        """The logit of class 1 falls to that of class `index`, and no further."""
        rest = F.relu(x.mean((1, 2, 3)) - 0.4)
        others = [torch.zeros_like(rest), torch.full_like(rest, -1)]
        low, high = others if index == 0 else others[::-1]
        return torch.stack((low, rest, high), 1)

    x = 0.45 + 0.3 * torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = SigmaZero(steps=200).run(Ascent(network), x, margin_goal(torch.full((4,), index), targeted=True))
    assert found.found.tolist() == [index == 0] * 4


def test_deepfool_finds_every_point_that_a_model_in_half_precision_misclassifies() -> None:
    """One image at a time: it is found exactly if the model answered another class than the label's."""
    half, n = torch.bfloat16, 80
    model, x = frozen(0, torch.float32).to(half), images(n, dtype=torch.float32)
    labels = model(x.to(half)).argmax(1)
    answers: list[int] = []

    def heard(z: Tensor) -> Tensor:
        logits = model(z)
        answers.extend(logits.argmax(1).tolist())
        return logits

    misclassified, search = [], DeepFool(steps=10)
    for i in range(n):
        answers.clear()
        search(Ascent(heard, Underflow(rescale=True), half), x[i : i + 1], labels[i : i + 1])
        misclassified.append(any(answer != int(labels[i]) for answer in answers))
    plain = search(Ascent(model, Underflow(rescale=True), half), x, labels)
    found = search(attacked(model, x), x, labels)
    assert isinstance(found, Nearest)
    assert plain.found.tolist() == found.found.tolist() == misclassified
    points = model(found.x_adv.to(half))
    top = points.topk(2).values
    assert bool((found.found & (top[:, 0] == top[:, 1])).any())  # a tie at one, or the test shows nothing


def test_sigma_zero_keeps_what_the_judge_accepted_when_an_image_is_finished() -> None:
    """The replica takes all images for misclassified. One pixel is enough for two, but not for the third."""
    weight = torch.full((1, 4, 4), 0.001)
    weight[0, 0, :2] = torch.tensor([1.0, 0.5])

    def judge(x: Tensor) -> Tensor:
        gap = (weight * x).sum((1, 2, 3)) - 0.3
        return torch.stack((torch.zeros_like(gap), gap), 1)

    x = torch.full((3, 1, 4, 4), 0.5)
    x[:2, 0, 0, :2], x[2, 0, 0, :2] = torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.6])
    ascent = Ascent(lambda z: judge(z) + torch.tensor([100.0, 0.0]), judge=judge, strict=True)
    found = SigmaZero(steps=200)(ascent, x, torch.ones(3, dtype=torch.int64))
    assert found.distance.tolist() == [1, 1, 2]
    assert bool((judge(found.x_adv).argmax(1) == 0).all())


def test_images_that_are_finished_are_asked_about_no_more() -> None:
    """Three of four are misclassified from the start on; the judge of the fourth hears of no other."""
    asked: list[int] = []

    def judge(x: Tensor) -> Tensor:
        asked.append(len(x))
        return tied_below(x)

    x, labels = torch.full((4, 1, 4, 4), 0.7), torch.tensor([0, 0, 0, 1])
    DeepFool()(Ascent(crossing_below, judge=judge, strict=True), x, labels)
    assert asked[0] == 3  # the clean images that the replica misclassifies
    assert set(asked[1:]) == {1}


def changed_pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv != x).any(1).flatten(1).sum(1).to(x.dtype)


def check_contract(net: nn.Module, x: Tensor, labels: Tensor, r: Nearest, norm: str) -> None:
    moved = (r.x_adv - x).flatten(1)
    lengths = {"l2": moved.norm(dim=1), "linf": moved.abs().amax(1), "l0": changed_pixels(r.x_adv, x)}[norm]
    assert torch.equal(net(r.x_adv).argmax(1) != labels, r.found)
    torch.testing.assert_close(torch.where(r.found, r.distance, 0), lengths, rtol=0, atol=1e-12)
    assert torch.equal(r.distance.isfinite(), r.found)
    assert (r.distance[net(x).argmax(1) != labels] == 0).all()
    assert 0 <= float(r.x_adv.min()) <= float(r.x_adv.max()) <= 1


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__ + s.norm)
def test_misclassified_images_cost_nothing_and_no_weight_gets_a_gradient(search: Attack) -> None:
    net, x = tiny_cnn(dtype=torch.float64).eval(), images(4)
    labels = labelled(net, x, wrong=4)
    assert search(AttackEngine(net, x[:2]).ascent, x, labels).gradients == 0
    search(AttackEngine(net, x[:2]).ascent, x, labelled(net, x))
    assert all(p.grad is None for p in net.parameters())


def test_the_fast_replica_finds_what_the_network_itself_gives() -> None:
    net, x = frozen(dtype=torch.float32), images(8, dtype=torch.float32)
    labels = labelled(net, x)
    for search in (CarliniL2(binary_steps=3, steps=20, c=0.1), DeepFool()):
        ours, plain = (search(a, x, labels).distance for a in (AttackEngine(net, x[:2]).ascent, Ascent(net)))
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def test_deepfool_needs_only_the_likely_classes() -> None:
    net, x = frozen(), images(6)
    labels = labelled(net, x)
    calls = DeepFool(classes=3)(Ascent(net), x, labels), DeepFool()(Ascent(net), x, labels)
    assert calls[0].gradients < calls[1].gradients / 2
    assert (calls[0].distance >= calls[1].distance * 0.8).all()


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes of the CPU allocator that `call` holds at once."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as trace:
        call()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_sparse_attack_takes_memory_for_a_few_batches_of_images() -> None:
    for side in (8, 16, 32):
        torch.manual_seed(0)
        net, x = frozen(dtype=torch.float32), torch.rand(16, 3, side, side)
        labels = labelled(net, x)
        peak = peak_of(lambda: SigmaZero(steps=3)(Ascent(net), x, labels))  # noqa: B023
        network = peak_of(lambda: Ascent(net).value_and_grad(x, lambda z: (z, z)))  # noqa: B023
        # A saliency map of pairs would take 3 * side^2 batches.
        assert 4 * x.nbytes < peak < network + 14 * x.nbytes + 2**16


def test_a_verdict_is_about_the_ball() -> None:
    net, x = frozen(dtype=torch.float32), images(40, dtype=torch.float32)
    data = ImageSet((255 * x).round().to(torch.uint8), labelled(net, x, wrong=5))
    every = measure(
        net,
        data,
        parse_attack("deepfool", eps=0.1, step_size=0.1),
        device=torch.device("cpu"),
        batch_size=16,
        seed=0,
    )
    distances = [math.inf if d is None else d for d in every.distances or []]
    eps = sorted(distances)[20]
    ball = parse_attack("deepfool", eps=eps, step_size=0.1, norm="l2")
    inside = measure(net, data, ball, device=torch.device("cpu"), batch_size=16, seed=0)
    robust = torch.tensor([d > eps for d in distances])
    assert torch.equal(unpack_bits(inside.robust_bits, 40), robust)
    assert every.accuracy == 0 < inside.accuracy < 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cwl2", CarliniL2(eps=0.5)),
        ("cwl2-5x200", CarliniL2(binary_steps=5, steps=200, eps=0.5)),
        ("cwl2-1x50", CarliniL2(binary_steps=1, steps=50, c=1.0, abort=False, eps=0.5)),
        ("deepfool", DeepFool(eps=0.5)),
        ("deepfool20", DeepFool(steps=20, eps=0.5)),
        ("deepfool-linf", DeepFool(norm="linf")),
        ("sigmazero100", SigmaZero(steps=100)),
    ],
)
def test_names(name: str, expected: Attack) -> None:
    assert parse_attack(name, eps=0.5, step_size=0.1, norm="l2").search == expected


@pytest.mark.parametrize(
    "name", ["cwl2-0x10", "cwl2-2x15", "deepfool0", "sigmazero0", "deepfool-2x10", "cwl250"]
)
def test_wrong_names(name: str) -> None:
    with pytest.raises(UserError):
        parse_attack(name, eps=0.5, step_size=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CarliniL2(c=0),
        lambda: CarliniL2(kappa=-1),
        lambda: DeepFool(norm="l1"),
        lambda: DeepFool(classes=1),
        lambda: DeepFool(overshoot=-0.1),
        lambda: SigmaZero(sigma=0),
    ],
)
def test_wrong_numbers(make: Callable[[], Attack]) -> None:
    with pytest.raises(UserError):
        make()


class Positive(nn.Module):
    """Logits above 0: torchattacks sets the label's logit to 0, which hides rivals with negative ones."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 100


@pytest.mark.peer
@needs("torchattacks")
def test_carlini_equals_torchattacks() -> None:
    import torchattacks

    net, x = Positive(frozen()).eval(), images(12)
    labels, calls = labelled(net, x), []
    net.register_forward_hook(lambda *_: calls.append(1))
    theirs = torchattacks.CW(net, c=1, steps=20, lr=0.01)(x, labels)
    assert len(calls) == 20, "torchattacks gave up on the whole batch"
    ours = CarliniL2(binary_steps=1, steps=20, c=1, abort=False)(Ascent(net), x, labels)
    assert ours.found.any()
    torch.testing.assert_close(ours.x_adv, theirs, rtol=0, atol=1e-5)


@pytest.mark.peer
@needs("torchattacks")
def test_deepfool_equals_torchattacks() -> None:
    import torchattacks

    net, x = frozen(), images(12)
    labels = labelled(net, x, wrong=2)
    theirs = torchattacks.DeepFool(net, steps=50, overshoot=0.02)(x, labels)
    ours = DeepFool()(Ascent(net), x, labels)
    assert ours.found.all()
    assert torch.equal(net(ours.x_adv).argmax(1), net(theirs).argmax(1))
    torch.testing.assert_close(ours.x_adv, theirs, rtol=0, atol=1e-6)


@pytest.mark.peer
@needs("foolbox")
@pytest.mark.filterwarnings("ignore")
def test_no_farther_than_foolbox() -> None:
    import foolbox

    net, x = frozen(dtype=torch.float32), images(12, dtype=torch.float32)
    labels = labelled(net, x)
    wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    pairs = [
        (foolbox.attacks.L2DeepFoolAttack(candidates=10), DeepFool(), 1.02),
        (
            foolbox.attacks.L2CarliniWagnerAttack(6, 100, initial_const=0.1),
            CarliniL2(binary_steps=6, steps=100, c=0.1),
            1.01,
        ),
    ]
    for theirs, ours, factor in pairs:
        _, theirs_adv, success = theirs(wrapped, x, labels, epsilons=None)
        found = ours(Ascent(net), x, labels)
        assert success.all()
        assert found.found.all()
        assert float(found.distance.mean()) <= factor * float((theirs_adv - x).flatten(1).norm(dim=1).mean())
