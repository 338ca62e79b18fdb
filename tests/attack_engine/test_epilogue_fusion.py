"""Fused convolution, bias, residual and ReLU: values, gradients, and the layers that are fused."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fallbacks import CollectedIn
from support.graph_sim import SimulatedRecorder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdynat import verification as verified
from fastdynat.attack_engine import fusion_choice
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.epilogue_fusion import ConvReLU2d
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.models import build_model
from fastdynat.models.resnet import BasicBlock
from fastdynat.ops.checks import conv_relu_cases as checks
from fastdynat.ops.conv_relu import conv_relu, cudnn
from fastdynat.training.build_networks import attack_switches
from fastdynat.training.resolved_config import ResolvedEngine
from fastdynat.verification import speed
from fastdynat.verification.isolated_run import Prepared

SPEC = PGDSpec(0.1, 0.03, 3)
OPERATOR = "fastdynat_cudnn.conv_relu"


# The operator


GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"padding": (1, 1)},
    "strided": {"stride": (2, 2), "padding": (1, 1)},
    "1x1": {},
    "grouped": {"groups": 2, "padding": (1, 0)},
    "dilated": {"dilation": (2, 1), "padding": (2, 1), "stride": (1, 2)},
}


def operands(
    name: str, dtype: torch.dtype, *, last: bool = False
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    geometry = GEOMETRIES[name]
    side = 1 if name == "1x1" else 3
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x, weight = (
        torch.randn(2, 4, 7, 6, generator=generator),
        torch.randn(6, 4 // geometry.get("groups", 1), side, side),
    )
    return (
        x.to(dtype).contiguous(memory_format=layout),
        weight.to(dtype).contiguous(memory_format=layout) / 3,
        torch.randn(6, generator=generator).to(dtype),
        geometry,
    )


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: dict[str, Any]
) -> Tensor:
    out = F.conv2d(x, weight, bias, **geometry)
    return F.relu(out if residual is None else out + residual)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients_are_the_definitions(
    name: str, with_residual: bool, last: bool, dtype: torch.dtype
) -> None:
    """Bit by bit: autograd computes the definition's gradients by the same two operators."""
    x, weight, bias, geometry = operands(name, dtype, last=last)
    shape = F.conv2d(x, weight, **geometry)
    residual = torch.randn_like(shape) if with_residual else None
    upstream, found = torch.randn_like(shape), []
    for fn in (lambda *args: conv_relu(*args, **geometry), lambda *args: definition(*args, geometry)):
        leaves = [x.clone().requires_grad_()] + (
            [] if residual is None else [residual.clone().requires_grad_()]
        )
        out = fn(leaves[0], weight, bias, leaves[1] if with_residual else None)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
        assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert found[0][0].gt(0).any()
    assert found[0][0].eq(0).any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_gradients_by_finite_differences() -> None:
    x, weight, bias, geometry = operands("strided", torch.float64)
    residual = torch.randn_like(F.conv2d(x, weight, **geometry))

    def fn(x: Tensor, residual: Tensor) -> Tensor:
        return conv_relu(x, weight, bias, residual, **geometry)

    assert torch.autograd.gradcheck(fn, (x.requires_grad_(), residual.requires_grad_()))


def test_under_torch_func_and_for_a_residual_alone() -> None:
    x, weight, bias, geometry = operands("3x3", torch.float64)
    residual = torch.randn(2, 6, 7, 6, dtype=torch.float64)
    out, pull = torch.func.vjp(lambda x: conv_relu(x, weight, bias, residual, **geometry), x)
    want, pull_wanted = torch.func.vjp(lambda x: definition(x, weight, bias, residual, geometry), x)
    assert torch.equal(out, want)
    assert torch.equal(pull(torch.ones_like(out))[0], pull_wanted(torch.ones_like(out))[0])
    leaf = residual.clone().requires_grad_()
    out = conv_relu(x, weight, bias, leaf, **geometry)
    assert torch.equal(torch.autograd.grad(out.sum(), leaf)[0], (out > 0).double())


