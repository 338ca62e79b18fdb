"""Refolding of batch norm: the formula's values in the replica's dtype and layout, in few launches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.batch_norm_folding import fold_batch_norm, refresh_folds
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.fx_tracing import NotFoldable
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.models import build_model

ONE_EACH = 9  # launches that do not grow with the number of layers


class Launches(TorchDispatchMode):
    """Kernels that a GPU would launch: one per foreach operator on the fast route, else one per tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        if name.startswith("_foreach"):
            lists = [a for a in args if isinstance(a, (list, tuple)) and isinstance(a[0], Tensor)]
            self.names += [name] * (1 if fast_route(lists) else len(lists[0]))
        elif not func.is_view and name not in ("detach", "empty_like"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def fast_route(lists: list[Any]) -> bool:
    """ATen/native/ForeachUtils.h: one dtype within each list, equal shapes and strides across them."""
    alike = all(len({t.dtype for t in tensors}) == 1 for tensors in lists)
    rows = [[(t.shape, t.stride()) for t in row] for row in zip(*lists, strict=True)]
    return alike and all(len(set(row)) == 1 for row in rows)


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> None:
    """Weights and statistics as in the middle of a training."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not name.startswith("normalize"):
            noise = torch.rand(value.shape, generator=generator).to(value)
            value.copy_(noise + 0.5 if name.endswith("running_var") else value + 0.2 * (noise - 0.5))


def parts() -> nn.Module:
    """Layers and batch norms with and without bias and affine parameters, and one after a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, eps=1e-3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, groups=2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 9, 6),
        nn.BatchNorm1d(6),
    )


def network_of(name: str) -> nn.Module:
    return parts() if name == "parts" else build_model(name, num_classes=10, image_shape=(3, 8, 8))


