"""Choice of Winograd convolutions: by a stated cost, never with stale weights, never in vain."""

import copy
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.graph_sim import SimulatedRecorder
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat import PGD, verification
from fastdynat.attack_engine import winograd_layers as layers
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.attack_engine.winograd_layers import WinogradConv2d
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import attacked
from fastdynat.machine import capability, vector_bits
from fastdynat.ops import use_backend, winograd
from fastdynat.ops.image_conv_grad import IMPLEMENTATIONS as IMAGE_IMPLEMENTATIONS
from fastdynat.tuning import Convolution, Costs
from fastdynat.tuning.devices import check_winograd, winograd_pays
from fastdynat.verification import judge

WIDE, NARROW = Costs.with_vectors(512), Costs.with_vectors(256)
STILL = math.inf
CPU = torch.device("cpu")


def square(channels: int, size: int, images: int, last: bool = True) -> Convolution:
    return Convolution(images, channels, channels, size, size, last)


# (channels, size, images, channels-last, passes with one set of weights) -> by Winograd's algorithm on
# AVX-512? The first part was measured: what is taken is 1.2 to 2.4 times as fast; what is not is slower, but
# for one image of 512 channels at 7x7.
TABLE = [
    (64, 32, 1, True, STILL, True),
    (64, 32, 32, True, STILL, True),
    (64, 32, 32, False, STILL, True),
    (64, 8, 128, True, STILL, True),
    (128, 16, 4, True, STILL, True),
    (128, 16, 16, False, STILL, True),
    (128, 8, 1, True, STILL, False),
    (128, 8, 64, True, STILL, True),
    (128, 4, 4, True, STILL, False),
    (128, 4, 128, False, STILL, True),
    (160, 32, 1, True, STILL, True),
    (192, 8, 1, True, STILL, False),
    (256, 8, 16, True, STILL, True),
    (256, 4, 4, True, STILL, False),
    (256, 4, 64, False, STILL, True),
    (320, 16, 1, False, STILL, True),
    (512, 4, 1, True, STILL, False),
    (512, 4, 16, True, STILL, True),
    (512, 2, 128, True, STILL, False),
    (640, 8, 4, True, STILL, True),
    (128, 28, 1, True, STILL, True),
    (256, 14, 4, True, STILL, True),
    (512, 7, 1, True, STILL, False),
    (512, 14, 1, True, STILL, True),
    # ResNet-18, batch 8, PGD-3: transforming takes 2, 10 and 36 ms where a pair of passes saves 2.5, 3.5 and
    # 2.
    (64, 32, 8, True, 3, True),
    (128, 16, 8, True, 3, True),
    (512, 4, 8, True, 3, False),
    (512, 4, 8, True, 10, False),
    # The same with PGD-10 at batch 128, one step, and none.
    (512, 4, 128, True, 10, True),
    (256, 8, 8, True, 1, False),
    (512, 4, 32, True, 1, False),
    (512, 4, 128, True, 1, True),
    (128, 16, 128, True, 0, False),
    (160, 32, 8, True, 1, True),
    (640, 8, 8, True, 3, True),
    (640, 8, 8, True, 1, False),
    (640, 8, 128, True, 10, True),
]


@pytest.mark.parametrize(("channels", "size", "images", "last", "passes", "taken"), TABLE)
def test_the_choice_is_that_of_the_clock(
    channels: int, size: int, images: int, last: bool, passes: float, taken: bool
) -> None:
    assert square(channels, size, images, last).repays(WIDE, passes) == taken


@pytest.mark.parametrize(("channels", "size"), [(64, 32), (128, 16), (256, 8), (512, 4)])
def test_narrow_vectors_gain_less(channels: int, size: int) -> None:
    """Measured with AVX2, batches of 4 to 32, channels-last: 1.4, 1.8, 1.9 and 2.4 for these."""
    work = square(channels, size, 32)
    assert 1.2 < work.direct(NARROW) / work.winograd(NARROW) < 2.4
    assert work.direct(NARROW) / work.winograd(NARROW) < work.direct(WIDE) / work.winograd(WIDE)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13])
def test_what_the_cost_counts(size: int) -> None:
    """Products of direct convolution by brute force; tiles by the operator's own transformed input."""
    free = Costs(1.0, *(0.0,) * 7)
    ones = torch.ones(1, 1, size, size, dtype=torch.float64)
    taps = float(F.conv2d(ones, torch.ones(1, 1, 3, 3, dtype=torch.float64), padding=1).sum())
    assert Convolution(2, 3, 5, size, size, True).direct(free) == 2 * 2 * taps * 15
    tiles = len(list(itertools.product(range(0, size, 4), repeat=2)))
    assert Convolution(2, 3, 5, size, size, True).winograd(free) == 2 * 36 * 2 * tiles * 15


