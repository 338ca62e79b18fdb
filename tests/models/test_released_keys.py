"""Released state dicts under our names: equal logits with transcribed code and RobustBench's classes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.robustbench_classes import robustbench_module
from torch import Tensor, nn

from fastdynat.errors import UserError
from fastdynat.models import build_model, load_foreign
from fastdynat.models.initial_state import put_initial_state
from fastdynat.models.released_keys import in_our_names

CIFAR = (3, 32, 32)
X = torch.rand(3, *CIFAR, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def ours(name: str, *, image_shape: tuple[int, int, int] = CIFAR, normalised: bool = True) -> nn.Module:
    constants = {"mean": MEAN, "std": STD} if normalised else {}
    return build_model(name, num_classes=10, image_shape=image_shape, **constants)


def randomised(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random float64 values: also in statistics and in parameters that begin as 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, value in state.items():
        if not value.is_floating_point() or value.numel() == 0 or "normal" in key.partition(".")[0]:
            found[key] = value
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        fan_in = value[0].numel() if value.dim() > 1 else 1
        scaled = noise / fan_in**0.5 if value.dim() > 1 else 0.1 * noise + key.endswith(("weight", "var"))
        found[key] = scaled.abs() + 0.5 if key.endswith("running_var") else scaled
    return found


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts, eps=1e-5)  # type: ignore[arg-type]


def same(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """TensorFlow's SAME for a kernel of 3 on an even size."""
    return F.conv2d(F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)), weight, stride=stride)


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def deepminds_wide_forward(
    state: dict[str, Tensor], x: Tensor, blocks: int, act: Callable[..., Tensor]
) -> Tensor:
    """The forward of deepmind-research/adversarial_robustness/pytorch/model_zoo.py, by its names."""
    out = F.conv2d(normalised(x), state["init_conv.weight"], padding=1)
    for group in range(3):
        for index in range(blocks):
            name = f"layer.{group}.block.{index}"
            stride = 2 if group > 0 and index == 0 else 1
            pre = act(norm(out, state, f"{name}.batchnorm_0"))
            inner = act(norm(same(pre, state[f"{name}.conv_0.weight"], stride), state, f"{name}.batchnorm_1"))
            inner = F.conv2d(inner, state[f"{name}.conv_1.weight"], padding=1)
            if f"{name}.se.fc1.weight" in state:
                inner = inner * excitation(inner, state, f"{name}.se")
            projection = state.get(f"{name}.shortcut.weight")
            out = inner + (out if projection is None else F.conv2d(pre, projection, stride=stride))
    out = act(norm(out, state, "batchnorm")).mean((2, 3))
    return out @ state["logits.weight"].T + state["logits.bias"]


