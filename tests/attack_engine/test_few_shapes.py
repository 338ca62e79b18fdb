"""Shrinking batches come in few sizes where each size costs, with the same verdicts."""

from typing import Any

import pytest
import torch
from support.fallbacks import CollectedIn
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat.attack_engine import shrinking_batch as rebatch
from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attacks import Nearest, parse_attack, square

IMAGES = 37
# name, norm, radius; how many sizes of batch there may be: 37, 19, 10, 5, 3, and Square's sixteenths
ATTACKS = [
    ("fab", "linf", 0.03, 5),
    ("fab-2", "l2", 0.3, 5),
    ("fab-t", "linf", 0.03, 5),
    ("fab-t-min-2", "l1", 3.0, 5),
    ("deepfool", "l2", 0.3, 5),
    ("deepfool-linf", "linf", 0.03, 5),
    ("cwl2-3x40", "l2", 0.3, 5),
    ("sigmazero60", "l0", 5.0, 5),
    ("apgd-ce20-2", "linf", 0.03, 5),
    ("apgd-t10", "linf", 0.03, 5),
    ("pgd5-5", "linf", 0.03, 5),
    ("cw5-3", "linf", 0.03, 5),
    ("pgd3@all", "linf", 0.03, 5),
    ("square150", "linf", 0.05, 14),
    ("square150", "l2", 0.8, 14),
]


class Sized(nn.Module):
    """Notes the number of images of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.sizes = tiny_cnn(0, dtype=torch.float64), []

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        self.sizes.append(len(x))
        return self.network(x)


def attacked(name: str, norm: str, eps: float) -> tuple[Any, list[int], Tensor]:
    model = Sized().eval()
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        labels = model.network(x).argmax(1)
    labels[::6] = (labels[::6] + 1) % 10  # some are misclassified as they are
    search = parse_attack(name, eps=eps, step_size=eps / 4, norm=norm).search
    assert search is not None
    result = search(Ascent(model), x, labels, generator=torch.Generator().manual_seed(1))
    taken = list(model.sizes)
    with torch.no_grad():
        stands = model.network(result.x_adv).argmax(1) == labels
    return result, taken, result.outside if isinstance(result, Nearest) else stands


@pytest.mark.parametrize(("name", "norm", "eps", "sizes"), ATTACKS, ids=[f"{a[0]}-{a[1]}" for a in ATTACKS])
def test_few_sizes_and_the_verdicts_of_any_size(
    name: str, norm: str, eps: float, sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where the size of a batch decides no verdict by rounding."""
    free, of_any_size, verdict = attacked(name, norm, eps)
    monkeypatch.setitem(square.FULL_BATCH, "cpu", IMAGES)  # as many as came, which is the rule of a GPU
    monkeypatch.setitem(rebatch.HALVINGS, "cpu", 4)
    few, taken, same = attacked(name, norm, eps)
    assert len(set(taken)) <= sizes
    assert max(taken) == IMAGES
    assert torch.equal(same, verdict)
    assert 0 < int(verdict.sum()) < IMAGES, "an attack that breaks all or none says nothing"
    if (
        "square" not in name
    ):  # which asks as many queries abreast as there is room for, whose sequence is another then
        torch.testing.assert_close(few.x_adv, free.x_adv, rtol=0, atol=1e-9)
        assert len(set(of_any_size)) >= min(len(set(taken)), 2)
    if isinstance(few, Nearest):
        torch.testing.assert_close(few.distance, free.distance)
        assert torch.equal(few.found, free.found)
    if not name.startswith(("pgd", "cw5")):  # there images that fill the batch are attacked, and counted, too
        assert (int(few.zero_grads), few.gradients) == (int(free.zero_grads), free.gradients)


@pytest.mark.parametrize(
    "name", ["apgd-ce20-2", "apgd-t10", "pgd5-5", "cwl2-3x40", "sigmazero60", "deepfool", "fab-t"]
)
def test_a_shrinking_batch_compiles_few_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, options, **kwargs: real(fn, backend="eager", **kwargs))
    torch._dynamo.reset()
    counters.clear()
    norm = {"cwl2-3x40": "l2", "sigmazero60": "l0", "deepfool": "l2"}.get(name, "linf")
    eps = {"l2": 0.3, "l0": 5.0}.get(norm, 0.03)
    model, x = tiny_cnn(0).eval(), torch.rand(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        labels = model(x).argmax(1)
    said: list[str] = []
    engine = AttackEngine(
        model, x[:2], switches=AttackSwitches(compile="default"), fallbacks=CollectedIn(said)
    )
    search = parse_attack(name, eps=eps, step_size=eps / 4, norm=norm).search
    assert search is not None
    search(engine.ascent, x, labels, generator=torch.Generator().manual_seed(1))
    assert counters["stats"]["unique_graphs"] <= 4
    assert said == []
    torch._dynamo.reset()
