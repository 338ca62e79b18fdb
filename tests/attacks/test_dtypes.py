"""Every attack on images and networks of every pair of dtypes: it runs, or says what does not fit."""

import pytest
import torch
from support.networks import tiny_cnn
from support.short_attacks import missing_attacks, short_attack

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attacks import Boundary, BoundarySpec, NamedAttack, boundary
from fastdynat.errors import UserError
from fastdynat.evaluation import AutoAttack
from fastdynat.evaluation.measure import attacked, predict
from fastdynat.models.logits import half_of
from fastdynat.ops.image_draws import ImageDraws

N, CPU = 12, torch.device("cpu")
EPS = {"linf": 0.04, "l2": 0.5, "l1": 4.0, "l0": 6.0}
ATTACKS = [
    ("fgsm", "linf"),
    ("bim3", "l2"),
    ("mim3", "linf"),
    ("pgd3-2", "l1"),
    ("pgd3", "l0"),
    ("pgd3-2@random", "linf"),
    ("cw3", "linf"),
    ("apgd-ce8-2", "linf"),
    ("apgd-dlr8", "l2"),
    ("apgd-t8", "l1"),
    ("fab", "linf"),
    ("fab-t", "l2"),
    ("fab-t-min", "l1"),
    ("square60", "linf"),
    ("square60", "l2"),
    ("deepfool5", "l2"),
    ("deepfool-linf5", "linf"),
    ("cwl2-2x20", "l2"),
    ("sigmazero20", "l0"),
]
IMAGES = (torch.float32, torch.float64)
MODELS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FIT = [(x, model) for x in IMAGES for model in MODELS if model in (x, torch.float16, torch.bfloat16)]


def named(name: str, norm: str) -> NamedAttack:
    return short_attack(name, norm, eps=EPS[norm], steps=8)


def test_every_registered_attack_is_here() -> None:
    assert missing_attacks([name for name, _ in ATTACKS]) == []


@pytest.mark.parametrize(("images", "network"), FIT)
def test_attacks_run_in_every_pair_of_dtypes(images: torch.dtype, network: torch.dtype) -> None:
    model = tiny_cnn(3).eval().requires_grad_(False).to(network)
    x = torch.rand(N, 3, 8, 8, dtype=images)
    labels = predict(model, x)
    labels[0] = (labels[0] + 1) % 10  # leaves the batch, which then is put together again
    plain = Ascent(model, Underflow(rescale=True), half_of(model, images), allow_no_gradient=True)
    for name, norm in ATTACKS:
        draws = ImageDraws.of(0, torch.arange(N), CPU)
        for ascent in (plain, attacked(model, x)):
            found = named(name, norm).run(ascent, x, labels, draws=draws)
            assert found.x_adv.dtype == images, name
            assert bool(found.x_adv.isfinite().all()), name
    found = boundary(model, x, labels, BoundarySpec(steps=3))
    assert isinstance(found, Boundary)
    assert found.x_adv.dtype == images
    evaluator = AutoAttack(model, "linf", EPS["linf"], seed=1, verbose=False, device="cpu")
    evaluator.stages = [named(name, "linf") for name in ("apgd-ce8", "apgd-t8", "fab-t", "square60")]
    x_adv = evaluator.run_standard_evaluation(x, labels)
    assert x_adv.dtype == images
    fell = predict(model, x_adv) != labels
    assert 1 < int(fell.sum()) <= N


@pytest.mark.parametrize(("images", "network"), [IMAGES, IMAGES[::-1]])
def test_float32_and_float64_do_not_mix(images: torch.dtype, network: torch.dtype) -> None:
    model, x = tiny_cnn(3).eval().to(network), torch.rand(N, 3, 8, 8, dtype=images)
    labels = torch.zeros(N, dtype=torch.int64)
    with pytest.raises(UserError, match="convert one to the other's dtype"):
        attacked(model, x)
    with pytest.raises(UserError, match="convert one to the other's dtype"):
        boundary(model, x, labels, BoundarySpec(steps=3))
