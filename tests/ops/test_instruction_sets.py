"""The CPU operators with the instructions of older processors, against float64."""

import json
import platform
import subprocess
import sys
from functools import cache

import pytest
from conftest import needs

# Largest errors relative to the largest value, of operators with kernels per instruction set.
CODE = """
import json, sys, torch
import torch.nn.functional as F
from fastdynat import ops

torch.manual_seed(0)
found = {}


def keep(name, got, want):
    error = float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))
    found[name] = max(error, found.get(name, 0.0))


sizes = [(3, 17, 33, 5, 13), (2, 96, 64, 9, 8), (1, 160, 32, 16, 12), (5, 64, 130, 4, 4)]
for n, c, k, height, width in sizes:
    weight, bias = torch.randn(k, c, 3, 3) / (3 * c**0.5), torch.randn(k)
    x, upstream = torch.randn(n, c, height, width, requires_grad=True), torch.randn(n, k, height, width)
    y = ops.winograd_conv3x3(x, *ops.winograd_weights(weight), bias, backend="cpp")
    (grad,) = torch.autograd.grad(y, x, upstream)
    x64 = x.detach().double().requires_grad_()
    y64 = F.conv2d(x64, weight.double(), bias.double(), padding=1)
    keep("winograd", y.detach(), y64.detach())
    keep("winograd", grad, torch.autograd.grad(y64, x64, upstream.double(), retain_graph=True)[0])
    residual = torch.randn(n, k, height, width)
    filters, taken = ops.winograd_weights(weight), {"relu": True, "backend": "cpp"}
    y = ops.winograd_conv3x3(x, *filters, bias, residual=residual, **taken)
    keep("winograd", y.detach(), (y64 + residual).relu().detach())
    y = ops.winograd_conv3x3(x, *filters, bias, **taken)
    keep("winograd", y.detach(), y64.relu().detach())
    (grad,) = torch.autograd.grad(y, x, upstream)
    keep("winograd", grad, torch.autograd.grad(y64, x64, upstream.double() * (y > 0))[0])

for n, c, k, height, width in [(3, 3, 32, 16, 16), (2, 1, 33, 7, 9), (1, 4, 130, 12, 5)]:
    weight, bias = torch.randn(k, c, 3, 3), torch.randn(k)
    x, shape = torch.randn(n, c, height, width, requires_grad=True), {"stride": (2, 1), "padding": (1, 1)}
    y = ops.image_conv(x, weight, bias, **shape, relu=True, backend="cpp")
    x64 = x.detach().double().requires_grad_()
    y64 = F.conv2d(x64, weight.double(), bias.double(), **shape)
    upstream = torch.randn(y.shape)
    keep("images", y.detach(), y64.detach().clamp_min(0))
    passed = upstream.double() * (y > 0)
    keep("images", torch.autograd.grad(y, x, upstream)[0], torch.autograd.grad(y64, x64, passed)[0])

for n, k in [(7, 10), (33, 100), (5, 129), (9, 1000)]:
    z, guide = 4 * torch.randn(n, k), torch.randn(n, k)
    for soft in (False, True):
        leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
        loss = ops.dynamic_label_cross_entropy(leaf, guide, soft=soft, backend="cpp").loss
        target = guide.double().softmax(1) if soft else guide.argmax(1)
        want = F.cross_entropy(wide, target)
        keep("cross-entropy", loss.detach(), want.detach())
        keep("cross-entropy", torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, wide)[0])
json.dump(found, sys.stdout)
"""
BOUNDS = {"winograd": 2e-5, "images": 2e-6, "cross-entropy": 2e-6}


@cache
def errors(instructions: str) -> dict[str, float]:
    """The errors in a process limited to `instructions`."""
    limit = f"import os; os.environ['ATEN_CPU_CAPABILITY'] = {instructions!r}\n"
    done = subprocess.run([sys.executable, "-c", limit + CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@needs("ext")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
@pytest.mark.parametrize("instructions", ["avx2", "default"])
@pytest.mark.parametrize("name", BOUNDS)
def test_older_instructions_compute_the_same(instructions: str, name: str) -> None:
    assert errors(instructions)[name] < BOUNDS[name]