def test_what_the_operator_cannot_do_is_refused() -> None:
    x, weight, bias, geometry = operands("3x3", torch.float32)
    with pytest.raises(
        ValueError, match=r"residual is torch.float32 \(2, 6, 1, 1\), expected torch.float32 \(2, 6, 7, 6\)"
    ):
        conv_relu(x, weight, bias, torch.rand(2, 6, 1, 1), **geometry)
    with pytest.raises(ValueError, match=r"residual is torch.float64"):
        conv_relu(x, weight, bias, torch.rand(2, 6, 7, 6, dtype=torch.float64), **geometry)
    with pytest.raises(ValueError, match="computes no gradient for weight"):
        conv_relu(x, weight.requires_grad_(), bias, **geometry)


def test_the_dispatcher_agrees_with_the_operator() -> None:
    x, weight, bias, _ = operands("3x3", torch.float32, last=True)
    args = (x, weight, bias, torch.rand(2, 6, 7, 6), [1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(
        torch.ops.fastdynat_cudnn.conv_relu.default, args, test_utils=("test_schema", "test_faketensor")
    )


def test_on_a_gpu_it_is_one_call_of_cudnn() -> None:
    """By the dispatcher's table: what runs there cannot be run here."""
    assert "CUDA: registered at" in torch._C._dispatch_dump("fastdynat_cudnn::conv_relu")
    from fastdynat.ops import conv_relu as module  # the function of that name is in it

    calls: list[tuple[Any, ...]] = []
    names = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            schema = getattr(torch.ops.aten, name).default._schema
            patch.setattr(
                torch,
                name,
                lambda *args, name=name, schema=schema: calls.append((name, len(schema.arguments), args)),
            )
        x, weight, bias, residual = (torch.rand(1) for _ in range(4))
        module.cudnn(x, weight, bias, None, [1, 1], [1, 1], [1, 1], 1)
        module.cudnn(x, weight, bias, residual, [1, 1], [1, 1], [1, 1], 1)
    assert [name for name, _, _ in calls] == list(names)
    assert all(count == len(args) for _, count, args in calls)
    assert calls[1][2][2:5] == (residual, 1.0, bias)  # z, its factor, then the bias, as the schema has them


# Networks


class Net(nn.Module):
    """Modules and a forward."""

    def __init__(self, run: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x).flatten(1)[:, :10]


def parts(**more: nn.Module) -> dict[str, nn.Module]:
    """Two convolutions with their batch norms, and a ReLU."""
    usual = {
        "a": nn.Conv2d(3, 3, 3, padding=1),
        "na": nn.BatchNorm2d(3),
        "b": nn.Conv2d(3, 3, 1),
        "nb": nn.BatchNorm2d(3),
    }
    return usual | {"relu": nn.ReLU()} | more


def in_place_sum(self: Any, x: Tensor) -> Tensor:
    out = self.na(self.a(x))
    out += self.nb(self.b(x))
    return self.relu(out)


def sum_over_the_residual(self: Any, x: Tensor) -> Tensor:
    residual = self.relu(self.nb(self.b(x)))
    kept = residual * 1.0
    kept += self.na(self.a(x))
    return F.relu(kept) + kept


def number(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.na(self.a(x)) + 1)


def broadcast(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.na(self.a(x)) + self.nb(self.b(x)).mean((2, 3), keepdim=True))


def weighted(self: Any, x: Tensor) -> Tensor:
    return self.relu(torch.add(self.na(self.a(x)), x, alpha=2))


def doubled(self: Any, x: Tensor) -> Tensor:
    out = self.na(self.a(x))
    return self.relu(out + out)


def read_before_the_relu(self: Any, x: Tensor) -> Tensor:
    out = self.na(self.a(x))
    return self.relu(out) * out


def sum_read_twice(self: Any, x: Tensor) -> Tensor:
    out = self.na(self.a(x)) + x
    return self.relu(out) * out


def methods(self: Any, x: Tensor) -> Tensor:
    return self.na(self.a(x)).add_(x).relu_() + self.nb(self.b(x)).relu()


def either_order(self: Any, x: Tensor) -> Tensor:
    return torch.relu(x + self.na(self.a(x)))


def called_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.c(self.relu(self.c(self.na(self.a(x)))))) + self.nb(self.b(x))


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: out * 0.5)
    return module


def simple(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.nb(self.b(self.relu(self.na(self.a(x))))))


def parted(self: Any, x: Tensor) -> Tensor:
    """timm's pattern: identity layers between the others."""
    return self.relu(self.idle(self.na(self.idle(self.a(x)))) + self.drop(x))


