"""The first convolution's input gradient: that of nn.Conv2d, for every geometry."""

import pytest
import torch
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdynat.attack_engine import input_gradient
from fastdynat.attack_engine.input_gradient import (
    ImageConv2d,
    Rectified,
    fast_image_gradients,
    take_relus_along,
)
from fastdynat.evaluation.measure import attacked
from fastdynat.models import build_model


@given(
    channels=st.integers(1, 4),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    size=st.integers(9, 14),
    last=st.booleans(),
    least=st.sampled_from([1, 1 << 21]),
)
@settings(max_examples=60, deadline=None)
def test_the_gradient_is_that_of_conv2d(
    channels: int, kernel: int, stride: int, dilation: int, size: int, last: bool, least: int
) -> None:
    layer = nn.Conv2d(channels, 6, kernel, stride, kernel // 2, dilation).double().requires_grad_(False)
    x = torch.rand(3, channels, size, size + 1, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    out = layer(x)
    cotangent = torch.rand_like(out)
    (want,) = torch.autograd.grad(out, x, cotangent)
    layer.__class__ = ImageConv2d
    before, input_gradient.MOST_NUMBERS = input_gradient.MOST_NUMBERS, least
    try:
        (found,) = torch.autograd.grad(layer(x), x, cotangent)
    finally:
        input_gradient.MOST_NUMBERS = before
    torch.testing.assert_close(layer(x), out)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_the_first_layer_alone_is_changed() -> None:
    network = build_model("small", num_classes=10, image_shape=(3, 32, 32)).requires_grad_(False)
    assert fast_image_gradients(network) == 1
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert type(first) is ImageConv2d


def test_layers_of_which_another_gradient_is_wanted_stay() -> None:
    network = build_model("small", num_classes=10, image_shape=(3, 32, 32))
    assert fast_image_gradients(network) == 0


@pytest.mark.parametrize("winograd", [True, False])
def test_a_replica_follows_the_switch(winograd: bool) -> None:
    model = build_model("small", num_classes=10, image_shape=(3, 32, 32)).eval()
    ascent = attacked(model, torch.rand(2, 3, 32, 32), winograd=winograd)
    assert isinstance(ascent.network, nn.Module)
    assert any(type(module) is ImageConv2d for module in ascent.network.modules()) is winograd
    assert not any(type(module) is ImageConv2d for module in model.modules())


@needs("ext")
@pytest.mark.parametrize("last", [False, True])
def test_the_replica_takes_the_relu_along(last: bool) -> None:
    """With the logits and gradients of the network, in both memory formats."""
    torch.manual_seed(0)
    model = build_model("small", num_classes=10, image_shape=(3, 32, 32)).train()
    x = torch.rand(8, 3, 32, 32)
    model(x)
    model.eval()
    ascent = attacked(model, x, channels_last=last)
    network = ascent.network
    assert isinstance(network, nn.Module)
    layers = [module for module in network.modules() if isinstance(module, ImageConv2d)]
    assert [layer.rectified for layer in layers] == [True]
    assert sum(type(module) is Rectified for module in network.modules()) == 1
    grads = []
    for net in (model, network):
        leaf = x.clone().requires_grad_()
        logits = net(leaf)
        (grad,) = torch.autograd.grad(logits.square().sum(), leaf)
        grads.append((logits.detach(), grad))
    torch.testing.assert_close(grads[1][0], grads[0][0], rtol=1e-3, atol=1e-4)
    # Rounding may open or close single units, whose gradients then differ.
    found, want = grads[1][1], grads[0][1]
    assert float((found - want).norm()) < 0.02 * float(want.norm())


def test_a_relu_with_other_readers_stays() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.first(x)
            return (self.relu(out) + out).mean((2, 3))

    traced = torch.fx.symbolic_trace(Network().requires_grad_(False))
    fast_image_gradients(traced)
    take_relus_along(traced)
    assert not any(isinstance(module, Rectified) for module in traced.modules())
    assert not traced.get_submodule("first").rectified


def test_a_relu_stays_after_a_layer_whose_gradients_a_hook_sees() -> None:
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Flatten()).requires_grad_(False)
    network[0].register_full_backward_hook(lambda layer, of_input, of_output: None)
    traced = torch.fx.symbolic_trace(network)
    fast_image_gradients(traced)
    take_relus_along(traced)
    assert not any(isinstance(module, Rectified) for module in traced.modules())
