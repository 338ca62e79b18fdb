"""DyART's network for CIFAR-10, transcribed as functions of its weights in float64: logits and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.data import RELEASED_PIXELS, dataset_info
from fastdynat.errors import UserError
from fastdynat.models import build_model

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR: dict[str, Any] = {"num_classes": 10, "image_shape": (3, 32, 32)}
Weights = dict[str, Tensor]


def released_norm(x: Tensor, w: Weights, name: str, groups: bool) -> Tensor:
    """Batch norm of a train-mode pass, or group norm of 32 groups, 16 for the 16 channels of the stem."""
    if groups:
        return F.group_norm(x, min(32, x.shape[1]), w[f"{name}.weight"], w[f"{name}.bias"])
    return F.batch_norm(x, None, None, w[f"{name}.weight"], w[f"{name}.bias"], training=True)


def released_block(x: Tensor, w: Weights, name: str, stride: int, groups: bool) -> Tensor:
    """The shortcut takes the pre-activated input; strided convolutions pad only bottom and right."""
    out = F.silu(released_norm(x, w, f"{name}.bn1", groups))
    shortcut = (
        F.conv2d(out, w[f"{name}.convShortcut.weight"], stride=stride)
        if f"{name}.convShortcut.weight" in w
        else x
    )
    v = F.pad(out, (1, 1, 1, 1)) if stride == 1 else F.pad(out, (0, 1, 0, 1))
    v = F.silu(released_norm(F.conv2d(v, w[f"{name}.conv1.weight"], stride=stride), w, f"{name}.bn2", groups))
    return F.conv2d(v, w[f"{name}.conv2.weight"], padding=1) + shortcut


def released_network(x: Tensor, w: Weights, groups: bool) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float32).double().view(3, 1, 1) for v in (MEAN, STD))
    out = F.conv2d((x - mean) / std, w["net.conv1.weight"], padding=1)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        out = released_block(out, w, f"net.block{stage}.layer.0", stride, groups)
    out = F.silu(released_norm(out, w, "net.bn1", groups))
    return F.linear(F.avg_pool2d(out, 8).flatten(1), w["net.fc.weight"], w["net.fc.bias"])


def ours(name: str, std: tuple[float, ...] = STD) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, **CIFAR, mean=MEAN, std=std).double().train()


@pytest.mark.parametrize("groups", [False, True])
def test_logits_and_gradients_are_the_releases(groups: bool) -> None:
    net = ours("wrn-10-2-silu-gn-same" if groups else "wrn-10-2-silu-same")
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 32, 32, dtype=torch.float64, generator=generator)
    y = torch.arange(6)
    weights = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    want, got = released_network(x, weights, groups), net(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for logits in (want, got):
        F.cross_entropy(logits, y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-8, atol=1e-12, msg=name)


def test_without_it_the_network_is_another() -> None:
    """The recipe's former network: no normalisation, and padding on all sides."""
    x = torch.rand(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same, around = ours("wrn-10-2-silu-same"), ours("wrn-10-2-silu")
    around.load_state_dict(same.state_dict())
    bare = ours("wrn-10-2-silu-same", (1.0, 1.0, 1.0))
    weights = {name: p.detach() for name, p in same.named_parameters()}
    want = released_network(x, weights, False)
    for other in (around, bare):
        assert float((other(x) - want).detach().abs().max()) > 1e-3


def test_the_released_numbers_are_cifar10s_but_for_one_digit() -> None:
    info = dataset_info("cifar10")
    assert info is not None
    assert RELEASED_PIXELS["cifar10"] == (MEAN, STD)
    assert info.mean == MEAN
    assert info.std == (0.2470, 0.2435, 0.2616)


@pytest.mark.parametrize("side", [8, 12, 18, 32])
def test_images_of_any_size_fit(side: int) -> None:
    net = build_model("wrn-10-1-same", num_classes=3, image_shape=(1, side, side + 2))
    assert net.eval()(torch.rand(2, 1, side, side + 2)).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet18-same", "small-same", "wrn-10-1-same-silu"])
def test_only_wide_networks_have_it_and_at_the_end(name: str) -> None:
    with pytest.raises(UserError, match="unknown model"):
        build_model(name, **CIFAR)