# Name -> (network, convolutions that take a ReLU, of which with a residual)
FORMS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "in-place sum": (lambda: Net(in_place_sum, **parts()), 1, 1),
    "sum over the residual": (lambda: Net(sum_over_the_residual, **parts()), 1, 0),
    "number": (lambda: Net(number, **parts()), 0, 0),
    "broadcast": (lambda: Net(broadcast, **parts()), 0, 0),
    "weighted sum": (lambda: Net(weighted, **parts()), 0, 0),
    "doubled": (lambda: Net(doubled, **parts()), 0, 0),
    "read before the ReLU": (lambda: Net(read_before_the_relu, **parts()), 0, 0),
    "sum read twice": (lambda: Net(sum_read_twice, **parts()), 0, 0),
    "methods": (lambda: Net(methods, **parts()), 2, 1),
    "either order": (lambda: Net(either_order, **parts()), 1, 1),
    "convolution called twice": (lambda: Net(called_twice, **parts(c=nn.Conv2d(3, 3, 1))), 0, 0),
    "hook on a ReLU": (lambda: Net(simple, **parts(relu=hooked(nn.ReLU()))), 0, 0),
    "another activation": (lambda: Net(simple, **parts(relu=nn.ReLU6())), 0, 0),
    "in place": (lambda: Net(simple, **parts(relu=nn.ReLU(inplace=True))), 2, 0),
    "reflected": (
        lambda: Net(simple, **parts(a=nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))),
        1,
        0,
    ),
    "padding by name": (lambda: Net(simple, **parts(a=nn.Conv2d(3, 3, 3, padding="same"))), 1, 0),
    "idle layers between": (lambda: Net(parted, **parts(idle=nn.Identity(), drop=nn.Dropout(0.5))), 1, 1),
}
# Name -> (image size, convolutions that take a ReLU, of which with a residual)
NETWORKS = {
    "small": (8, 4, 0),
    "resnet18": (8, 17, 8),  # the three projections have none
    "resnet18-silu": (8, 0, 0),
    "preact_resnet18": (8, 8, 0),  # only the first convolution of a block is before batch norm and ReLU
    "wrn-10-1": (8, 3, 0),
    "torchvision:resnet18": (32, 17, 8),
    "timm:resnet18": (32, 17, 8),
    "torchvision:resnet50": (32, 49, 16),
}

LARGE, SLOW = ("timm:resnet18", "torchvision:resnet50"), [pytest.mark.slow]


def made(name: str) -> tuple[nn.Module, int, int, Tensor]:
    torch.manual_seed(0)
    if name in FORMS:
        make, total, sums = FORMS[name]
        return make().eval(), total, sums, torch.rand(4, 3, 6, 6)
    size, total, sums = NETWORKS[name]
    return (
        build_model(name, num_classes=10, image_shape=(3, size, size)).eval(),
        total,
        sums,
        torch.rand(4, 3, size, size),
    )


