"""The boundary's speed is the derivative of the margin, and measuring it changes nothing of a run."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from support.stepping import make_batch, moved_network, train_step
from torch import Tensor, nn

from fastdynat.attacks.boundary_search import Boundary, BoundarySpec, boundary
from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.evaluation import BoundarySpeed, boundary_speed
from fastdynat.evaluation.saliency import explain
from fastdynat.methods import Madry, MadryOptions
from fastdynat.models import build_model
from fastdynat.training.boundary_log import last_move

EXACT = BoundarySpec(eta=1 + 1e-9, eps_start=0.0)  # ends on a straight boundary instead of beyond it
FINE = replace(EXACT, steps=100, beta_back=0.9999)


def moved_by(net: nn.Module, move: dict[str, Tensor], t: float) -> nn.Module:
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(t * move[name])
    return other


def converged(net: nn.Module, x: Tensor, y: Tensor) -> Boundary:
    """The search restarted from its end point, pulled back less each time: it gets nearer to the boundary."""
    found = boundary(net, x, y, BoundarySpec(steps=300, eta=1 + 1e-9))
    for beta in (0.99, 0.999, 0.9999):
        found = boundary(net, x, y, replace(FINE, beta_back=beta), x_start=found.x_adv)
    return found


def test_images_that_are_not_in_the_unit_range_are_refused() -> None:
    net, x = moved_network(0), make_batch().x
    y = net.eval()(x).argmax(1)
    for wrong in (255 * x, x - 1):
        with pytest.raises(UserError, match="images must be in \\[0, 1\\]"):
            boundary(net, wrong, y, FINE)
        with pytest.raises(UserError, match="images must be in \\[0, 1\\]"):
            explain(net, wrong, y)


@pytest.mark.parametrize("seed", range(3))
def test_speed_is_a_finite_difference_of_the_margin(seed: int) -> None:
    """A smooth network with batch norm, whose running statistics stay where they are."""
    net, x = moved_network(seed), 0.1 + 0.8 * make_batch().x
    with torch.no_grad():
        net[4].weight.mul_(4)
    y = net.eval()(x).argmax(1)
    move = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    points = converged(net, x, y)
    found = boundary_speed(net, x, y, move, FINE, x_start=points.x_adv)
    h = 1e-5
    ahead, behind = (converged(moved_by(net, move, t), x, y).distance for t in (h, -h))
    difference = (ahead - behind) / (2 * h)
    good = points.usable & (points.margin > -1e-8)
    assert int(good.sum()) >= 3
    assert float(found.speed[good].abs().min()) > 0
    error = (found.speed / difference - 1).abs()[good]
    # A pixel on which the margin hardly depends slows the search; its image may not be done at the last
    # digits.
    assert float(error.max()) < 0.05
    assert float((error < 1e-3).double().mean()) > 0.6


def test_on_a_linear_network_it_is_the_closed_form() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    x = 0.5 + 0.2 * (torch.rand(6, 3, 4, 4, dtype=torch.float64) - 0.5)
    y = net(x).argmax(1)
    y[0] = 1 - y[0]
    weight, bias = net[1].weight, net[1].bias
    w, b = weight[y] - weight[1 - y], bias[y] - bias[1 - y]
    radius = ((w * x.flatten(1)).sum(1) + b) / w.abs().sum(1)
    move = {"1.weight": torch.randn_like(weight)}  # the bias stays
    found = boundary_speed(net, x, y, move, EXACT)
    assert found.margin[0].isnan()
    assert found.speed[0].isnan()
    assert found.correct.tolist() == [False] + [True] * 5
    for i in range(1, 6):
        slope = float((torch.autograd.grad(radius[i], weight, retain_graph=True)[0] * move["1.weight"]).sum())
        assert float(found.speed[i]) == pytest.approx(slope, rel=1e-6)
        assert float(found.margin[i]) == pytest.approx(float(radius[i].detach()), rel=1e-8)


def test_columns_by_hand() -> None:
    nan = float("nan")
    found = BoundarySpeed(
        torch.tensor([0.01, 0.02, nan, 0.05]),
        torch.tensor([-1.0, 3.0, nan, 0.5]),
        torch.tensor([True, True, False, True]),
    )
    columns = found.columns(0.03)
    assert columns == pytest.approx(
        {
            "margin_found": 0.75,
            "margin": 0.08 / 3,
            "approaching_near": 0.5,
            "speed_near": 1.0,
            "approaching_far": 0.0,
            "speed_far": 0.5,
        }
    )
    assert found.columns(0.001)["speed_near"] is None


@pytest.mark.parametrize("options", [{}, {"head_lr_scale": 3.0}])
def test_the_move_is_the_last_update(options: dict[str, float]) -> None:
    batch, model = make_batch(), moved_network(1)
    step = train_step(Madry(MadryOptions()), model, None)
    assert last_move(step) == {}  # no momentum yet
    step = train_step(Madry(MadryOptions()), model, None, momentum=0.9, **options)
    step(batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(batch)
    for name, move in last_move(step).items():
        assert float(move.abs().sum()) > 0
        torch.testing.assert_close(move, dict(model.named_parameters())[name].detach() - before[name])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_memory_format_does_not_matter_to_group_norm(channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    net = build_model("small-gn", num_classes=3, image_shape=(channels, 8, 8)).double()
    x = torch.rand(4, channels, 8, 8, dtype=torch.float64, generator=generator)
    y = net.eval()(x).argmax(1)
    parameters = dict(net.named_parameters())
    move = {k: torch.randn(p.shape, dtype=p.dtype, generator=generator) for k, p in parameters.items()}
    spec = BoundarySpec(steps=20, eps_start=0.0)
    plain = boundary_speed(net, x, y, move, spec)
    last = {"memory_format": torch.channels_last}
    move = {k: m.contiguous(**last) if m.ndim == 4 else m for k, m in move.items()}
    other = boundary_speed(net.to(**last), x.contiguous(**last), y, move, spec)
    assert int(plain.speed.isfinite().sum()) >= 1
    torch.testing.assert_close(other.speed, plain.speed, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_the_model_is_left_alone() -> None:
    net, batch = moved_network(0), make_batch()
    net.train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    move = {name: torch.randn_like(p, requires_grad=False) for name, p in net.named_parameters()}
    torch.set_rng_state(state)
    boundary_speed(
        net, batch.x, batch.labels, move, BoundarySpec(steps=2), generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_network_without_forward_mode_is_refused() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x / 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            return Half.apply(self.linear(x.flatten(1)))

    net = Net()
    move = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    with pytest.raises(UserError, match="no boundary speed of Net"):
        boundary_speed(
            net, torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), move, BoundarySpec(steps=1)
        )


# ---- in a run

TINY = [
    "--train-size",
    "96",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--epochs",
    "3",
    "--quiet",
    "--steps",
    "2",
]


@pytest.mark.parametrize(
    "method", [["--method", "madry", "--ema", "0.9"], ["--method", "dynat"]], ids=["madry-ema", "dynat"]
)
def test_a_run_with_it_is_bit_for_bit_the_run_without(method: list[str], tmp_path: Path) -> None:
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    assert main(["train", "--run-dir", str(plain), *method, *TINY]) == 0
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(measured),
                *method,
                *TINY,
                "--boundary-speed",
                "15",
                "--stop-after",
                "2",
            ]
        )
        == 0
    )
    assert main(["train", "--resume", str(measured), "--quiet"]) == 0
    for name in (p.name for p in (plain / "last").glob("*.safetensors")):
        assert (plain / "last" / name).read_bytes() == (measured / "last" / name).read_bytes()
    states = [torch.load(run / "last" / "state.pt", weights_only=True) for run in (plain, measured)]
    assert torch.equal(states[0]["rng"]["torch"], states[1]["rng"]["torch"])
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, measured)
    ]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert all(
        {"margin", "approaching_near", "approaching_far", "speed_near", "speed_far"} <= set(row)
        for row in rows[1]
    )
    files = sorted((measured / "boundary").iterdir())
    assert [path.name for path in files] == ["epoch-0001.npz", "epoch-0002.npz", "epoch-0003.npz"]
    for row, path in zip(rows[1], files, strict=True):
        values = np.load(path)
        assert values["margin"].shape == values["speed"].shape == values["correct"].shape == (15,)
        assert row["margin_found"] == pytest.approx(np.isfinite(values["margin"]).mean())
        assert math.isclose(float(values["near"]), 0.1)  # of digits


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--boundary-speed", "21"],
            "--boundary-speed 21: there are 20 validation images; ask for fewer, or hold more out with "
            "--val-size",
        ),
        (
            ["--boundary-speed", "-1"],
            "--boundary-speed must be a number of validation images, 0 for none, got -1",
        ),
        (["--boundary-speed", "5", "--norm", "l2"], "--norm linf"),
        (["--boundary-speed", "5", "--momentum", "0"], "momentum above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--run-dir", str(tmp_path / "run"), *TINY, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def run_with(folder: Path, epochs: int, images: int = 40) -> Path:
    """A run directory with the files that the picture needs."""
    (folder / "boundary").mkdir(parents=True)
    (folder / "config.yaml").write_text("# fastdynat run\n")
    for epoch in range(1, epochs + 1):
        margin, speed = torch.rand(images) / 10, torch.randn(images) / 100
        margin[: images // 2] = speed[: images // 2] = float("nan")
        BoundarySpeed(margin, speed, torch.ones(images, dtype=torch.bool)).save(
            folder / "boundary" / f"epoch-{epoch:04d}.npz", 8 / 255
        )
    return folder


@needs("matplotlib")
@pytest.mark.parametrize(("epochs", "panels"), [(1, {1}), (4, {1, 2, 3, 4}), (50, {1, 11, 21, 30, 40, 50})])
def test_the_picture(epochs: int, panels: set[int], tmp_path: Path) -> None:
    chart = tmp_path / "speed.svg"
    assert main(["boundary", str(run_with(tmp_path / "run", epochs)), "--chart", str(chart)]) == 0
    text = chart.read_text()
    assert {epoch for epoch in range(1, epochs + 1) if f">epoch {epoch}<" in text} == panels
    assert "approaches" in text
    assert "#c94f4f" in text
    assert "#2f81c7" in text


@needs("matplotlib")
def test_a_run_in_which_nothing_was_found_is_an_empty_picture(tmp_path: Path) -> None:
    assert (
        main(["boundary", str(run_with(tmp_path / "run", 2, images=0)), "--chart", str(tmp_path / "a.png")])
        == 0
    )
    assert (tmp_path / "a.png").stat().st_size > 1000


@needs("matplotlib")
def test_pictures_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, chart = run_with(tmp_path / "run", 2), str(tmp_path / "a.svg")
    (run / "boundary" / "epoch-0002.npz").write_bytes(b"no")
    empty = run_with(tmp_path / "empty", 0)
    for arguments, words in (
        ([str(run), "--chart", chart], "is damaged"),
        ([str(empty), "--chart", chart], "train with --boundary-speed"),
        ([str(tmp_path / "none")], "no run at"),
        ([str(run), "--chart", "a.txt"], "--chart must end in"),
    ):
        assert main(["boundary", *arguments]) == 2
        assert words in capsys.readouterr().err
