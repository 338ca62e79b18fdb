"""Counted operations of attention, depthwise convolutions and layer norm, against sums by hand."""

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.twenty_networks import table_network
from torch import nn

from fastdynat.commands.bench.flops import count, count_step
from fastdynat.methods import Madry, MadryOptions


def madry() -> Madry:
    return Madry(MadryOptions())


@needs("timm")
def test_flops_of_a_vit_by_hand() -> None:
    """Four patches and a class token of 192 numbers; both operands of attention's products have gradients."""
    tokens, width, blocks = 5, 192, 12
    patches = 2 * 4 * 3 * 16 * 16 * width
    layers = 2 * tokens * width * (3 * width + width + 2 * 4 * width) * blocks
    attention = 2 * 2 * tokens * tokens * width * blocks
    head = 2 * width * 10
    flops = count_step(
        madry(), table_network("timm:vit_tiny_patch16_224"), None, (3, 32, 32), attack_steps=10
    )
    forward = patches + layers + attention + head
    assert flops.forward == forward
    assert flops.attack_step == 2 * forward + attention
    assert flops.update == 3 * forward - patches  # no gradient at the image


@needs("timm")
def test_flops_of_depthwise_convolutions_and_layer_norm() -> None:
    """torch's own formula counts the weights' gradients of grouped convolutions as if of all channels."""
    model = table_network("timm:convnext_atto")
    stem = 2 * 8 * 8 * 40 * 3 * 16
    flops = count_step(madry(), model, None, (3, 32, 32), attack_steps=10)
    assert flops.attack_step == 2 * flops.forward
    assert flops.update == 3 * flops.forward - stem


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (4, False), (8, False), (1, True), (4, True)])
def test_each_gradient_of_a_convolution_costs_its_forward_pass(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = kind(8, 8, 3, stride=2, groups=groups), torch.rand(2, 8, 9, 9)
    forward = 2 * 2 * (81 if transposed else 16) * 9 * 8 * 8 // groups
    assert count(lambda: layer(x)) == forward
    assert count(lambda: layer(x).sum().backward()) == 2 * forward
    assert count(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * forward


def test_flops_of_attention_on_the_cpu() -> None:
    """Two products forward; the backward kernel makes one of them again, beside their four gradients."""
    q, k, v = (torch.rand(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 6 * 6 * 4
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert count(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
        assert count(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 7 * product