@torch.no_grad()
def shake(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not name.startswith("normalize"):
            value.copy_(
                torch.rand_like(value) + 0.5
                if name.endswith("running_var")
                else value + 0.1 * torch.randn_like(value)
            )


class Operators(TorchDispatchMode):
    """Operator calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func._overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", [*FORMS, *(pytest.param(name, marks=SLOW * (name in LARGE)) for name in NETWORKS)]
)
def test_joined_where_it_may_be_and_the_same_in_value_and_gradient(name: str) -> None:
    """The output of the folded network without joins, also after its weights have moved."""
    model, total, sums, x = made(name)
    model, x = (model.double(), x.double()) if name in FORMS else (model, x)
    joined, plain = (AttackReplica(model, x[:2], fused_conv=fused, winograd=False) for fused in (True, False))
    assert (joined.num_folded, joined.note) == (plain.num_folded, plain.note)
    layers = [m for m in joined.network.modules() if isinstance(m, ConvReLU2d)]
    assert len(layers) == joined.num_fused == total
    assert plain.num_fused == 0
    shake(model)
    found = []
    for replica in (joined, plain):
        replica.refresh()
        with Operators() as operators:
            leaf = x.clone().requires_grad_()
            logits = replica.network(leaf)
            found.append((logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]))
        assert operators.seen[OPERATOR] == replica.num_fused
        if replica is joined and name in NETWORKS and name != "resnet18-silu":
            outside = {"resnet18": 0, "preact_resnet18": 9, "wrn-10-1": 4}.get(name, 0)
            assert operators.seen["aten.relu"] + operators.seen["aten.relu_"] == outside
    assert torch.equal(found[0][0], found[1][0])
    # The gradients of an image that is read three times are summed in another order.
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12 if name in FORMS else 0)
    graph: Any = joined.network
    if total:
        calls = [
            n
            for n in graph.graph.nodes
            if n.op == "call_module" and isinstance(graph.get_submodule(n.target), ConvReLU2d)
        ]
        assert sum(len(call.args) == 2 for call in calls) == sums


@pytest.mark.parametrize(
    ("name", "last", "dtype"),
    [
        ("small", False, None),
        ("small", True, torch.float16),
        ("wrn-10-1", True, None),
        ("wrn-10-1", False, torch.bfloat16),
        ("resnet18", True, torch.bfloat16),
    ],
)
def test_adversarial_images_are_the_same(name: str, last: bool, dtype: torch.dtype | None) -> None:
    """Here, where the operator is its definition: bit by bit, in float32 and under autocast."""
    model, total, _, x = made(name)
    y, found = torch.arange(len(x)), []
    for fused in (True, False):
        switches = AttackSwitches(dtype=dtype, channels_last=last, fused_conv=fused, winograd=False)
        engine = AttackEngine(model, x[:2], switches=switches)
        assert engine.replica.num_fused == (total if fused else 0)
        assert ("17 fused with their ReLU" in engine.path) == (fused and name == "resnet18")
        torch.manual_seed(1)
        found.append(engine.run(x, AttackGoal("ce", y), SPEC).x_adv)
    assert torch.equal(*found)
    assert not torch.equal(found[0], x)


def test_the_model_is_left_as_it_is() -> None:
    model, _, _, x = made("resnet18")
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    AttackReplica(model, x, fused_conv=True)
    assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_captured_attack_replays_it() -> None:
    model, _, _, x = made("small")
    y, recorder = torch.arange(len(x)), SimulatedRecorder()
    spec = PGDSpec(0.1, 0.03, 2, start="none")
    engine = AttackEngine(
        model, x[:2], switches=AttackSwitches(fused_conv=True, winograd=False), recorder=recorder
    )
    want = engine.run(x, AttackGoal("ce", y), spec).x_adv
    for _ in range(WARM_UP_CALLS + 1):
        got = engine.run(x, AttackGoal("ce", y), spec).x_adv
    assert recorder.replayed > 0
    assert torch.equal(got, want)


def test_sums_that_would_be_broadcast_at_another_size_are_done_apart() -> None:
    """At the example's size the two terms were alike."""
    layer = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    layer.__class__ = ConvReLU2d
    fused: Any = layer
    fused.fused = True
    x, residual = torch.rand(2, 3, 5, 5), torch.rand(1, 3, 5, 5)
    with Operators() as operators:
        got = fused(x, residual)
    assert operators.seen[OPERATOR] == 0
    assert torch.equal(got, F.relu(F.conv2d(x, layer.weight, layer.bias, padding=1) + residual))


# Questions to a GPU at first contact, here on the CPU: the tables, and what follows from verdicts and
# timings.


def faulty(
    change: Callable[[Tensor, Any, Any], tuple[Any, Any]], finish: Callable[[Tensor], Tensor] = lambda t: t
) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Any, residual: Any, **geometry: Any) -> Tensor:
        bias, residual = change(x, bias, residual)
        return finish(conv_relu(x, weight, bias, residual, **geometry))

    return run


FAULTS: dict[str, Any] = {
    "no bias": faulty(lambda x, bias, residual: (None, residual)),
    "residual halved": faulty(lambda x, bias, residual: (bias, None if residual is None else residual / 2)),
    "no ReLU": lambda x, weight, bias, residual, **geometry: (
        F.conv2d(x, weight, bias, **geometry) + (0 if residual is None else residual)
    ),
    "one channel short": faulty(
        lambda x, *others: others, lambda t: t * (torch.arange(t.shape[1]) > 0)[:, None, None]
    ),
    "another layout": faulty(lambda x, bias, residual: (bias, residual), lambda t: t.contiguous()),
    "NaN becomes 0": faulty(
        lambda x, bias, residual: (bias, residual), lambda t: torch.where(t.isnan(), 0, t)
    ),
    "no gradient where it is 1": faulty(
        lambda x, bias, residual: (bias, residual), lambda t: torch.where(t > 1, t.detach(), t)
    ),
}


