"""Winograd convolutions: conv2d in float64, every kind of gradient, and attacks that use them."""

import copy
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fallbacks import CollectedIn
from torch import Tensor, nn

from fastdynat import ops
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.attack_engine.winograd_layers import WinogradConv2d, WinogradConvReLU2d
from fastdynat.commands.main import main
from fastdynat.evaluation.fidelity import check_fidelity
from fastdynat.models import build_model
from fastdynat.ops.winograd import _eager_conv, _eager_weights
from fastdynat.training.parts import attack_switches
from fastdynat.training.resolved_config import ResolvedEngine
from fastdynat.tuning import Convolution

NAN, INF = float("nan"), float("inf")
ON_CPU = ["eager", pytest.param("cpp", marks=needs("ext"))]
# Of |x| |w|, the norms of what a tile reads and of the filter. Rounding to float32 is 6e-8 of a value; the
# transforms' matrices then multiply it, by 19 at most in 1-D on the way out. 1.1e-6 is the most that was seen
# on a million random outputs.
TOLERANCE = 5e-6
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels-last": lambda t: t.to(memory_format=torch.channels_last),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 1],
    "turned": lambda t: t.mT.contiguous().mT,
}


def problem(n: int, c: int, k: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, c, height, width), torch.randn(k, c, 3, 3), torch.randn(k)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