def excitation(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    small = F.relu(F.conv2d(mean, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
    return torch.sigmoid(F.conv2d(small, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"]))


def wide_state(blocks: int, widths: tuple[int, ...], squeeze: float = 0.0) -> dict[str, Tensor]:
    """Random weights by DeepMind's names."""
    state = {"init_conv.weight": torch.empty(widths[0], 3, 3, 3)}

    def add_norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = torch.empty(channels)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    for group in range(3):
        for index in range(blocks):
            before, after = widths[group if index == 0 else group + 1], widths[group + 1]
            name = f"layer.{group}.block.{index}"
            add_norm(f"{name}.batchnorm_0", before)
            state[f"{name}.conv_0.weight"] = torch.empty(after, before, 3, 3)
            add_norm(f"{name}.batchnorm_1", after)
            state[f"{name}.conv_1.weight"] = torch.empty(after, after, 3, 3)
            if before != after:
                state[f"{name}.shortcut.weight"] = torch.empty(after, before, 1, 1)
            if squeeze:
                few = round(squeeze * after)
                state[f"{name}.se.fc1.weight"] = torch.empty(few, after, 1, 1)
                state[f"{name}.se.fc1.bias"] = torch.empty(few)
                state[f"{name}.se.fc2.weight"] = torch.empty(after, few, 1, 1)
                state[f"{name}.se.fc2.bias"] = torch.empty(after)
    add_norm("batchnorm", widths[-1])
    state |= {"logits.weight": torch.empty(10, widths[-1]), "logits.bias": torch.empty(10)}
    return randomised(state)


@torch.no_grad()
def differences(
    model: nn.Module, state: dict[str, Tensor], forward: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Relative differences of the logits in float32 and float64 from `forward`, which computes in float64."""
    expected = forward(X)
    placed = put_initial_state(model, state, "w", num_classes=10)
    assert placed.head == ()
    single = model.eval()(X.float())
    put_initial_state(model.double(), state, "w", num_classes=10)
    scale = expected.abs().max()
    return tuple(float((got - expected).abs().max() / scale) for got in (single, model(X)))  # type: ignore[return-value]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize(("name", "act"), [("wrn-16-2-silu-same", F.silu), ("wrn-16-2-same", F.relu)])
def test_gowals_wide_network(name: str, act: Callable[..., Tensor], prefix: str) -> None:
    state = wide_state(2, (16, 32, 64, 128))
    named = {f"{prefix}{key}": value for key, value in state.items()}
    float32, float64 = differences(ours(name), named, lambda x: deepminds_wide_forward(state, x, 2, act))
    assert float32 < 1e-5
    assert float64 < 1e-10


def test_the_padding_matters() -> None:
    state = wide_state(2, (16, 32, 64, 128))
    plain, _ = differences(
        ours("wrn-16-2-silu"), state, lambda x: deepminds_wide_forward(state, x, 2, F.silu)
    )
    assert plain > 1e-3


def test_rawrn() -> None:
    from fastdynat.models.ra_resnet import RaWideResNet

    state = wide_state(2, (96, 16, 24, 32), squeeze=0.25)
    model = ours("small")
    model.net = RaWideResNet(num_classes=10, in_channels=3, blocks=(2, 2, 2), widths=(16, 24, 32))
    float32, float64 = differences(model, state, lambda x: deepminds_wide_forward(state, x, 2, F.silu))
    assert float32 < 1e-5
    assert float64 < 1e-10
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}


def deepminds_preact_forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """`PreActResNet` of the same file, depth 18, with SiLU."""
    out = F.conv2d(normalised(x), state["conv_2d.weight"], padding=1)
    for stage in range(4):
        for index in range(2):
            name, stride = f"layer_{stage}.{index}", 2 if stage > 0 and index == 0 else 1
            pre = F.silu(norm(out, state, f"{name}.batchnorm_0"))
            inner = same(pre, state[f"{name}.conv_2d_1.weight"], stride)
            inner = F.silu(norm(inner, state, f"{name}.batchnorm_1"))
            inner = F.conv2d(inner, state[f"{name}.conv_2d_2.weight"], padding=1)
            projection = state.get(f"{name}.shortcut.weight")
            out = inner + (out if projection is None else same(out, projection, stride))
    out = F.silu(norm(out, state, "batchnorm")).mean((2, 3))
    return out @ state["logits.weight"].T + state["logits.bias"]


def preact_state() -> dict[str, Tensor]:
    state = {"conv_2d.weight": torch.empty(64, 3, 3, 3)}
    norms = {"batchnorm": 512}
    for stage, (before, after) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512))):
        for index in range(2):
            name, channels = f"layer_{stage}.{index}", after if index else before
            norms |= {f"{name}.batchnorm_0": channels, f"{name}.batchnorm_1": after}
            state[f"{name}.conv_2d_1.weight"] = torch.empty(after, channels, 3, 3)
            state[f"{name}.conv_2d_2.weight"] = torch.empty(after, after, 3, 3)
            if stage and not index:
                state[f"{name}.shortcut.weight"] = torch.empty(after, channels, 3, 3)
    for name, channels in norms.items():
        parts = ("weight", "bias", "running_mean", "running_var")
        state |= {f"{name}.{part}": torch.empty(channels) for part in parts}
    state |= {"logits.weight": torch.empty(10, 512), "logits.bias": torch.empty(10)}
    return randomised(state)


def test_deepminds_preactivation_network() -> None:
    state = preact_state()
    model = ours("preact_resnet18-silu-same")
    float32, float64 = differences(model, state, lambda x: deepminds_preact_forward(state, x))
    assert float32 < 1e-5
    assert float64 < 1e-10


def test_names_of_ours_stay() -> None:
    for name in ("wrn-10-1", "preact_resnet18", "small", "resnet18"):
        with torch.device("meta"):
            state = ours(name).state_dict()
        assert list(in_our_names(state, state)) == list(state)
    bare = {key.removeprefix("net."): value for key, value in state.items()}
    assert list(in_our_names(bare, state)) == list(bare)


def test_a_network_with_such_names_keeps_them(tmp_path: Path) -> None:
    """A user's copy of DeepMind's class loads its own weights."""
    (tmp_path / "zoo.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.init_conv = nn.Conv2d(3, 4, 3)\n"
        "        self.logits = nn.Linear(4, 10)\n"
        "    def forward(self, x):\n"
        "        return self.logits(self.init_conv(x).mean((2, 3)))\n"
    )
    found = load_foreign(f"{tmp_path}/zoo.py:Net", num_classes=10, image_shape=CIFAR)
    torch.save(found.model.state_dict(), tmp_path / "w.pt")
    load_foreign(f"{tmp_path}/zoo.py:Net", num_classes=10, image_shape=CIFAR, weights=tmp_path / "w.pt")


def test_another_depth_lists_the_layers() -> None:
    with pytest.raises(UserError, match=r"keys missing \(net.block1.layer.2.bn1.weight"):
        put_initial_state(ours("wrn-22-2-same"), wide_state(2, (16, 32, 64, 128)), "w", num_classes=10)


# RobustBench's own classes.


@pytest.fixture
def zoo() -> Iterator[Callable[[str], Any]]:
    with ExitStack() as modules:
        yield lambda name: modules.enter_context(robustbench_module(name))


@needs("robustbench")
@pytest.mark.parametrize("name", ["wrn-10-1-silu-same", "wrn-28-2-silu-same"])
def test_robustbenchs_wide_network(name: str, zoo: Callable[[str], Any]) -> None:
    module, depth, width = zoo("dm_wide_resnet"), int(name.split("-")[1]), int(name.split("-")[2])
    theirs = module.DMWideResNet(num_classes=10, depth=depth, width=width, activation_fn=module.Swish)
    compare_with(theirs, ours(name))


@needs("robustbench")
def test_robustbenchs_preactivation_network(zoo: Callable[[str], Any]) -> None:
    module = zoo("dm_wide_resnet")
    theirs = module.DMPreActResNet(num_classes=10, depth=18, activation_fn=module.Swish)
    compare_with(theirs, ours("preact_resnet18-silu-same"))


@needs("robustbench")
@pytest.mark.parametrize(
    ("name", "out_shortcut"),
    [
        ("preact_resnet18", True),
        ("preact_resnet18-raw", False),
        ("preact_resnet34", True),
        ("preact_resnet34-raw", False),
        ("preact_resnet50", True),
    ],
)
def test_robustbenchs_other_preactivation_networks(
    name: str, out_shortcut: bool, zoo: Callable[[str], Any]
) -> None:
    """The keys are the same; what a projection shortcut reads is not."""
    module = zoo("resnet")
    blocks = [2, 2, 2, 2] if "18" in name else [3, 4, 6, 3]
    if "50" in name:
        block = type(
            "Block",
            (module.PreActBottleneck,),
            {"__init__": lambda self, i, p, s, out_shortcut: module.PreActBottleneck.__init__(self, i, p, s)},
        )
    else:
        block = module.PreActBlock
    theirs = module.PreActResNet(block, blocks, bn_before_fc=True, out_shortcut=out_shortcut)
    compare_with(theirs, ours(name, normalised=False))


@needs("robustbench")
@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet18-raw"])
@torch.no_grad()
def test_the_exported_source_has_the_same_shortcuts(name: str, zoo: Callable[[str], Any]) -> None:
    from fastdynat.commands.export.network_source import architecture_source

    module, namespace = zoo("resnet"), {"__name__": "net"}
    raw = name.endswith("-raw")
    theirs = module.PreActResNet(module.PreActBlock, [2, 2, 2, 2], bn_before_fc=True, out_shortcut=not raw)
    code = architecture_source(name, num_classes=10, image_shape=CIFAR, mean=None, std=None)
    exec(compile(code, "net.py", "exec"), namespace)
    build: Any = namespace["build"]
    compare_with(theirs, build())


def test_suffixes_of_the_shortcut() -> None:
    """For pre-activation networks of depth 18 and 34, as the last suffix, and not with -same."""
    with torch.device("meta"):
        ours("PreAct_ResNet18_s2222-silu-gn_raw")
        with pytest.raises(UserError, match="-raw is for preact_resnet18 and 34"):
            ours("preact_resnet50-raw")
        for name in ("wrn-10-1-raw", "resnet18-raw", "preact_resnet18-raw-gn", "preact_resnet18-same-raw"):
            with pytest.raises(UserError, match="unknown model"):
                ours(name)


@needs("robustbench")
def test_robustbenchs_rawrn(zoo: Callable[[str], Any]) -> None:
    from fastdynat.models.ra_resnet import RaWideResNet

    module = zoo("robustarch_wide_resnet")
    size = {"stem_width": 96, "depth": [2, 1, 1], "stage_width": [16, 24, 32], "groups": [1, 1, 1]}
    squeeze = {"se_ratio": 0.25, "se_activation": nn.ReLU, "se_order": 2}
    theirs = module.NormalizedWideResNet(MEAN, STD, activation_fn=nn.SiLU, **size, **squeeze)
    theirs.mean, theirs.std = theirs.mean.double(), theirs.std.double()
    model = ours("small")
    model.net = RaWideResNet(num_classes=10, in_channels=3, blocks=(2, 1, 1), widths=(16, 24, 32))
    compare_with(theirs, model)


@needs("robustbench")
def test_robustbenchs_rawrns_have_our_shapes(zoo: Callable[[str], Any]) -> None:
    module = zoo("robustarch_wide_resnet")
    for theirs, name, classes in (("ra_wrn70_16", "rawrn-70-16", 10), ("ra_wrn101_2", "rawrn-101-2", 1000)):
        with torch.device("meta"):
            state = module.get_model(theirs).state_dict()
            model = build_model(name, num_classes=classes, image_shape=(3, 64, 64))
        wanted = {key.removeprefix("net."): tuple(v.shape) for key, v in model.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in in_our_names(state, model.state_dict()).items()}
        assert {k: v for k, v in found.items() if "normalize" not in k} == {
            k: v for k, v in wanted.items() if "normalize" not in k
        }


@needs("robustbench")
def test_robustbenchs_raresnet(zoo: Callable[[str], Any]) -> None:
    from fastdynat.models.ra_resnet import RaResNet

    module = zoo("robustarch_wide_resnet")
    norms = [nn.Identity, nn.BatchNorm2d, nn.BatchNorm2d]
    theirs = module.NormalizedConfigurableModel(
        mean=list(MEAN), std=list(STD), stage_widths=[32, 64, 64, 96], kernel=3, strides=[2] * 4, dilation=1,
        norm_layer=norms, activation_layer=[nn.SiLU] * 3, group_widths=[4, 8, 8, 12],
        bottleneck_multipliers=[0.25] * 4, downsample_norm=nn.BatchNorm2d, depths=[2, 1, 1, 1],
        dense_ratio=None, stem_type=module.Stem, stem_width=96, stem_kernel=7, stem_downsample_factor=2,
        stem_patch_size=None, block_constructor=module.BottleneckBlock, ConvBlock=module.Conv2dNormActivation,
        se_ratio=0.25, se_activation=nn.ReLU, num_classes=10,
    )  # fmt: skip
    model = ours("small")
    size = {"blocks": (2, 1, 1, 1), "widths": (32, 64, 64, 96), "group_widths": (4, 8, 8, 12)}
    model.net = RaResNet(num_classes=10, in_channels=3, **size)
    compare_with(theirs, model)


@torch.no_grad()
def compare_with(theirs: nn.Module, model: nn.Module) -> None:
    """1e-5 in float32 and 1e-10 in float64, with random weights and statistics."""
    theirs = theirs.double().eval()
    theirs.load_state_dict(randomised(theirs.state_dict()))
    float32, float64 = differences(model, dict(theirs.state_dict()), theirs)
    assert float32 < 1e-5
    assert float64 < 1e-10
