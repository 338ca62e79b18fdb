"""A replica's rounding decides no verdict: where its logits nearly tie, the network itself does."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import TIE, Ascent, Underflow
from fastdynat.attack_engine.network_modes import NotCopyable
from fastdynat.attacks import parse_attack
from fastdynat.evaluation.measure import _judged, attacked

N, EPS = 12, 0.01
NAMES = ("apgd-ce8", "apgd-t8", "fab-t", "square200")


class Shifted(nn.Module):
    """Logits moved by less than a tie, for or against the class that is largest in `network`'s own."""

    def __init__(self, network: nn.Module, share: float, seed: int) -> None:
        super().__init__()
        self.network, self.share, self.seed = network, share, seed

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        noise = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(self.seed)) - 0.5
        return logits + self.share * (logits.amax(1) - logits.amin(1))[:, None].detach() * noise.to(logits)


def networks(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = tiny_cnn(seed, dtype=torch.float64).eval().requires_grad_(False)
    x = torch.rand(N, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return model, x, model(x).argmax(1)


@given(
    seed=st.integers(0, 50), noise=st.integers(0, 50), share=st.floats(0.05, 0.9), index=st.integers(0, N - 1)
)
@settings(max_examples=40, deadline=None)
def test_a_pass_that_errs_within_a_tie_misclassifies_as_the_network_does(
    seed: int, noise: int, share: float, index: int
) -> None:
    """At points on the way between two images, some of them on the decision boundary."""
    model, x, labels = networks(seed)
    ascent = Ascent(Shifted(model, share * TIE, noise), judge=model)
    low, high = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    other = x[index]
    for _ in range(40):  # towards the boundary, where there is one on the way
        at = ((low + high) / 2).view(-1, 1, 1, 1)
        z = torch.lerp(x, other.expand_as(x), at)
        wrong = model(z).argmax(1) != labels
        assert torch.equal(ascent.settle_ties(z, ascent.logits(z), labels), wrong)
        low, high = torch.where(wrong, low, at.flatten()), torch.where(wrong, at.flatten(), high)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", [0, 1])
def test_an_attack_on_a_pass_that_errs_breaks_what_the_plain_attack_breaks(name: str, noise: int) -> None:
    """Judged by the network, whose logits the pass misses by almost a tie."""
    model, x, labels = networks(3)
    search: Any = parse_attack(name, eps=EPS, step_size=EPS / 4).search
    fell = []
    for network in (Shifted(model, 0.9 * TIE, noise), model):
        ascent = Ascent(network, judge=model, allow_no_gradient=True)
        found = search(ascent, x, labels, generator=torch.Generator().manual_seed(1)).x_adv
        fell.append(model(found).argmax(1) != labels)
    assert torch.equal(*fell)
    assert 0 < int(fell[0].sum()) < N


@pytest.mark.parametrize("name", ["deepfool", "deepfool-linf", "cwl2-3x50", "sigmazero50"])
@pytest.mark.parametrize("noise", [0, 1, 2])
def test_a_nearest_image_of_a_pass_that_errs_is_one_of_the_network(name: str, noise: int) -> None:
    """A point that only the pass misclassifies would end the search, and the network not be fooled."""
    model, x, labels = networks(3)
    search: Any = parse_attack(name, eps=EPS, step_size=EPS / 4).search
    distances = []
    for network in (Shifted(model, 0.9 * TIE, noise), model):
        found = search(Ascent(network, judge=model, allow_no_gradient=True), x, labels)
        distances.append(_judged(model, labels, torch.ones_like(found.found), found))
    assert bool(distances[1].isfinite().any())
    assert bool(distances[0][distances[1].isfinite()].isfinite().all())


def test_logits_that_are_nan_are_never_right() -> None:
    """Of the network and of the replica: the first class would be the arg-max of a row of NaN."""
    labels = torch.zeros(3, dtype=torch.int64)
    good = torch.tensor([[5.0, 0.0, 1.0]]).expand(3, -1)
    bad = good.clone()
    bad[1] = torch.nan
    bad[2, 0] = torch.inf
    x = torch.rand(3, 3, 8, 8)
    wrong = torch.tensor([False, True, True])
    assert torch.equal(Ascent(lambda x: bad).settle_ties(x, bad, labels), wrong)
    near = torch.zeros_like(good)  # ties: the judge decides
    assert torch.equal(Ascent(lambda x: near, judge=lambda x: bad).settle_ties(x, near, labels), wrong)
    assert not Ascent(lambda x: near, judge=lambda x: good[: len(x)]).settle_ties(x, bad, labels).any()


def test_the_judge_is_in_eval_mode_whatever_the_network_is_in() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3))
    x = torch.rand(N, 3, 8, 8)
    network(x)
    want = network.eval()(x)
    judge = attacked(network.train(), x).judge
    assert judge is not None
    with torch.no_grad():
        torch.testing.assert_close(judge(x), want)
    assert network[2].training
    assert network[2].num_batches_tracked == 1