def assert_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    want = exact(x, weight, bias)
    assert got.shape == want.shape
    if got.numel() == 0:
        return
    energy = F.avg_pool2d(
        x.double().square().sum(1, keepdim=True), 11, 1, 5, divisor_override=1
    )  # of every tile around
    size = energy.sqrt() * weight.double().square().sum((1, 2, 3)).sqrt().view(1, -1, 1, 1) + want.abs()
    assert float(((got.double() - want).abs() / size.clamp_min(1e-30)).max()) < TOLERANCE


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 3),
    c=st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 130])),
    k=st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 130])),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    layout=st.sampled_from(list(LAYOUTS)),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_convolution(
    backend: str, n: int, c: int, k: int, height: int, width: int, layout: str, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight, bias = problem(n, c, k, height, width)
    x, weight, shift = LAYOUTS[layout](x), LAYOUTS[layout](weight), bias if biased else None
    weights = ops.winograd_weights(weight, backend=backend)
    got = ops.winograd_conv3x3(x, *weights, shift, backend=backend)
    assert got.permute(0, 2, 3, 1).is_contiguous()
    assert_close(got, x, weight, shift)


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 3),
    c=st.sampled_from([1, 5, 16, 33, 130]),
    k=st.sampled_from([1, 5, 16, 33, 130]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    layout=st.sampled_from(list(LAYOUTS)),
    biased=st.booleans(),
    added=st.booleans(),
    special=st.sampled_from([None, NAN, INF, -INF, 0.0]),
    seed=st.integers(0, 2**31),
)
def test_with_residual_and_relu_it_is_what_separate_passes_give(
    backend: str,
    n: int,
    c: int,
    k: int,
    height: int,
    width: int,
    layout: str,
    biased: bool,
    added: bool,
    special: float | None,
    seed: int,
) -> None:
    """Bit for bit, the gradients too; NaN passes the ReLU and opens its gradient, as in torch."""
    torch.manual_seed(seed)
    x, weight, bias = problem(n, c, k, height, width)
    upstream, residual = torch.randn(2, n, k, height, width).unbind()
    if special is not None and n:
        (residual if added else x)[0, :, 0, 0] = special
    weights, shift = ops.winograd_weights(weight), bias if biased else None
    leaves = [LAYOUTS[layout](x).requires_grad_(), LAYOUTS[layout](residual).requires_grad_()][: 1 + added]
    more = leaves[1] if added else None
    got = ops.winograd_conv3x3(leaves[0], *weights, shift, residual=more, relu=True, backend=backend)
    apart = ops.winograd_conv3x3(leaves[0], *weights, shift, backend=backend)
    want = F.relu(apart if more is None else apart + more)
    pairs = [(got, want)]
    grads = [torch.autograd.grad(y, leaves, LAYOUTS[layout](upstream)) for y in (got, want)]
    pairs += zip(*grads, strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_the_algorithm_is_exact() -> None:
    """The matrices: in float64 nothing but rounding is left."""
    x, weight, bias = (t.double() for t in problem(2, 3, 4, 9, 6))
    forward, backward = weight.new_empty(36, 3, 4), weight.new_empty(36, 4, 3)
    _eager_weights(weight, forward, backward)
    torch.testing.assert_close(_eager_conv(x, forward, bias), exact(x, weight, bias), rtol=0, atol=1e-11)


@needs("ext")
@pytest.mark.parametrize("channels", [64, 200])
def test_a_large_batch_in_several_chunks(channels: int) -> None:
    x, weight, bias = problem(9, channels, 64, 31, 18)
    assert_close(ops.winograd_conv3x3(x, *ops.winograd_weights(weight), bias), x, weight, bias)


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_weights_are_rounded_once(backend: str) -> None:
    weight = torch.randn(17, 33, 3, 3)
    wide = torch.empty(36, 33, 17, dtype=torch.float64), torch.empty(36, 17, 33, dtype=torch.float64)
    _eager_weights(weight, *wide)
    for got, want in zip(ops.winograd_weights(weight, backend=backend), wide, strict=True):
        assert bool(((got - want).abs() <= 2**-24 * 1.000001 * want.abs()).all())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_no_channels_or_one(backend: str, shape: tuple[int, int]) -> None:
    x, weight, bias = problem(2, shape[1], shape[0], 5, 6)
    got = ops.winograd_conv3x3(x, *ops.winograd_weights(weight, backend=backend), bias, backend=backend)
    if weight.numel():
        assert_close(got, x, weight, bias)
    else:  # what conv2d refuses: sums of nothing
        assert torch.equal(got, bias[None, :, None, None].expand(2, -1, 5, 6))


def test_the_weights_may_be_written_in_place() -> None:
    first, second = torch.randn(2, 5, 6, 3, 3)
    out = ops.winograd_weights(first)
    again = ops.winograd_weights(second, out=out)
    assert all(one is other for one, other in zip(out, again, strict=True))
    torch.testing.assert_close(again, ops.winograd_weights(second), rtol=0, atol=0)


def gradients(way: str, f: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    def pulled(x: Tensor, upstream: Tensor) -> Tensor:
        _, pull_back = torch.func.vjp(f, x)
        return pull_back(upstream)[0]

    if way == "autograd":
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf, upstream)[0]
    if way == "vjp":
        return pulled(x, upstream)
    torch._dynamo.reset()
    backend = "aot_eager" if way == "compiled" else "inductor"
    return torch.compile(pulled, fullgraph=True, dynamic=False, backend=backend)(x, upstream)


@pytest.mark.parametrize(
    "way", ["autograd", "vjp", "compiled", pytest.param("inductor", marks=[needs("cxx"), pytest.mark.slow])]
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_the_input_gradient(backend: str, way: str) -> None:
    """Of a network around it, so that what comes before and after takes part."""
    x, weight, bias = problem(2, 5, 7, 6, 9)
    upstream, weights = torch.randn(2, 7, 6, 9), ops.winograd_weights(weight)

    def ours(x: Tensor) -> Tensor:
        return ops.winograd_conv3x3(x.sin(), *weights, bias, backend=backend).square()

    leaf = x.double().requires_grad_()
    want = torch.autograd.grad(exact(leaf.sin(), weight, bias).square(), leaf, upstream.double())[0]
    got = gradients(way, ours, x, upstream)
    assert float((got - want).abs().max() / want.abs().max()) < 2e-5


IN_PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu_": lambda y, x: F.relu_(y),
    "relu6": lambda y, x: F.relu6(y, inplace=True),
    "hardswish": lambda y, x: F.hardswish(y, inplace=True),
    "silu": lambda y, x: F.silu(y, inplace=True),
    "leaky relu": lambda y, x: F.leaky_relu_(y, 0.1),
    "dropout": lambda y, x: F.dropout(y, 0.5, training=False, inplace=True),
    "residual": lambda y, x: y.add_(x),
    "gate": lambda y, x: y.mul_(y.detach().abs().sqrt()).mul_(x.sigmoid()),
    "slices": lambda y, x: [y[:, :3].zero_(), y[0].relu_(), y][-1],
    "overwritten": lambda y, x: y.copy_(x),
    "residual and relu": lambda y, x: F.relu_(y.add_(x)),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("backend", ON_CPU)
def test_its_result_may_be_overwritten(backend: str, name: str) -> None:
    x, weight, bias = problem(2, 8, 8, 9, 6)
    weights, upstream = ops.winograd_weights(weight), torch.randn(2, 8, 9, 6)

    def answer(conv: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = IN_PLACE[name](conv(leaf.sin()), leaf)
        return y.detach(), torch.autograd.grad(y, leaf, upstream.to(x))[0]

    want = answer(lambda z: F.conv2d(z, weight.double(), bias.double(), padding=1), x.double())
    got = answer(lambda z: ops.winograd_conv3x3(z, *weights, bias, backend=backend), x)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_differentiable_itself() -> None:
    x, weight, _ = problem(1, 2, 3, 5, 4)
    weights, probe = ops.winograd_weights(weight), torch.randn(1, 2, 5, 4)

    def second(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad((first * probe.to(x.dtype)).sum(), leaf)[0]

    want = second(lambda t: exact(t, weight, None), x.double())
    got = second(lambda t: ops.winograd_conv3x3(t, *weights), x)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@pytest.mark.parametrize("added", [False, True])
def test_the_gradient_with_relu_is_differentiable_itself(added: bool) -> None:
    x, weight, bias = problem(1, 2, 3, 5, 4)
    weights, probe, more = ops.winograd_weights(weight), torch.randn(1, 2, 5, 4), torch.randn(1, 3, 5, 4)

    def second(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, more: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), more.clone().requires_grad_()]
        (first,) = torch.autograd.grad(f(*leaves).pow(3).sum(), leaves[:1], create_graph=True)
        return list(torch.autograd.grad((first * probe.to(x.dtype)).sum(), leaves[: 1 + added]))

    def ours(x: Tensor, more: Tensor) -> Tensor:
        return ops.winograd_conv3x3(x, *weights, bias, residual=more if added else None, relu=True)

    def plain(x: Tensor, more: Tensor) -> Tensor:
        return F.relu(exact(x, weight, bias) + more if added else exact(x, weight, bias))

    for got, want in zip(second(ours, x, more), second(plain, x.double(), more.double()), strict=True):
        assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("backend", ON_CPU)
def test_what_is_not_finite_stays_so_and_in_its_tiles(backend: str, value: float) -> None:
    for row, column in ((0, 0), (3, 4), (5, 9), (8, 8)):
        x, weight, _ = problem(3, 4, 5, 9, 10)
        x[1, 2, row, column] = value
        got = ops.winograd_conv3x3(x, *ops.winograd_weights(weight), backend=backend)
        wrong, reach = ~got.isfinite(), ~exact(x, weight, None).isfinite()
        assert bool(wrong[reach].all())
        tiles = torch.zeros(12, 12, dtype=torch.bool)
        for top in range(0, 12, 4):
            for left in range(0, 12, 4):
                if reach[1, 0, top : top + 4, left : left + 4].any():
                    tiles[top : top + 4, left : left + 4] = True
        assert not bool(wrong[1, :, ~tiles[:9, :10]].any())
        assert not bool(wrong[[0, 2]].any())


def test_bad_arguments_are_named() -> None:
    x, weight, bias = problem(2, 3, 4, 5, 5)
    forward, backward = ops.winograd_weights(weight)
    cases: list[tuple[str, Callable[[], Any]]] = [
        (r"x has shape \(2, 3, 5\)", lambda: ops.winograd_conv3x3(x[..., 0], forward, backward)),
        ("x must be float32, got torch.float64", lambda: ops.winograd_conv3x3(x.double(), forward, backward)),
        (r"forward has shape \(36, 3\)", lambda: ops.winograd_conv3x3(x, forward[..., 0], backward)),
        (
            r"forward has shape \(36, 4, 3\), expected \(36, 3, 3\)",
            lambda: ops.winograd_conv3x3(x, backward, forward),
        ),
        (r"backward has shape \(36, 3, 4\)", lambda: ops.winograd_conv3x3(x, forward, forward)),
        (
            r"bias has shape \(3,\), expected \(4,\)",
            lambda: ops.winograd_conv3x3(x, forward, backward, bias[:3]),
        ),
        (
            "a residual is for relu=True",
            lambda: ops.winograd_conv3x3(x, forward, backward, residual=x.new_zeros(2, 4, 5, 5)),
        ),
        (
            r"residual has shape \(2, 3, 5, 5\), expected \(2, 4, 5, 5\)",
            lambda: ops.winograd_conv3x3(x, forward, backward, residual=x, relu=True),
        ),
        ("bias must be float32", lambda: ops.winograd_conv3x3(x, forward, backward, bias.double())),
        (
            "no gradient of bias",
            lambda: ops.winograd_conv3x3(x, forward, backward, bias.clone().requires_grad_()),
        ),
        (r"weight has shape \(4, 3, 3\)", lambda: ops.winograd_weights(weight[..., 0])),
        (r"weight has shape \(4, 3, 3, 2\)", lambda: ops.winograd_weights(weight[..., :2])),
        ("weight must be float32, got torch.bfloat16", lambda: ops.winograd_weights(weight.bfloat16())),
        (r"out\[0\] has shape \(36, 4, 3\)", lambda: ops.winograd_weights(weight, out=(backward, forward))),
        (
            r"out\[1\] must be contiguous",
            lambda: ops.winograd_weights(weight, out=(forward, backward.mT.contiguous().mT)),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


@needs("ext")
def test_the_registered_operators_check_for_themselves() -> None:
    x, weight, bias = problem(2, 3, 4, 5, 5)
    forward, backward = ops.winograd_weights(weight)
    conv, weights = torch.ops.fastdynat.winograd_conv3x3, torch.ops.fastdynat.winograd_weights
    for message, call in (
        (r"x has shape \(2, 3, 5\)", lambda: conv(x[..., 0], forward, None)),
        (r"weight has shape \(36, 4, 3\), expected \(36, 3, K\)", lambda: conv(x, backward, None)),
        (r"bias has shape \(3\), expected \(4,\)", lambda: conv(x, forward, bias[:3])),
        ("x must be float32", lambda: conv(x.double(), forward, None)),
        (r"residual has shape \(2, 3, 5, 5\), expected \(2, 4, 5, 5\)", lambda: conv(x, forward, None, x)),
        (
            "residual and x must have one dtype",
            lambda: conv(x, forward, None, x.new_zeros(2, 4, 5, 5).double()),
        ),
        (r"gate has shape \(4\) but x has shape", lambda: conv(x, forward, None, None, bias)),
        ("gate and x must have one dtype", lambda: conv(x, forward, None, None, x.double())),
        (r"forward has shape \(36, 4, 3\)", lambda: weights(weight, backward, forward)),
        (r"backward has shape \(36, 4, 3\)", lambda: weights(weight, forward, backward.mT.contiguous().mT)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    for args in ((x, forward, bias), (x.to(memory_format=torch.channels_last), forward, None)):
        torch.library.opcheck(conv.default, args)
    torch.library.opcheck(conv.default, (x, forward, bias, x.new_ones(2, 4, 5, 5), x, True))
    torch.library.opcheck(weights.default, (weight, forward.clone(), backward.clone()))


def images(n: int = 4, size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, size, size, dtype=dtype), torch.randint(10, (n,))


def wide_net() -> nn.Module:
    """Two convolutions in three that are eligible; one of them is called twice, under two names."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        shared := nn.Conv2d(64, 64, 3, padding="same"),
        nn.ReLU(),
        shared,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    move(net)
    return net.eval()


@torch.no_grad()
def move(net: nn.Module) -> None:
    """On as in training: other weights and other running statistics."""
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std(correction=0))
    net.train()(images(16, 8)[0])
    net.eval()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd at any cost: on small images it is slower (tests/attack_engine/test_winograd_choice.py)."""
    monkeypatch.setattr(Convolution, "repays", lambda *_: True)
    monkeypatch.setattr(Convolution, "gain", lambda *_: 1.0)


def used(network: nn.Module) -> int:
    return sum(m.transformed.current for m in network.modules() if isinstance(m, WinogradConv2d))


@needs("ext")
@pytest.mark.parametrize("bn", ["eval", "frozen"])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.usefixtures("everywhere")
def test_a_replica_follows_the_model(fold: bool, bn: str) -> None:
    model, (x, _) = wide_net(), images()
    state, classes = model.state_dict().keys(), [type(m) for m in model.modules()]
    replicas = [AttackReplica(model, x[:2], bn=bn, fold=fold, winograd=on) for on in (True, False)]
    assert [r.num_winograd for r in replicas] == [2, 0]
    for moved in (False, True):
        if moved:
            move(model)
            for replica in replicas:
                replica.refresh()
        for batch in (x, x.to(memory_format=torch.channels_last), x[:1], x[..., :3, :5]):
            got, want = (r.network(batch) for r in replicas)
            assert used(replicas[0].network) == 2
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.detach().abs().max()) + 2e-6)
    assert model.state_dict().keys() == state
    assert [type(m) for m in model.modules()] == classes


class Overwritten(nn.Module):
    """A residual that is overwritten between the sum and its ReLU: the sum must stay before."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, 64, 3, padding=1) for channels in (3, 64))
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(2))
        self.write, self.head = write, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.norms[0](self.one(x))
        total = self.norms[1](self.two(0.5 * kept)) + kept
        self.write(kept)
        return self.head((torch.relu(total) + kept).mean((2, 3)))


WRITES: dict[str, Callable[[Tensor], object]] = {
    "method": lambda kept: kept.relu_(),
    "function": lambda kept: torch.relu_(kept),
    "in place": lambda kept: F.relu(kept, True),
    "sum": lambda kept: operator.iadd(kept, 1.0),
    "item": lambda kept: operator.setitem(kept, 0, 1.0),
}


@needs("ext")
@pytest.mark.parametrize("name", WRITES)
@pytest.mark.usefixtures("everywhere")
def test_a_residual_that_is_overwritten_is_added_before(name: str) -> None:
    model, (x, _) = Overwritten(WRITES[name]).eval(), images()
    move(model)
    with torch.no_grad():
        got, want = (AttackReplica(model, x[:2], winograd=on).network(x) for on in (True, False))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(want, model(x), rtol=0, atol=1e-5)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


INELIGIBLE: dict[str, Callable[[], nn.Module]] = {
    "stride": lambda: nn.Conv2d(64, 64, 3, stride=2, padding=1),
    "no padding": lambda: nn.Conv2d(64, 64, 3),
    "dilation": lambda: nn.Conv2d(64, 64, 3, padding=1, dilation=2),
    "groups": lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64),
    "reflect": lambda: nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
    "1x1": lambda: nn.Conv2d(64, 64, 1, padding=1),
    "few channels": lambda: nn.Conv2d(64, 31, 3, padding=1),
    "float64": lambda: nn.Conv2d(64, 64, 3, padding=1, dtype=torch.float64),
    "hook": lambda: hooked(nn.Conv2d(64, 64, 3, padding=1)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(64, 64, 3, padding=1)),
    "old weight norm": lambda: nn.utils.spectral_norm(nn.Conv2d(64, 64, 3, padding=1)),
    "subclass": lambda: type("Own", (nn.Conv2d,), {})(64, 64, 3, padding=1),
}


@pytest.mark.parametrize("name", INELIGIBLE)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
def test_other_convolutions_stay_as_they_are(name: str) -> None:
    layer = INELIGIBLE[name]()
    x = torch.rand(2, 64, 8, 8, dtype=next(layer.parameters()).dtype)
    assert AttackReplica(nn.Sequential(layer).eval(), x, fold=False).num_winograd == 0


@needs("ext")
def test_half_precision_and_a_missing_extension_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = wide_net(), images()
    assert AttackReplica(model, x).num_winograd == 2
    assert AttackReplica(model, x, dtype=torch.bfloat16).num_winograd == 0
    low = AttackReplica(model, x)
    with torch.autocast("cpu", torch.bfloat16):  # a caller's own region
        layer = next(m for m in low.network.modules() if isinstance(m, WinogradConv2d))
        assert layer(torch.rand(4, 64, 16, 16)).dtype == torch.bfloat16
    monkeypatch.setattr("fastdynat.ops._extension.LOADED", False)
    assert AttackReplica(model, x).num_winograd == 0


@needs("ext")
@pytest.mark.parametrize(
    "compiled",
    ["off", pytest.param("default", marks=[needs("cxx"), pytest.mark.slow])],
    ids=["eager", "compiled"],
)
@pytest.mark.usefixtures("everywhere")
def test_the_attack_is_as_strong(compiled: str) -> None:
    """On a network that has learned something: random labels of its images, until it knows most of them."""
    model, (x, y) = wide_net().train(), images(96, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    said: list[str] = []
    engine = AttackEngine(
        model, x[:2], switches=AttackSwitches(compile=compiled), fallbacks=CollectedIn(said)
    )
    found = check_fidelity(
        engine, model, zip(x.split(32), y.split(32), strict=True), PGDSpec(8 / 255, 2 / 255, 5)
    )
    assert said == []
    assert "up to 2 Winograd convolutions" in engine.path
    assert used(engine.replica.network) == 2
    assert not found.weaker
    assert found.loss_reference > found.loss_clean
    assert found.loss_fast == pytest.approx(found.loss_reference, rel=1e-3)
    assert found.sign_mass > 0.999


@needs("ext")
@pytest.mark.usefixtures("everywhere")
def test_resnet18_answers_the_same() -> None:
    model, (x, y) = build_model("resnet18", num_classes=10, image_shape=(3, 32, 32)).eval(), images(2, 32)
    engine = AttackEngine(model, x)
    assert "up to 13 Winograd convolutions" in engine.path
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        want = exact(x.double())
        assert float((engine.logits(x) - want).abs().max() / want.abs().max()) < 1e-4
    goal = AttackGoal("ce", y)
    assert used(engine.replica.network) == 13
    # Every ReLU after one of them is taken along, and so are the residual sums.
    kinds = [type(module) for module in engine.replica.network.modules()]
    assert kinds.count(WinogradConvReLU2d) == 13
    assert kinds.count(nn.ReLU) == 17 - 13 - 1
    got, true = engine.gradient(x, goal), AttackEngine(exact, x.double()).gradient(x.double(), goal)
    assert float((got - true).norm() / true.norm()) < 1e-2  # ReLUs at zero switch


RUN = [
    "--train-size",
    "64",
    "--val-size",
    "10",
    "--batch-size",
    "32",
    "--steps",
    "1",
    "--epochs",
    "1",
    "--quiet",
]


def test_where_it_cannot_be_used_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", *RUN, "--winograd", "on", "--amp", "bf16"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *flags]) == 2
    assert "--winograd on is for float32 on the CPU, got cpu with --amp bf16" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "run").exists()


@needs("ext")
@pytest.mark.parametrize(("switch", "used"), [("auto", True), ("on", True), ("off", False)])
def test_a_run_uses_it_unless_told_otherwise(switch: str, used: bool) -> None:
    kept: Any = {"channels_last": "off", "fold": "on", "winograd": switch}
    assert attack_switches(ResolvedEngine(device="cpu", amp="off", **kept)).winograd is used


class Asked(Exception):
    """Raised with validation's attack."""


@needs("ext")
@pytest.mark.parametrize(("switch", "used"), [("auto", True), ("off", False)])
def test_validation_uses_it_unless_told_otherwise(
    switch: str, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(model: nn.Module, example: Tensor, *, switches: AttackSwitches, **others: Any) -> None:
        raise Asked(switches.winograd)

    monkeypatch.setattr(sys.modules["fastdynat.evaluation.measure"], "AttackEngine", engine)
    monkeypatch.setattr(
        sys.modules["fastdynat.training.resolve_engine"], "winograd_pays", lambda *_, **__: True
    )  # wherever this runs
    with pytest.raises(Asked) as asked:
        main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "run"),
                "--device",
                "cpu",
                *RUN,
                "--amp",
                "off",
                "--winograd",
                switch,
            ]
        )
    assert asked.value.args == (used,)