@pytest.mark.parametrize("dtype", list(checks.TOLERANCES), ids=str)
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_the_table_finds_planted_faults(fault: str, dtype: torch.dtype) -> None:
    check = checks.conv_relu_check(dtype)
    candidate = partial(checks.run_conv_relu, FAULTS[fault]) if fault else check.candidates["cudnn"]
    check = replace(check, candidates={"cudnn": candidate}, why_not=lambda name, device: None)
    with check.within():
        verdict = Prepared(check, torch.device("cpu")).examine("cudnn", lambda case: None)
    assert verdict.right == (not fault), verdict


def test_on_a_gpu_it_is_used_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdynat.ops.conv_relu import runs_right

    asked: list[Any] = []

    def right(name: str, device: torch.device) -> tuple[str, ...]:
        asked.append((name, device.type))
        return ("cudnn", "eager") if name == "conv_relu_bfloat16" else ("eager",)

    monkeypatch.setattr(verified, "right", right)
    gpu = torch.device("cuda:0")
    assert [runs_right(dtype, gpu) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [
        True,
        False,
        False,
    ]
    assert asked == [
        ("conv_relu_bfloat16", "cuda"),
        ("conv_relu_float32", "cuda"),
    ]  # of float64 there is no table
    assert runs_right(torch.float64, torch.device("cpu"))


def test_layers_that_may_not_be_fused_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion_choice, "runs_right", lambda dtype, device: dtype is not torch.float32)
    model, total, _, x = made("small")
    refused, allowed = (
        AttackReplica(model, x, fused_conv=True, dtype=dtype, winograd=False)
        for dtype in (None, torch.bfloat16)
    )
    assert (refused.num_fused, allowed.num_fused) == (0, total)
    with Operators() as operators, torch.no_grad():
        got = refused.network(x)
    assert operators.seen[OPERATOR] == 0
    with torch.no_grad():
        assert torch.equal(got, AttackReplica(model, x, winograd=False).network(x))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_layers_that_are_slower_fused_go_back(compiled: bool) -> None:
    """By a clock that charges for each operator: the fused one costs more than three from 128 channels on."""
    model, _, _, x = made("resnet18")
    replica = AttackReplica(model, x, fused_conv=True, winograd=False)
    with torch.no_grad():
        want = replica.network(x)
    convolutions: list[int] = []
    operators_apart: set[int] = set()
    sizes: list[str] = []

    def seconds(call: Callable[[], Any]) -> float:
        with Operators() as operators:
            out = call()
        convolutions.append(operators.seen["aten.convolution"])
        if not operators.seen[OPERATOR]:
            operators_apart.add(operators.seen.total())
        return operators.seen.total() if not operators.seen[OPERATOR] else 2.0 if out.shape[1] < 128 else 9.0

    def choose(name: str, device: torch.device, size: str, calls: dict[str, Callable[[], Any]]) -> str:
        assert name in verified.registered()
        assert device == x.device
        sizes.append(size)
        return min(calls, key=lambda each: seconds(calls[each]))

    fusion_choice.fuse_where_faster(replica.network, replica._fused, x, compiled=compiled, choose=choose)
    assert [layer.fused for layer in replica._fused] == [layer.out_channels < 128 for layer in replica._fused]
    assert len(convolutions) == 2 * 17
    # A compiler leaves one pass beside the convolution; else its ReLU is one, and so is the residual sum.
    assert operators_apart == ({2} if compiled else {2, 3})
    # The stem, and in each of four stages: with and without residual, and, but in the first, the one that
    # strides.
    assert len(set(sizes)) == 1 + 2 + 3 * 3
    assert not any(layer._forward_pre_hooks for layer in replica._fused)
    with torch.no_grad():
        assert torch.equal(replica.network(x), want)


