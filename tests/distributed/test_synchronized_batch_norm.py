"""Synchronised batch norm: uneven shards give what one process computes on the whole batch."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.collectives import counted_collectives
from torch import Tensor, nn

from fastdynat.distributed import apart, replicated_batch, world
from fastdynat.distributed.synchronized_batch_norm import plain_batch_norm, synchronize_batch_norm
from fastdynat.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}
KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _WithReLU(nn.BatchNorm2d):
    """A forward pass of its own, in the manner of timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(self.training)
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *statistics, self.training, self.momentum, self.eps).relu()


class _ByHand(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True)


def _data(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Nine images, far from mean 0, and the gradient of a loss at the outputs."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(9, *shape, generator=generator, dtype=torch.float64) + 20
    return x.to(dtype), torch.randn(9, *shape, generator=generator, dtype=torch.float64).to(dtype)


def _layer(kind: type[nn.Module], options: dict) -> nn.Module:
    layer = kind(4, dtype=torch.float64, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 4))
            layer.bias.copy_(torch.linspace(-1, 1, 4))
    return layer


def _passes(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Three passes; the last one's output and gradients, and the buffers."""
    for _ in range(3):
        layer.zero_grad()
        shard = x.clone().requires_grad_()
        y = layer(shard)
        y.backward(dy)
    found = {"y": y.detach(), "dx": shard.grad}
    found |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    return found | dict(layer.named_buffers())


def _on_shards(kind: type[nn.Module], options: dict, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], int]:
    here, (x, dy) = world(), _data(shape)
    layer = _layer(kind, options)
    assert synchronize_batch_norm(layer) == 1
    with counted_collectives() as calls:
        found = _passes(layer, x[here.rank :: here.size], dy[here.rank :: here.size])
    return found, len(calls)


def _shape(kind: type[nn.Module]) -> tuple[int, ...]:
    return {nn.BatchNorm1d: (4,), nn.BatchNorm3d: (4, 2, 3, 2)}.get(kind, (4, 3, 3))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.BatchNorm1d, {}),
        (nn.BatchNorm2d, {}),
        (nn.BatchNorm3d, {}),
        (nn.BatchNorm2d, {"momentum": None}),
        (nn.BatchNorm2d, {"affine": False}),
        (nn.BatchNorm2d, {"track_running_stats": False}),
        (_WithReLU, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
def test_uneven_shards_give_what_one_process_computes(ranks, kind, options) -> None:
    shape = _shape(kind)
    want = _passes(_layer(kind, options), *_data(shape))
    shards, calls = zip(*ranks(2)(_on_shards, kind, options, shape), strict=True)
    assert calls == (6, 6)  # one in each forward and one in each backward pass
    assert [len(shard["y"]) for shard in shards] == [5, 4]
    for name, value in want.items():
        for rank, found in enumerate(shards):
            if name in ("y", "dx"):
                torch.testing.assert_close(found[name], value[rank::2], **EXACT)
            elif not name.startswith("gradient"):
                torch.testing.assert_close(found[name], value, **EXACT)
        if name.startswith("gradient"):
            torch.testing.assert_close(shards[0][name] + shards[1][name], value, **EXACT)


def _syncbatchnorm() -> dict[str, Tensor]:
    here, (x, dy) = world(), _data((4, 3, 3))
    layer = nn.SyncBatchNorm(4, dtype=torch.float64)
    synchronize_batch_norm(layer)
    with replicated_batch():
        layer(x)  # its own forward pass would refuse tensors on the CPU
    layer.reset_running_stats()
    return _passes(layer, x[here.rank :: here.size], dy[here.rank :: here.size])


def test_the_user_s_own_syncbatchnorm_synchronises_on_the_cpu(ranks) -> None:
    want = _passes(nn.BatchNorm2d(4, dtype=torch.float64), *_data((4, 3, 3)))
    for rank, found in enumerate(ranks(2)(_syncbatchnorm)):
        torch.testing.assert_close(found["dx"], want["dx"][rank::2], **EXACT)
        torch.testing.assert_close(found["running_var"], want["running_var"], **EXACT)


def _in_half(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    here, (x, dy) = world(), _data((4, 3, 3), dtype)
    layer = _layer(nn.BatchNorm2d, {}).float()
    synchronize_batch_norm(layer)
    x = x[here.rank :: here.size].to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype):
        found = _passes(layer, x, dy[here.rank :: here.size])
    assert found["dx"].is_contiguous(memory_format=torch.channels_last)
    return found["y"], found["dx"], found["running_var"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_have_statistics_in_float32(ranks, dtype) -> None:
    x, dy = _data((4, 3, 3), dtype)
    want = _passes(_layer(nn.BatchNorm2d, {}), x.double(), dy.double())
    for rank, (y, dx, variance) in enumerate(ranks(2)(_in_half, dtype)):
        assert y.dtype == dx.dtype == dtype
        rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
        torch.testing.assert_close(y.double(), want["y"][rank::2], **rounding)
        torch.testing.assert_close(dx.double(), want["dx"][rank::2], **rounding)
        torch.testing.assert_close(variance.double(), want["running_var"], rtol=1e-5, atol=0)


def _far_from_zero() -> Tensor:
    here, (x, _) = world(), _data((4, 8, 8))
    layer = nn.BatchNorm2d(4, momentum=1.0)
    synchronize_batch_norm(layer)
    layer((x + 1000).float()[here.rank :: here.size])
    return layer.running_var


def test_variances_survive_a_large_mean(ranks) -> None:
    x, _ = _data((4, 8, 8))
    exact = (x + 1000).float().double().transpose(0, 1).flatten(1).var(1)
    for found in ranks(2)(_far_from_zero):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def _quiet_passes() -> tuple[int, bool, bool, bool]:
    x, dy = _data((4, 3, 3))
    network = nn.Sequential(_layer(nn.BatchNorm2d, {}))
    usual = copy.deepcopy(network)
    synchronize_batch_norm(network)
    with counted_collectives() as calls:
        with replicated_batch():
            found, want = _passes(network, x, dy), _passes(usual, x, dy)
        equal = all(torch.equal(found[name], want[name]) for name in want)
        network.eval()
        usual.eval()
        evaluated = torch.equal(network(x), usual(x))
        network.train()
        with apart():
            network(x)
        plain_batch_norm(network)(x)
    return len(calls), equal, evaluated, type(network[0]) is nn.BatchNorm2d


def test_nothing_is_communicated_where_nothing_is_shared(ranks) -> None:
    """In eval mode, where every rank has the whole batch, and once the layers are plain again."""
    assert ranks(2)(_quiet_passes) == [(0, True, True, True)] * 2


def test_only_the_class_of_a_layer_changes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4))
    seen: list[nn.Module] = []
    network[1].register_forward_hook(lambda layer, *_: seen.append(layer))
    before, tensors = list(network.state_dict()), [*network.parameters(), *network.buffers()]
    assert synchronize_batch_norm(network) == synchronize_batch_norm(network) == 2
    assert isinstance(network[1], nn.BatchNorm2d)
    assert list(network.state_dict()) == before
    assert all(a is b for a, b in zip(tensors, [*network.parameters(), *network.buffers()], strict=True))
    copied = copy.deepcopy(network)
    network(torch.rand(2, 3, 4, 4))
    assert seen == [network[1]]
    plain_batch_norm(copied)
    assert type(copied[1]) is nn.BatchNorm2d
    assert type(network[1]) is not nn.BatchNorm2d