def test_clean_images_on_the_boundary_are_attacked() -> None:
    """The replica alone would take them for misclassified and leave them robust."""
    model, x, labels = networks(3)
    low, high = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    other = x.roll(1, 0)
    for _ in range(50):
        at = ((low + high) / 2).view(-1, 1, 1, 1)
        wrong = model(torch.lerp(x, other, at)).argmax(1) != labels
        low, high = torch.where(wrong, low, at.flatten()), torch.where(wrong, at.flatten(), high)
    z = torch.lerp(x, other, low.view(-1, 1, 1, 1))
    # Of the two classes that tie at each image, the other one is preferred.
    second = model(z).topk(2).indices
    rival = torch.where(second[:, 0] == labels, second[:, 1], second[:, 0])

    def erring(images: Tensor) -> Tensor:
        logits = model(images)
        return (
            logits + 1e-9 * nn.functional.one_hot(rival, logits.shape[1]).to(logits)
            if len(images) == N
            else logits
        )

    tied = (model(z).argmax(1) == labels) & (erring(z).argmax(1) != labels)
    assert int(tied.sum()) >= 4
    for name in ("apgd-ce8", "apgd-t8", "fab-t"):
        search: Any = parse_attack(name, eps=EPS, step_size=EPS / 4).search
        found = search(
            Ascent(erring, judge=model, allow_no_gradient=True),
            z,
            labels,
            generator=torch.Generator().manual_seed(1),
        )
        assert bool((model(found.x_adv).argmax(1) != labels)[tied].all())
        assert int(found.zero_grads) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_half_precision_is_asked_itself(name: str, dtype: torch.dtype) -> None:
    """Its replica with folded batch norm rounds otherwise, by more than a tie."""
    model, x = tiny_cnn(3).eval().requires_grad_(False), torch.rand(4 * N, 3, 8, 8)
    for norm in model.modules():  # large means, which folding moves into a bias
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            norm.running_mean += 4 * torch.randn(8, generator=torch.Generator().manual_seed(0))
            assert model[0].bias is not None
            model[0].bias += norm.running_mean
    model = model.to(dtype)
    labels = model(x.to(dtype)).argmax(1)
    search: Any = parse_attack(name, eps=0.05, step_size=0.01).search
    fell = []
    for ascent in (attacked(model, x), Ascent(model, Underflow(rescale=True), dtype)):
        found = search(ascent, x, labels, generator=torch.Generator().manual_seed(1)).x_adv
        fell.append(model(found.to(dtype)).argmax(1) != labels)
    assert torch.equal(*fell)
    assert int(fell[0].sum()) > 0


def test_a_replica_that_errs_by_more_than_a_tie_ends_no_attack() -> None:
    """It takes every image for misclassified from the start on."""
    model, x, labels = networks(3)
    lost = nn.functional.one_hot((labels + 1) % 10, 10).to(x)
    for name in ("apgd-ce8", "fab-t"):
        search: Any = parse_attack(name, eps=0.05, step_size=0.01).search
        fell = []
        for network in (model, lambda z: model(z) + 100 * lost[: len(z)]):
            ascent = Ascent(network, judge=model, strict=True, allow_no_gradient=True)
            found = search(ascent, x, labels, generator=torch.Generator().manual_seed(1)).x_adv
            fell.append(int((model(found).argmax(1) != labels).sum()))
        assert min(fell) > 0


@pytest.mark.parametrize("replica", [True, False])
def test_an_attack_in_half_precision_is_judged_in_full(
    replica: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = tiny_cnn(3).eval(), torch.rand(N, 3, 8, 8)
    if not replica:

        def refuse(*_: Any, **__: Any) -> Any:
            raise NotCopyable("a test")

        monkeypatch.setattr(sys.modules[attacked.__module__], "AttackEngine", refuse)
    ascent = attacked(model, x, torch.bfloat16)
    assert ascent.strict
    assert ascent.judge is not None
    assert torch.equal(ascent.judge(x), model(x))
    plain = attacked(model, x)
    assert not plain.strict
    assert (plain.judge is not None) == replica