@pytest.mark.parametrize(("asked", "timed"), [("auto", True), ("on", False)])
def test_fusion_that_is_asked_for_is_not_overruled(
    asked: Any, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, total, _, x = made("small")
    times: list[bool] = []

    def all_slower(replica: AttackReplica, x: Tensor, *, compiled: bool) -> int:
        times.append(compiled)
        return total

    monkeypatch.setattr(AttackReplica, "choose_fusion", all_slower)
    own = {"channels_last": "off", "fold": "on", "winograd": "off", "fused_conv": asked}
    switches = attack_switches(ResolvedEngine(device="cuda:0", amp="off", **own))
    said: list[str] = []
    AttackEngine(model, x[:2], switches=switches, fallbacks=CollectedIn(said)).prepare(x)
    assert (times, len(said)) == (([False], 1) if timed else ([], 0))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("summed", [False, True], ids=["plain", "residual"])
def test_a_deterministic_run_leaves_the_kernels_that_cannot_be_so(
    summed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of cuDNN that torch does not ask to be deterministic are not called, whatever was chosen."""

    def kernel(*args: Any) -> Tensor:
        raise AssertionError("not deterministic")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", kernel)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", kernel)
    x, weight, bias, _ = operands("3x3", torch.float32)
    residual = torch.randn(2, 6, 7, 6) if summed else None
    got = cudnn(x, weight, bias, residual, (1, 1), (1, 1), (1, 1), 1)
    assert torch.equal(got, definition(x, weight, bias, residual, {"padding": 1}))
    model, _, _, x = made("small")
    said: list[str] = []
    switches = AttackSwitches(fused_conv=True, winograd=False)
    engine = AttackEngine(model, x[:2], switches=switches, fallbacks=CollectedIn(said))
    assert engine.replica.num_fused == 0
    assert ["not deterministic" in text for text in said] == [True]


def test_the_next_process_chooses_the_same_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stored timings make a resumed run use the same kernels, whatever it would measure itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, _, _, x = made("small")
    races: list[str] = []

    def timed(calls: dict[str, Any], device: torch.device, seconds: float) -> dict[str, float]:
        races.append("".join(calls))
        slower = len(races) < 4  # of which each needs a second race to confirm it
        return {"cudnn": 1.0 + 2 * slower, "apart": 1.0}

    monkeypatch.setattr(speed, "timed", timed)
    chosen = []
    for _ in range(3):
        monkeypatch.setattr(speed, "_winners", {})
        replica = AttackReplica(model, x, fused_conv=True, winograd=False)
        fusion_choice.fuse_where_faster(replica.network, replica._fused, x, compiled=True)
        chosen.append([layer.fused for layer in replica._fused])
        if len(chosen) == 1:
            first = len(races)
    assert len(races) == first
    assert chosen[0] == chosen[1] == chosen[2]
    assert set(chosen[0]) == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_compiled_it_is_still_one_operator(dtype: torch.dtype | None) -> None:
    model, _, _, x = made("small")
    y, found, said = torch.arange(len(x)), [], []
    for fused in (True, False):
        switches = AttackSwitches(dtype=dtype, fused_conv=fused, winograd=False, compile="default")
        engine = AttackEngine(model, x[:2], switches=switches, fallbacks=CollectedIn(said))
        torch.manual_seed(1)
        found.append(engine.run(x, AttackGoal("ce", y), SPEC).x_adv)
    assert not said
    assert (found[0] != found[1]).float().mean() < 0.05  # sums are rounded in another order


@pytest.mark.slow
def test_inductor_makes_one_kernel_of_mask_and_residual_sum() -> None:
    """Compiled, at most one pointwise kernel lies between two convolutions, forward and backward."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), BasicBlock(8, 8, 1), BasicBlock(8, 8, 1), nn.Flatten()
    ).eval()
    x = torch.rand(2, 3, 8, 8)
    network = AttackReplica(model, x, winograd=False).network

    def gradient(x: Tensor) -> Tensor:
        out, pull = torch.func.vjp(lambda leaf: network(leaf.view_as(leaf)), x)
        return pull(torch.ones_like(out))[0]

    _, codes = run_and_get_code(torch.compile(gradient, fullgraph=True), x)
    body = codes[-1][codes[-1].index("def call(") :]
    calls = re.findall(
        r"(cpp_fused\w*)\(|= (?:extern_kernels\.|torch\.ops\.aten\.)(convolution)\w*[.(]", body
    )
    kinds = "".join("c" if convolution else "p" for _, convolution in calls)
    assert kinds.count("c") == 10  # five convolutions, each forward and back
    assert "pp" not in kinds
    assert any("add" in name and "threshold_backward" in name for name, _ in calls)