def _refused(build: Callable[[], nn.Module]) -> str:
    try:
        layer = build()
        synchronize_batch_norm(layer)
        layer(torch.rand(3, 4, 2, 2))
    except UserError as error:
        return str(error)
    return ""


def _replaced_forward() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return nn.Sequential(layer)


def _own_group() -> nn.Module:
    return nn.SyncBatchNorm(4, process_group=object())


def _by_hand() -> nn.Module:
    return _ByHand(4)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_replaced_forward, "batch norm 0 was replaced"),
        (_own_group, "process group of its own"),
        (_by_hand, "_ByHand does not call torch.nn.functional.batch_norm"),
    ],
)
def test_what_cannot_be_synchronised_is_refused(ranks, build, words) -> None:
    for message in ranks(2)(_refused, build):
        assert words in message


def _compiled(backend: str) -> tuple[float, int]:
    """The largest difference between the compiled network and the same network, uncompiled."""
    here, (x, dy) = world(), _data((4, 3, 3))
    x, dy = x[here.rank :: here.size], dy[here.rank :: here.size]
    network = nn.Sequential(
        _layer(nn.BatchNorm2d, {"momentum": None}), nn.ReLU(), _layer(_WithReLU, {"affine": True})
    )
    synchronize_batch_norm(network)
    want = _passes(copy.deepcopy(network), x, dy)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend=backend)
    with counted_collectives() as calls:
        found = _passes(compiled, x, dy)
    names = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    return max(float((names[name] - value).abs().max()) for name, value in want.items()), len(calls)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_communicates_the_same(ranks, backend) -> None:
    for difference, calls in ranks(2)(_compiled, backend):
        assert difference < 1e-12
        assert calls == 12


def _shapes_of_one_rank() -> float:
    """A pass at a shape that the other rank does not have."""
    x, _ = _data((4, 3, 3))
    layer = synchronized = _layer(nn.BatchNorm2d, {})
    usual = copy.deepcopy(layer)
    synchronize_batch_norm(synchronized)
    if world().first:
        with apart():
            return float((synchronized(x[:3]) - usual(x[:3])).abs().max())
    return 0.0


def test_apart_a_rank_is_the_only_one(ranks) -> None:
    assert max(ranks(2)(_shapes_of_one_rank)) < 1e-12


def _penalty(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The gradients of a function of the input gradient, as gradient penalties and GradAlign take them."""
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad((layer(x).tanh() * dy).sum(), x, create_graph=True)
    (dx.square() * (1 + dy)).sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def _twice(options: dict) -> float:
    """The largest difference to the layer of one process with the whole batch."""
    here, (x, dy) = world(), _data((4, 3, 3))
    synchronized = _layer(nn.BatchNorm2d, options)
    usual = copy.deepcopy(synchronized)
    synchronize_batch_norm(synchronized)
    want = _penalty(usual, x, dy)
    want["x"] = want["x"][here.rank :: here.size]
    got = _penalty(synchronized, x[here.rank :: here.size], dy[here.rank :: here.size])
    for name, value in got.items():
        if name != "x":
            here.sum_(value)
    return max(float(((got[name] - value) / value.abs().max()).abs().max()) for name, value in want.items())


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_second_derivatives_are_those_of_the_whole_batch(ranks, options) -> None:
    assert max(ranks(2)(_twice, options)) < 1e-10