def test_the_vectors_of_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    for flags, bits in (
        ({"avx2", "fma"}, 256),
        ({"avx2", "avx512f"}, 512),
        ({"asimd"}, 512),
        (set[str](), 512),
    ):
        monkeypatch.setattr(capability, "_cpu_info", lambda flags=flags: ("", flags))
        assert vector_bits() == bits
    monkeypatch.setattr(capability, "_cpu_info", lambda: ("", {"avx2", "avx512f"}))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert vector_bits() == 256
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert vector_bits() == 512


class Net(nn.Sequential):
    """On 3 images of 16x16 its three wide convolutions pay from 2, 9 and 7 pairs of passes on."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(256, 10),
        )


NAMES = {(128, 128): "A", (128, 256): "B", (256, 256): "C"}


@pytest.fixture
def transformed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose weights were transformed, in order. On the processor that the table is of."""
    found: list[str] = []

    def counting(weight: Tensor, **how: Any) -> Any:
        found.append(NAMES[weight.shape[1], weight.shape[0]])
        return real(weight, **how)

    real = layers.winograd_weights
    monkeypatch.setattr(layers, "winograd_weights", counting)
    monkeypatch.setattr(layers, "vector_bits", lambda: 512)
    return found


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


def batch(n: int = 3, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=generator), torch.randint(10, (n,), generator=generator)


@torch.no_grad()
def move(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter) * parameter.std(correction=0))


def attack(engine: AttackEngine, n: int = 3, steps: int = 3) -> Tensor:
    x, y = batch(n)
    return engine.run(x, AttackGoal("ce", y), PGDSpec(8 / 255, 2 / 255, steps, start="none")).x_adv


def engine(net: nn.Module, **how: Any) -> AttackEngine:
    return AttackEngine(net, batch()[0][:2], switches=AttackSwitches(channels_last=True, **how))