def wanted(fold: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64 from the definition, channel by channel."""
    bn, layer = fold.bn, fold.layer
    ones = torch.ones_like(bn.running_mean)
    gamma, beta = (
        (ones if bn.weight is None else bn.weight).double(),
        (0 * ones if bn.bias is None else bn.bias).double(),
    )
    bias = (0 * ones if layer.bias is None else layer.bias).double()
    scale = gamma / (bn.running_var.double() + bn.eps).sqrt()
    weight = torch.stack([s * w for s, w in zip(scale, layer.weight.double(), strict=True)])
    return weight, beta + scale * (bias - bn.running_mean.double())


@pytest.mark.parametrize("name", ["parts", "resnet18", "wrn-10-1"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_the_formulas_values_arrive_where_the_replica_has_its_own(
    name: str, last: bool, dtype: torch.dtype | None
) -> None:
    model = network_of(name).eval()
    if last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    replica = AttackReplica(model, torch.rand(2, 3, 8, 8), dtype=dtype, channels_last=last, winograd=False)
    held = [(f.folded.weight, f.folded.bias, f.folded.weight.data_ptr()) for f in replica._folds]
    assert len(held) == {"parts": 4, "resnet18": 20, "wrn-10-1": 3}[name]
    shake(model)
    replica.refresh()
    unit = torch.finfo(dtype or torch.float32).eps / 2
    for fold, (weight, bias, address) in zip(replica._folds, held, strict=True):
        assert fold.folded.weight is weight
        assert weight.data_ptr() == address
        assert weight.dtype == bias.dtype == (dtype or torch.float32)
        assert weight.dim() != 4 or not last or weight.is_contiguous(memory_format=torch.channels_last)
        # One rounding to the replica's dtype, after four in float32.
        exact_weight, exact_bias = wanted(fold)
        allowed = unit + 4 * torch.finfo(torch.float32).eps
        smallest = (
            torch.finfo(weight.dtype).smallest_normal * unit * 2
        )  # the spacing of fp16's subnormal numbers
        assert ((weight.double() - exact_weight).abs() <= allowed * exact_weight.abs() + smallest).all()
        # The bias is a difference: it rounds as its terms do.
        terms = wanted_terms(fold)
        assert ((bias.double() - exact_bias).abs() <= unit * exact_bias.abs() + 4e-7 * terms + smallest).all()


def wanted_terms(fold: Any) -> Tensor:
    """The largest terms of the folded bias."""
    bn, layer = fold.bn, fold.layer
    scale = (torch.ones_like(bn.running_mean) if bn.weight is None else bn.weight).abs() / (
        bn.running_var + bn.eps
    ).sqrt()
    beta = 0 if bn.bias is None else bn.bias.abs()
    return beta + scale * (bn.running_mean.abs() + (0 if layer.bias is None else layer.bias.abs()))


def test_float64_replicas_are_folded_in_float64() -> None:
    model = parts().double().eval()
    _, folds = fold_batch_norm(model, torch.rand(2, 3, 8, 8, dtype=torch.float64))
    shake(model)
    refresh_folds(folds)
    for fold in folds:
        for got, want in zip((fold.folded.weight, fold.folded.bias), wanted(fold), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 20), ("parts", 4)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_refresh_is_one_launch_per_weight_and_a_few(
    name: str, layers: int, dtype: torch.dtype | None
) -> None:
    """Not eight per layer (160 for ResNet-18); a model in the replica's layout is copied in one launch."""
    model = network_of(name).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    replica = AttackReplica(model, torch.rand(2, 3, 8, 8), dtype=dtype, channels_last=True, winograd=False)
    with Launches() as launches:
        replica.refresh()
    assert len(launches.names) <= layers + ONE_EACH, launches.names
    assert launches.names.count("mul") == layers
    assert not {"_to_copy", "copy_", "clone"} & set(launches.names)


def test_the_count_would_notice_work_layer_by_layer() -> None:
    vectors, wide = [torch.rand(3), torch.rand(4)], [torch.rand(3, 2), torch.rand(4, 2)]
    scales = [v.view(-1, 1) for v in vectors]
    for lists, expected in (((vectors, vectors), 1), ((wide, scales), 2)):
        with Launches() as launches:
            torch._foreach_mul(*lists)
        assert len(launches.names) == expected


class Casts(TorchDispatchMode):
    """Tensors that an operator converts to another dtype or memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("_to_copy", "clone", "contiguous"):
            self.addresses += [t.data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_no_step_of_an_attack_converts_a_weight(last: bool) -> None:
    """Autocast would convert frozen float32 weights at every call: its cache holds trainable ones only."""
    model = tiny_cnn().eval()
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    engine = AttackEngine(model, x[:2], switches=AttackSwitches(dtype=torch.bfloat16, channels_last=last))
    engine.refresh()
    weights = {p.data_ptr() for p in engine.replica.network.parameters()} | {
        p.data_ptr() for p in model.parameters()
    }
    with Casts() as casts:
        engine.run(x, AttackGoal("ce", y), PGDSpec(0.1, 0.05, 2))
    assert casts.addresses  # the iterate is rounded for the network
    assert not weights & set(casts.addresses)


class NormAct(nn.BatchNorm2d):
    """Batch norm and ReLU in one layer, as timm has them."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        training = self.training or self.running_mean is None
        return F.relu(F.batch_norm(x, *tensors, training=training, eps=self.eps))


class Taking(nn.Module):
    """Convolution, norm, and a part whose control flow depends on the size of its input."""

    def __init__(self, norm: nn.Module, *, twice: bool = False, inside: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(3, 4, 3), norm, twice
        self.pool = Pool(self.conv if inside else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.pool(self.norm(x) if self.twice else x)


class Pool(nn.Module):
    def __init__(self, conv: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.linear = conv, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = x + self.conv(x[:, :3]).mean()
        return self.linear(x.mean((2, 3)) if x.shape[-1] > 1 else x.flatten(1))


def test_a_norm_that_calls_the_function_is_folded_beside_a_part_that_is_not_traced() -> None:
    model = Taking(NormAct(4)).eval()
    folded, folds = fold_batch_norm(model, torch.rand(2, 3, 8, 8))
    shake(model)
    refresh_folds(folds)
    assert len(folds) == 1
    assert type(folded.get_submodule("pool")) is Pool
    for size in (8, 3):  # the part takes its other way
        x = torch.rand(2, 3, size, size)
        torch.testing.assert_close(folded(x), model(x))


class OtherEps(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.1)


class OtherTensor(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.weight, self.running_var, self.bias, eps=self.eps)


@pytest.mark.parametrize(
    "model",
    [
        Taking(NormAct(4), twice=True),
        Taking(NormAct(4), inside=True),
        Taking(nn.BatchNorm2d(4), inside=True),
        Taking(OtherEps(4)),
        Taking(OtherTensor(4)),
        Taking(NormAct(4, track_running_stats=False)),
    ],
    ids=["two calls", "convolution read inside", "plain norm", "other eps", "other tensors", "batch"],
)
def test_what_is_more_than_one_affine_map_is_not_folded(model: nn.Module) -> None:
    with pytest.raises(NotFoldable, match="no batch norm in eval mode directly after"):
        fold_batch_norm(model.eval(), torch.rand(2, 3, 8, 8))
