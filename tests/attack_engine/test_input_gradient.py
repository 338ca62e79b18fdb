"""The first convolution's input gradient: that of nn.Conv2d, for every geometry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdynat.attack_engine import input_gradient
from fastdynat.attack_engine.input_gradient import ImageConv2d, fast_image_gradients
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