def without_kernels(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and input gradient of a replica that must have no compiled kernel of its own, by torch."""
    replica = AttackReplica(net, x[:2], channels_last=True)
    replica.prepare(x, math.inf)
    assert replica.num_winograd == 0
    assert not any(getattr(layer, "has_operator", False) for layer in replica.network.modules())
    return logits_and_gradient(replica.network, x)


def logits_and_gradient(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    logits = network(leaf)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]


def assert_those_of_the_network(found: tuple[Tensor, Tensor], net: nn.Module, x: Tensor) -> None:
    want = logits_and_gradient(net, x)
    torch.testing.assert_close(found[0], want[0], rtol=1e-4, atol=1e-5)
    assert float((found[1] - want[1]).norm() / want[1].norm()) < 2e-2  # ReLUs at zero switch


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No verdicts of this process or an earlier one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("_known", "_warned"):
        monkeypatch.setattr(judge, name, type(getattr(judge, name))())


@needs("ext")
def test_kernels_that_the_check_finds_wrong_are_not_run(
    net: nn.Module, unverified: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("a wrong kernel was run")

    for table in (winograd.CONV_IMPLEMENTATIONS, winograd.WEIGHTS_IMPLEMENTATIONS, IMAGE_IMPLEMENTATIONS):
        monkeypatch.setitem(table, "cpp", broken)
    x = batch(8)[0]
    with pytest.warns(RuntimeWarning) as heard:
        found = without_kernels(net, x)
    assert not winograd_pays(CPU, "off", channels_last=True)
    with pytest.raises(UserError, match="--winograd on: its kernel is wrong on this machine"):
        check_winograd(CPU, "off")
    # The check of the filter transform is not needed any more.
    assert [str(w.message).partition(":")[0] for w in heard] == [winograd.CONV, "image_conv_grad"]
    assert_those_of_the_network(found, net, x)


@needs("ext")
@pytest.mark.parametrize("op", [winograd.CONV, winograd.WEIGHTS])
def test_one_wrong_kernel_of_two_is_enough(net: nn.Module, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = verification.CandidateVerdict(False, "a case", "planted")
    monkeypatch.setitem(judge._known, (op, CPU), {"cpp": wrong})
    assert AttackReplica(net, batch()[0][:2], channels_last=True).num_winograd == 0


@needs("ext")
def test_kernels_that_were_not_asked_for_are_not_run(
    net: nn.Module, transformed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a replica that is built then, nor in one that was built before."""
    x = batch(8)[0]
    before = AttackReplica(net, x[:2], channels_last=True)
    before.prepare(x, math.inf)
    assert before.num_winograd == 3
    for table in (winograd.CONV_IMPLEMENTATIONS, IMAGE_IMPLEMENTATIONS):
        monkeypatch.delitem(table, "cpp")
    with use_backend("eager"):
        assert not winograd_pays(CPU, "off", channels_last=True)
        with pytest.raises(UserError, match="--winograd on is a kernel of --kernels cpp"):
            check_winograd(CPU, "off")
        assert_those_of_the_network(without_kernels(net, x), net, x)
        assert_those_of_the_network(logits_and_gradient(before.network, x), net, x)
    assert transformed == []
    monkeypatch.setenv("FASTDYNAT_KERNELS", "eager")
    assert_those_of_the_network(without_kernels(net, x), net, x)


@needs("ext")
def test_a_replica_transforms_nothing_before_it_is_used(net: nn.Module, transformed: list[str]) -> None:
    mine = engine(net)
    for _ in range(3):
        mine.refresh()
    assert transformed == []
    assert "up to 3 Winograd convolutions" in mine.path


@needs("ext")
@pytest.mark.parametrize(("steps", "want"), [(1, ""), (3, "A"), (8, "AC"), (20, "ABC")])
def test_in_training_only_what_repays_is_transformed(
    net: nn.Module, transformed: list[str], steps: int, want: str
) -> None:
    """Every batch alike, also the first: a run that is resumed has another first one."""
    mine = engine(net)
    for _ in range(3):
        mine.refresh()
        attack(mine, steps=steps)
        assert "".join(transformed) == want
        transformed.clear()
        move(net)


@needs("ext")
def test_a_small_batch_costs_nothing(net: nn.Module, transformed: list[str]) -> None:
    mine = engine(net)
    for n, want in ((4, "A"), (1, ""), (4, "A"), (32, "ABC")):
        mine.refresh()
        attack(mine, n)
        assert "".join(transformed) == want
        transformed.clear()


@needs("ext")
def test_an_evaluation_transforms_once(net: nn.Module, transformed: list[str]) -> None:
    pgd, (x, y) = PGD(net, steps=2, channels_last=True), batch()
    for _ in range(4):
        pgd(x, y)
    assert sorted(transformed) == ["A", "B", "C"]
    ascent = attacked(net, x)
    transformed.clear()
    for n in (4, 3, 4):
        ascent.gradient(x[:n], AttackGoal("ce", y[:n]))
    assert len(transformed) == len(set(transformed))
    assert "A" in transformed


@needs("ext")
def test_a_training_loop_around_the_drop_in_pays_for_what_repays(
    net: nn.Module, transformed: list[str]
) -> None:
    pgd, (x, y) = PGD(net, steps=3, channels_last=True), batch()
    pgd(x, y)
    for _ in range(3):
        transformed.clear()
        move(net)
        pgd(x, y)
        assert transformed == ["A"]
    transformed.clear()
    for _ in range(6):  # and an evaluation after it is one again
        pgd(x, y)
    assert sorted(transformed) == ["B", "C"]


@needs("ext")
@pytest.mark.parametrize("frozen", [2, 6, 8])
def test_a_frozen_layer_does_not_hide_that_others_are_trained(
    net: nn.Module, transformed: list[str], frozen: int
) -> None:
    """Of A, B and C, only A repays within three steps."""
    pgd, (x, y) = PGD(net, steps=3, channels_last=True), batch()
    pgd(x, y)
    for _ in range(6):
        transformed.clear()
        kept = net[frozen].weight.detach().clone()
        move(net)
        with torch.no_grad():
            net[frozen].weight.copy_(kept)
        pgd(x, y)
        assert transformed == ([] if frozen == 2 else ["A"])


@needs("ext")
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_attack_is_that_of_the_direct_convolutions(net: nn.Module, channels_last: bool) -> None:
    x, y = batch(32)
    switches = [AttackSwitches(channels_last=channels_last, winograd=on) for on in (True, False)]
    fast, slow = (AttackEngine(net, x[:2], switches=each) for each in switches)
    for _ in range(2):
        for each in (fast, slow):
            each.refresh()
            each.prepare(x)
        got, want = (each.gradient(x, AttackGoal("ce", y)) for each in (fast, slow))
        layers_of = (m for m in fast.replica.network.modules() if isinstance(m, WinogradConv2d))
        used = [layer.transformed.current for layer in layers_of]
        assert used == [True, True, True]
        assert float((got - want).norm() / want.norm()) < 2e-2  # ReLUs at zero switch
        torch.testing.assert_close(fast.logits(x), slow.logits(x), rtol=1e-4, atol=1e-4)
        move(net)


CALLS: dict[str, Callable[[AttackEngine, int, int], object]] = {
    "logits": lambda mine, n, steps: mine.logits(batch(n)[0]),
    "run": attack,
    "gradient": lambda mine, n, steps: mine.gradient(batch(n)[0], AttackGoal("ce", batch(n)[1])),
}


@needs("ext")
@pytest.mark.parametrize("recorder", [None, SimulatedRecorder], ids=["eager", "captured"])
@pytest.mark.parametrize("compares", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_weights_are_never_stale(
    net: nn.Module,
    seed: int,
    compares: bool,
    recorder: type[SimulatedRecorder] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whatever order weights move, whichever of them, and attacks of whatever size come."""
    monkeypatch.setattr(AttackEngine, "compares", compares)
    draw, switches = random.Random(seed), AttackSwitches(channels_last=True)
    x = batch()[0][:2]
    fast = AttackEngine(net, x, switches=switches, recorder=None if recorder is None else recorder())
    for _ in range(6):
        if draw.random() < 0.6:
            move(draw.choice([net, net[2], net[6], net[8]]))
        fast.refresh()
        for _ in range(draw.randint(1, 2)):
            CALLS[draw.choice(list(CALLS))](fast, draw.choice([1, 4, 8]), draw.choice([1, 4]))
        x = batch(draw.choice([1, 4, 8]))[0]
        torch.testing.assert_close(fast.logits(x), net(x), rtol=1e-3, atol=1e-3)


@needs("ext")
def test_replays_of_a_captured_attack_read_the_weights_of_now(net: nn.Module, transformed: list[str]) -> None:
    slow = AttackEngine(net, batch()[0][:2], switches=AttackSwitches(channels_last=True, winograd=False))
    fast = AttackEngine(
        net, batch()[0][:2], switches=AttackSwitches(channels_last=True), recorder=SimulatedRecorder()
    )
    for number in range(3):
        for each in (fast, slow):
            each.refresh()
        got, want = attack(fast, steps=8), attack(slow, steps=8)
        assert float((got != want).float().mean()) < 0.02, number
        assert sorted(transformed) == ["A", "C"]
        transformed.clear()
        move(net)


@needs("ext")
def test_compiled_code_stays_valid_and_reads_the_weights_of_now(
    net: nn.Module, transformed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda fn, options=None, **how: compiler(fn, backend="aot_eager", **how)
    )
    torch._dynamo.reset()
    fast, slow = engine(net, compile="default"), engine(net, winograd=False)
    counters.clear()
    for number in range(3):
        for each in (fast, slow):
            each.refresh()
        for n in (3, 1):  # the last batch of an epoch is smaller
            got, want = attack(fast, n, steps=8), attack(slow, n, steps=8)
            assert float((got != want).float().mean()) < 0.02, (number, n)
        assert sorted(transformed) == ["A", "C"]
        assert counters["stats"]["unique_graphs"] == 2, "one graph for each size of batch"
        transformed.clear()
        move(net)


@needs("ext")
def test_code_that_others_compile_takes_no_weights_that_may_be_stale(
    net: nn.Module, transformed: list[str]
) -> None:
    replica, (x, _) = AttackReplica(net, batch()[0][:2], channels_last=True), batch()
    network = torch.compile(replica.network, backend="eager", dynamic=False)
    replica.prepare(x, 100)
    replica.network(x)
    assert transformed == ["A", "B", "C"]
    for _ in range(3):
        move(net)
        replica.refresh()
        torch.testing.assert_close(network(x), net(x), rtol=1e-3, atol=1e-3)


@needs("ext")
def test_a_shallow_copy_of_a_layer_has_no_state_of_its_own(net: nn.Module, transformed: list[str]) -> None:
    replica, (x, _) = AttackReplica(net, batch()[0][:2], channels_last=True), batch()
    layer = next(m for m in replica.network.modules() if isinstance(m, WinogradConv2d))
    twin, z = copy.copy(layer), torch.rand(4, 128, 16, 16)
    for each in (layer, twin):
        each(z)
    move(net)
    replica.refresh()
    replica.prepare(x, 100)
    want = F.relu(F.conv2d(z, layer.weight, layer.bias, padding=1))  # it has taken its ReLU along
    torch.testing.assert_close(twin(z), want, rtol=1e-3, atol=1e-3)
    layer(z)
    assert transformed == ["A", "A"]


@needs("ext")
def test_weights_that_need_a_gradient_get_one(net: nn.Module) -> None:
    replica, (x, _) = AttackReplica(net, batch()[0][:2], channels_last=True), batch()
    replica.network.requires_grad_(True)
    replica.network(x).sum().backward()
    assert all(p.grad is not None for p in replica.network.parameters())
