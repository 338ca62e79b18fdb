"""DyART: the margin's gradient, the published step; captured, compiled and eager steps agree."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.dyart_reference import reference_step
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.networks import tiny_cnn
from support.stepping import EPS, K, N, assert_same_step, make_batch, moved_network, train_step
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks.boundary_search import Boundary, BoundarySpec, boundary, boundary_start
from fastdynat.commands.main import main
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.methods import Dyart, DyartOptions, Inner, Networks
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep
from fastdynat.tuning.devices import AMP_DTYPES

CPU = torch.device("cpu")
EXACT = BoundarySpec(
    steps=600, eta=1 + 1e-9, eps_start=0.0, flat_pixel_test=False
)  # ends on the boundary instead of beyond it


def margin_gradient(method: Dyart, net: nn.Module, batch: Batch, points: Boundary) -> list[Tensor]:
    """The parameter gradient of DyART's loss without the cross-entropy, per unit of margin_weight."""
    nets = Networks(net, net, net)
    with_margin = method.outer(nets, batch, Inner(AttackGoal("margin", batch.labels)), points).losses["model"]
    without = F.cross_entropy(net(batch.x), batch.labels)
    gradients = torch.autograd.grad(with_margin - without, list(net.parameters()))
    return [g / method.options.margin_weight for g in gradients]


