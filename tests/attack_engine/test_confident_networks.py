"""Networks whose logits are huge, tiny or far apart are attacked as those with usual ones are."""

import copy
from typing import Any

import pytest
import torch
from support.callers import net
from torch import Tensor, nn

from fastdynat import PGD, TPGD, trades_loss
from fastdynat.attack_engine.goal import AttackGoal, scaled_softmax_difference
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import APGD, CarliniL2, DeepFool, SigmaZero, parse_attack
from fastdynat.attacks.fab import FAB
from fastdynat.data import ImageSet
from fastdynat.evaluation import AutoAttack, measure
from fastdynat.evaluation.measure import attacked

CPU, N, EPS = torch.device("cpu"), 40, 0.03
REMEDY = r"\d+ of \d+ gradients were zero or not finite in every pixel: .* rescale=True"


class Scaled(nn.Module):
    """The logits of `inner`, times `scale`."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def task(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images of whole pixel values, and its predictions on them."""
    inner = net(3, dtype=dtype)
    images = torch.randint(256, (N, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(dtype) / 255
    return inner, images, inner(images).argmax(1)


def robust(model: nn.Module, x_adv: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x_adv).argmax(1) == y).double().mean())


@torch.no_grad()
def gaps(model: nn.Module, x: Tensor) -> Tensor:
    """By how much the largest logit leads, (N,)."""
    top = model(x).topk(2, 1).values
    return top[:, 0] - top[:, 1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_on_a_confident_network_is_that_of_float64(norm: str) -> None:
    """At gaps beyond what float32 holds, 104, where float64 still has all."""
    inner, x, y = task()
    scale = 150 / float(gaps(inner, x).median())
    loud, exact = Scaled(inner, scale), Scaled(copy.deepcopy(inner).double(), scale)
    chosen = (gaps(loud, x) > 110) & (gaps(loud, x) < 200)
    x, y = x[chosen], y[chosen]
    assert len(x) > 5
    eps = EPS if norm == "linf" else 0.3
    spec, goal = PGDSpec(eps, eps / 4, 1, norm=norm, start="none"), AttackGoal("ce", y)
    found = pgd(loud, x, goal, spec).x_adv
    right = pgd(exact, x.double(), goal, spec, rescale=False).x_adv
    assert (
        float(((found - right).abs() > 1e-4).double().mean()) < 0.002
    )  # signs of what is 0 but for rounding
    with pytest.warns(UserWarning, match=REMEDY):
        still = pgd(loud, x, goal, spec, rescale=False).x_adv
    assert torch.equal(still, x)


def test_accuracy_does_not_depend_on_the_scale() -> None:
    inner, x, y = task()
    images = ImageSet((x * 255).round().byte(), y)
    for name in ("pgd10", "cw10", "apgd-ce10", "apgd-t10", "fab-t"):
        attack = parse_attack(name, eps=EPS, step_size=EPS / 4)
        rates = []
        for scale in (1.0, 1000.0, 1e6):
            found = measure(Scaled(inner, scale), images, attack, device=CPU, batch_size=N, seed=0)
            rates.append(found.accuracy)
            assert found.zero_grad_share == 0, (name, scale)
        assert rates[0] < 0.8, name
        assert abs(rates[1] - rates[2]) <= 0.05, (name, rates)
        # The cross-entropy of small logits is about all classes, that of large ones about the next.
        low = -1.0 if name in ("apgd-ce10", "pgd10") else rates[0] - 0.05
        assert low <= rates[1] <= rates[0] + 0.05, (name, rates)


def test_autoattacks_verdicts_do_not_depend_on_the_scale() -> None:
    inner, x, y = task()
    verdicts = []
    for scale in (1.0, 2.0**10, 2.0**40):
        loud = Scaled(inner, scale)
        names = ["apgd-ce20", "apgd-t20", "fab-t"]
        attack = AutoAttack(loud, eps=EPS / 2, seed=1, version="custom", attacks=names, verbose=False)
        verdicts.append(loud(attack.run_standard_evaluation(x, y)).argmax(1) == y)
    assert 0 < int(verdicts[0].sum()) < N
    for other in verdicts[1:]:
        assert int((other != verdicts[0]).sum()) <= 1


def test_the_drop_in_attacks_tell_once_and_take_the_remedy() -> None:
    inner, x, y = task()
    loud = Scaled(inner, 1000 / float(gaps(inner, x).median()))
    plain = PGD(loud, eps=EPS, steps=5)
    with pytest.warns(UserWarning, match=REMEDY):
        still = plain(x, y)
    plain(x, y)  # a second warning would be an error
    assert robust(loud, still, y) > 0.8
    quiet = PGD(loud, eps=EPS, steps=5, rescale=True)(x, y)
    assert robust(loud, quiet, y) <= robust(inner, PGD(inner, eps=EPS, steps=5)(x, y), y) + 0.05
    assert robust(loud, TPGD(loud, eps=EPS, rescale=True)(x), y) < robust(loud, x, y)
    optimizer = torch.optim.SGD(loud.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=REMEDY):
        weak = trades_loss(loud, x, y, optimizer, epsilon=EPS, perturb_steps=5)
    strong = trades_loss(loud, x, y, optimizer, epsilon=EPS, perturb_steps=5, rescale=True)
    assert float(strong.detach()) > float(weak.detach())


def test_fp16_that_overflows_is_told_of() -> None:
    inner, x, y = task()
    with pytest.warns(UserWarning, match=r"gradients were zero or not finite .* amp=torch.bfloat16"):
        PGD(Scaled(inner, 1e6), eps=EPS, steps=2, amp=torch.float16, fold=False)(x, y)


def test_the_faint_difference_of_probabilities() -> None:
    """Against float64, at gaps that float64 still holds; signs, proportions and the sum."""
    z = torch.tensor([[300.0, 0.0, -20.0, -25.0], [400.0, 390.0, 10.0, 0.0], [5.0, 4.0, 3.0, 2.0]])
    other = z + torch.tensor([[0.0, 1.0, 1.0, -1.0], [0.0, 0.5, 3.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    p, q = z.double().softmax(1), other.double().softmax(1)
    exact = p - q
    exact[:2, 0] = -exact[:2, 1:].sum(1)  # where 1 - 1 is all that float64 has
    found, lost = scaled_softmax_difference(z, other.log_softmax(1))
    assert lost[:, 0].tolist() == [True, False, False]
    ratio = (found.double()[0] / exact[0])[:3]
    torch.testing.assert_close(ratio / ratio[0], torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)
    assert bool((ratio > 0).all())
    torch.testing.assert_close(found.sum(1), torch.zeros(3), rtol=0, atol=1e-6)


SCALES = (2.0**83, 2.0**-83)  # about 1e25 and 1e-25
SEARCHES: dict[str, Any] = {
    "deepfool": DeepFool(steps=20),
    "deepfool-linf": DeepFool(norm="linf", steps=20),
    "fab-t l2": FAB(eps=0.3, norm="l2", targets=3, nearest=True, steps=20),
    "fab l2": FAB(eps=0.3, norm="l2", nearest=True, steps=20),
    "fab-t linf": FAB(eps=0.03, targets=3, nearest=True, steps=20),
    "fab-t l1": FAB(eps=3.0, norm="l1", targets=3, nearest=True, steps=20),
    "cwl2": CarliniL2(binary_steps=5, steps=100),
    "sigmazero": SigmaZero(steps=100),
    "apgd-t l2": APGD(loss="dlr-t", eps=0.2, norm="l2", steps=10, targets=3),
    "apgd-dlr l2": APGD(loss="dlr", eps=0.2, norm="l2", steps=10),
    "apgd-ce linf": APGD(loss="ce", eps=0.03, steps=10),
}


@pytest.mark.filterwarnings("ignore:.* gradients were zero")
@pytest.mark.parametrize("scale", SCALES, ids=["1e25", "1e-25"])
@pytest.mark.parametrize("name", SEARCHES)
def test_searches_find_as_much_at_any_scale(name: str, scale: float) -> None:
    inner, x, y = task()
    found = []
    for model in (inner, Scaled(inner, scale)):
        result = SEARCHES[name](attacked(model, x), x, y, generator=torch.Generator().manual_seed(0))
        fell = inner(result.x_adv).argmax(1) != y
        distance = getattr(result, "distance", torch.where(fell, 0.0, 1.0))
        found.append((float(fell.double().mean()), float(distance[distance.isfinite()].median())))
    (share, distance), (other_share, other_distance) = found
    assert share > 0.3
    assert abs(share - other_share) <= (
        0.15 if name == "apgd-ce linf" else 0.05
    )  # the cross-entropy depends on the scale
    assert other_distance == pytest.approx(distance, rel=0.1, abs=1e-6)


def test_the_mean_of_random_answers_is_not_of_rescaled_gradients() -> None:
    """Draws keep their sizes: of two alternating networks, the one that is 2^10 times as steep decides."""

    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.calls = nn.Parameter(torch.randn(2, 10, 192)), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.flatten(1) @ self.weight[self.calls % 2].T * (1024.0 if self.calls % 2 else 1.0) / 2**12

    from fastdynat.attack_engine.ascent import Ascent, Underflow
    from fastdynat.attacks.apgd import _look

    model = Alternating()
    x, y = torch.rand(5, 3, 8, 8), torch.arange(5)
    target, spec = y, APGD(loss="ce", eps=EPS, eot=2)
    found = [
        _look(ascent, x, y, target, spec=spec)[0].sign()
        for ascent in (Ascent(model, Underflow(rescale=rescale)) for rescale in (True, False))
    ]
    assert torch.equal(*found)