def test_on_a_linear_network_the_gradient_is_that_of_the_closed_form() -> None:
    """R = phi / ||w||_1 for two classes, so that sum_i h(R_i) / N can be differentiated directly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    x = 0.5 + 0.2 * (torch.rand(6, 3, 4, 4, dtype=torch.float64) - 0.5)
    y = net(x).argmax(1)
    y[4] = 1 - y[4]  # misclassified: cross-entropy only
    weight, bias = net[1].weight, net[1].bias
    w, b = weight[y] - weight[1 - y], bias[y] - bias[1 - y]
    radius = ((w * x.flatten(1)).sum(1) + b) / w.abs().sum(1)
    r0 = float(radius.detach().sort().values[4]) + 1e-6  # one image has its margin already
    method = Dyart(DyartOptions(r0=r0, decay=3.0))
    points = boundary(net, x, y, EXACT)
    got = margin_gradient(method, net, Batch(x, y, torch.arange(6)), points)
    counted = (radius > 0) & (radius < r0)
    assert int(counted.sum()) == 4
    wanted = torch.where(counted, torch.exp(-3 * radius) / 3, 0.0).sum() / 6
    for ours, theirs in zip(got, torch.autograd.grad(wanted, [weight, bias]), strict=True):
        assert float(theirs.abs().sum()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_on_a_relu_network_the_gradient_is_a_finite_difference_of_the_margin() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        net[3].weight.mul_(10)
    x = 0.5 + 0.4 * (torch.rand(16, 3, 4, 4, dtype=torch.float64) - 0.5)
    y = net(x).argmax(1)
    points = boundary(net, x, y, EXACT)
    # Where the nearest point is in a kink the search goes to and fro; the margin has no gradient there.
    points = replace(points, usable=points.usable & (points.margin > -1e-7))
    assert int(points.usable.sum()) >= 3
    method = Dyart(DyartOptions(r0=1.0, decay=2.0))
    got = margin_gradient(method, net, Batch(x, y, torch.arange(16)), points)

    direction = [torch.randn_like(p) for p in net.parameters()]
    slope = float(sum((g * v).sum() for g, v in zip(got, direction, strict=True)))

    def objective(t: float) -> float:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), direction, strict=True):
                p.add_(t * v)
        margins = boundary(moved, x, y, EXACT).distance
        return float((torch.exp(-2 * margins) / 2)[points.usable].sum()) / 16

    h = 1e-4
    assert slope == pytest.approx((objective(h) - objective(-h)) / (2 * h), rel=1e-3)


@pytest.mark.parametrize("quality_filter", [True, False])
def test_step_equals_the_float64_transcription(quality_filter: bool) -> None:
    batch, model = make_batch(), moved_network(1)
    with torch.no_grad():
        model[4].weight.mul_(6)
    labels = model.eval()(batch.x).argmax(1)
    labels[0] = (labels[0] + 1) % K  # misclassified
    batch = Batch(batch.x, labels, batch.indices)
    r0 = 0.02
    reference = copy.deepcopy(model)
    model.train()
    method = Dyart(DyartOptions(r0=r0, quality_filter=quality_filter))
    step = train_step(method, model, None, spec=PGDSpec(EPS, 0.01, 8))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    start = boundary_start(batch.x, EPS)
    torch.set_rng_state(state)
    logs = step(batch)
    fates = reference_step(reference, batch.x, labels, start, BoundarySpec(steps=8, eps_start=EPS), r0)
    assert {"used", "far", "not found"} <= set(fates), fates
    assert "dropped" not in fates, "the filter is tested apart"
    assert_same_step(model, reference)
    assert float(logs["boundary_found"]) == pytest.approx(1 - fates.count("not found") / N)
    assert float(logs["boundary_near"]) == pytest.approx(fates.count("used") / N)


def points_like(x: Tensor, **values: Tensor) -> Boundary:
    n = len(x)
    usual = {
        "found": torch.ones(n, dtype=torch.bool),
        "distance": torch.full((n,), 0.01),
        "margin": torch.full((n,), -0.01),
        "grad_norm": torch.full((n,), 10.0),
        "usable": torch.ones(n, dtype=torch.bool),
    }
    return Boundary(x, torch.zeros((), dtype=torch.int64), 0, **{**usual, **values})


def test_weights_by_hand() -> None:
    no, yes = torch.tensor([True, False, True, True, True]), torch.tensor([True, True, True, True, False])
    x = torch.rand(5, 3, 4, 4)
    norms, distances = torch.tensor([10.0, 10.0, 0.0, 5.0, 10.0]), torch.tensor([0.01, 0.01, 0.01, 0.2, 0.0])
    points = points_like(x, usable=no & (norms > 0), found=yes, grad_norm=norms, distance=distances)
    e = float(torch.exp(torch.tensor(-0.03)))
    for filtered, want in ((True, [e / 10, 0, 0, 0, 0.1]), (False, [e / 10, e / 10, 0, 0, 0])):
        got = Dyart(DyartOptions(quality_filter=filtered)).weights(points)
        torch.testing.assert_close(got, torch.tensor(want))


def test_all_wrong_trains_on_cross_entropy_alone() -> None:
    batch, model = make_batch(), moved_network(1)
    batch = Batch(batch.x, model.eval()(batch.x).argmin(1), batch.indices)
    step = train_step(Dyart(DyartOptions()), model.train(), None, spec=PGDSpec(EPS, 0.01, 3))
    reference = copy.deepcopy(model)
    logs = step(batch)
    reference(batch.x)  # in the points' place
    F.cross_entropy(reference(batch.x), batch.labels).backward()
    assert_same_step(model, reference)
    assert all(bool(value.isfinite()) for value in logs.values())
    assert float(logs["boundary_found"]) == float(logs["boundary_distance"]) == 0.0


# ---- on the engine


def confident_step(
    amp: str = "off", mode: str = "off", recorder: SimulatedRecorder | None = None
) -> TrainStep:
    net = tiny_cnn(0)
    with torch.no_grad():
        net[6].weight.mul_(20)
    dtype = AMP_DTYPES[amp]
    networks = NetworkSet(
        net,
        None,
        image_shape=(3, 8, 8),
        device=CPU,
        channels_last=dtype is not None,
        attack=AttackSwitches(dtype=dtype, channels_last=dtype is not None, compile=mode),
        compile_mode=mode,
        fallbacks=NoFallbacks(),
    )
    method, spec, optim = (
        Dyart(DyartOptions(margin_weight=10.0)),
        PGDSpec(0.03, 0.01, 4),
        OptimConfig(lr=0.01, epochs=1),
    )
    return TrainStep(
        method,
        networks,
        spec,
        optim,
        Precision(amp, CPU),
        lambda n: 1.0,
        recorder=recorder,
        fallbacks=NoFallbacks(),
    )


def batches(sizes: tuple[int, ...], layout: torch.memory_format) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    net = confident_step().networks.raw["model"].eval()
    for size in sizes:
        x = torch.rand(size, 3, 8, 8, generator=generator).contiguous(memory_format=layout)
        yield Batch(x, net(x).argmax(1), torch.arange(size))


def trained(step: TrainStep, sizes: tuple[int, ...]) -> tuple[list[dict[str, float]], Tensor]:
    torch.manual_seed(5)
    layout = torch.channels_last if step.precision.dtype else torch.contiguous_format
    logs = [{key: float(value) for key, value in step(batch).items()} for batch in batches(sizes, layout)]
    return logs, torch.cat(
        [t.detach().double().flatten() for t in step.networks.raw["model"].state_dict().values()]
    )


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_captured_step_is_the_plain_step_bit_for_bit(amp: str) -> None:
    recorder, sizes = SimulatedRecorder(), (16, 7) * (WARM_UP_CALLS + 3)
    got, want = trained(confident_step(amp, recorder=recorder), sizes), trained(confident_step(amp), sizes)
    assert (recorder.captured, recorder.replayed) == (2, 6)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])
    assert min(row["boundary_found"] for row in want[0]) > 0.3
    assert sum(row["boundary_usable"] for row in want[0]) > 0


@needs("cxx")
@pytest.mark.parametrize(("amp", "angle"), [("off", 1e-4), ("bf16", 1e-2)])
def test_compiled_without_breaks_or_recompilation(amp: str, angle: float) -> None:
    before = trained(confident_step(amp), ())[1]
    compiled = confident_step(amp, "default")
    counters.clear()
    got, want = trained(compiled, (16,))[1] - before, trained(confident_step(amp), (16,))[1] - before
    # The search's iteration, and the model with its gradient; the latter reads the points and the images.
    assert counters["stats"]["unique_graphs"] == 2
    assert float(1 - F.cosine_similarity(got, want, dim=0)) < angle
    trained(compiled, (16, 16))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


# ---- as a user has it


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"margin_weight": -1.0}, "margin_weight"),
        ({"decay": 0.0}, "decay"),
        ({"temperature": 0.0}, "temperature"),
        ({"r0": 0.0}, "r0"),
        ({"r0": "wide"}, "r0"),
    ],
)
def test_options_that_cannot_work(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Dyart(DyartOptions(**values))


def test_attacks_that_cannot_work() -> None:
    method, spec = Dyart(DyartOptions()), PGDSpec(0.03, 0.01, 20)
    method.check_attack(spec, "eval")
    for bad, bn, words in (
        (replace(spec, steps=0), "eval", "steps >= 1"),
        (replace(spec, norm="l2"), "eval", "--norm"),
        (spec, "train", "--attack-bn"),
    ):
        with pytest.raises(UserError, match=words):
            method.check_attack(bad, bn)


TINY = [
    "--train-size",
    "96",
    "--batch-size",
    "32",
    "--epochs",
    "2",
    "--quiet",
    "--lr",
    "0.01",
    "--steps",
    "2",
]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--method", "dyart", "--run-dir", str(run), *TINY, "--r0", "0.2"]) == 0
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "train_acc", "boundary_found", "boundary_usable", "boundary_near"} <= row.keys()
    assert ("boundary_distance" in row) == (row["boundary_found"] > 0)
    for flags, words in (
        (["--steps", "0"], "steps >= 1"),
        (["--early-steps", "0"], "steps >= 1"),
        (["--norm", "l2"], "--norm"),
    ):
        assert main(["train", "--method", "dyart", "--run-dir", str(tmp_path / "no"), *TINY, *flags]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
