"""The convolution of images: its gradient in float64 and of every order, and bad arguments."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdynat import ops

ON_CPU = ["eager", pytest.param("cpp", marks=needs("ext"))]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels-last": lambda t: t.to(memory_format=torch.channels_last),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 1],
    "turned": lambda t: t.mT.contiguous().mT,
}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 3),
    c=st.integers(1, 4),
    k=st.sampled_from([1, 5, 24, 32, 33, 130]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    height=st.integers(5, 40),
    width=st.integers(5, 40),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    layout=st.sampled_from(list(LAYOUTS)),
    biased=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_convolution_and_its_gradient(
    backend: str,
    n: int,
    c: int,
    k: int,
    rows: int,
    columns: int,
    height: int,
    width: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    layout: str,
    biased: bool,
    relu: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(k, c, rows, columns)
    bias = torch.randn(k) if biased else None
    x = LAYOUTS[layout](torch.rand(n, c, height, width)).requires_grad_()
    geometry = {"stride": stride, "padding": padding}
    got = ops.image_conv(x, weight, bias, **geometry, relu=relu, backend=backend)
    exact = x.detach().double().requires_grad_()
    want = F.conv2d(exact, weight.double(), None if bias is None else bias.double(), **geometry)
    size = weight.double().abs().sum((1, 2, 3)).view(1, -1, 1, 1) + 1
    rectified = want.clamp_min(0) if relu else want
    assert got.shape == want.shape
    if got.numel():
        assert float(((got.double() - rectified) / size).detach().abs().max()) < 1e-6
    upstream = LAYOUTS[layout](torch.randn(got.shape))
    (grad,) = torch.autograd.grad(got, x, upstream)
    passed = upstream.double() * (got > 0) if relu else upstream.double()
    (exact_grad,) = torch.autograd.grad(want, exact, passed)
    assert grad.shape == x.shape
    if grad.numel():
        most = float(weight.double().abs().sum() * 4) + 1
        assert float((grad.double() - exact_grad).abs().max()) < 1e-6 * most


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("relu", [False, True])
def test_differentiable_to_any_order(backend: str, relu: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 3, 3, 3), torch.randn(6)

    def ours(x: Tensor) -> Tensor:
        return ops.image_conv(x, weight, bias, padding=(1, 1), relu=relu, backend=backend).square().sum()

    def torchs(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight.to(x), bias.to(x), padding=1)
        return (y.relu() if relu else y).square().sum()

    x, v = torch.rand(2, 3, 5, 6), torch.rand(2, 3, 5, 6)
    for found, want in (
        (torch.func.grad(ours)(x), torch.func.grad(torchs)(x.double())),
        (
            torch.autograd.functional.hvp(ours, x, v)[1],
            torch.autograd.functional.hvp(torchs, x.double(), v.double())[1],
        ),
    ):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ON_CPU)
def test_nan_and_infinity_are_torchs(backend: str) -> None:
    weight, bias = torch.ones(24, 3, 3, 3), torch.zeros(24)
    x = torch.rand(3, 3, 8, 8)
    x[0, 0, 3, 3], x[1, 1, 2, 2], x[2, 2, 5, 5] = NAN, INF, -INF
    x.requires_grad_()
    got = ops.image_conv(x, weight, bias, padding=(1, 1), relu=True, backend=backend)
    want = F.conv2d(x, weight, bias, padding=1).relu()
    torch.testing.assert_close(got, want, equal_nan=True)
    upstream = torch.ones_like(want)
    (grad,), (expected) = (
        torch.autograd.grad(got, x, upstream),
        torch.autograd.grad(want, x, upstream)[0],
    )
    torch.testing.assert_close(grad, expected, equal_nan=True)


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_result_may_be_overwritten_where_nothing_is_saved(backend: str) -> None:
    x = torch.rand(2, 3, 6, 6, requires_grad=True)
    weight = torch.randn(24, 3, 3, 3)
    y = ops.image_conv(x, weight, backend=backend).relu_()
    (found,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(F.conv2d(x, weight).relu().sum(), x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@needs("ext")
def test_a_batch_is_its_images() -> None:
    """To the last bit, whatever the number of threads."""
    weight, grad, gate = torch.randn(32, 3, 3, 3), torch.randn(7, 32, 17, 11), torch.randn(7, 32, 17, 11)

    def run(grad: Tensor, gate: Tensor) -> Tensor:
        return torch.ops.fastdynat.image_conv_grad(grad, weight, gate, 33, 21, 2, 2, 1, 1)

    whole = run(grad, gate)
    torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)
    assert torch.equal(torch.cat([run(grad[i : i + 1], gate[i : i + 1]) for i in range(7)]), whole)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_and_compiled(backend: str, compiled: bool) -> None:
    """Autocast to half precision changes nothing, and there is one graph."""
    weight, x = torch.randn(24, 3, 3, 3), torch.rand(2, 3, 8, 8)

    def pulled(x: Tensor) -> tuple[Tensor, Tensor]:
        y, pull_back = torch.func.vjp(
            lambda z: ops.image_conv(z, weight, padding=(1, 1), relu=True, backend=backend), x
        )
        return y, pull_back(torch.ones_like(y))[0]

    want = pulled(x)
    torch._dynamo.reset()
    run = torch.compile(pulled, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else pulled
    with torch.autocast("cpu", torch.bfloat16):
        found = run(x)
    for one, other in zip(found, want, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


X, W = torch.rand(2, 3, 5, 5), torch.rand(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be float32, got torch.float64", lambda: ops.image_conv(X.double(), W)),
        ("weight must be float32", lambda: ops.image_conv(X, W.double())),
        (r"x has shape \(3, 5, 5\)", lambda: ops.image_conv(X[0], W)),
        (r"weight \(4, 2, 3, 3\)", lambda: ops.image_conv(X, W[:, :2])),
        ("weight is on meta", lambda: ops.image_conv(X, W.to("meta"))),
        ("no gradient of weight", lambda: ops.image_conv(X, W.clone().requires_grad_())),
        ("no gradient of bias", lambda: ops.image_conv(X, W, torch.rand(4, requires_grad=True))),
    ],
)
def test_wrong_arguments_are_named(message: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backend_that_cannot_run_is_refused_at_the_call() -> None:
    with pytest.raises(RuntimeError, match="no such implementation"):
        ops.image_conv(X, W, backend="triton")


@needs("ext")
def test_wrong_arguments_of_the_dispatcher_are_named() -> None:
    run, grad = torch.ops.fastdynat.image_conv_grad, torch.rand(2, 4, 3, 3)
    for message, args in (
        ("grad must be float32", (grad.double(), W.double(), None, 5, 5, 1, 1, 0, 0)),
        ("expected \\(N, K, H', W'\\)", (grad[0], W, None, 5, 5, 1, 1, 0, 0)),
        ("weight has shape \\(0, 3, 3, 3\\)", (grad, W[:0], None, 5, 5, 1, 1, 0, 0)),
        ("must be at most 1048576", (grad, W, None, 2**40, 5, 2**40, 1, 0, 0)),
        ("strides must be positive", (grad, W, None, 5, 5, 0, 1, 0, 0)),
        ("2 x 5 pixels are smaller than the filters", (grad, W, None, 2, 5, 1, 1, 0, 0)),
        ("expected \\(N, 4, 3, 2\\)", (grad, W, None, 5, 4, 1, 1, 0, 0)),
        ("gate has shape", (grad, W, grad[..., 1:], 5, 5, 1, 1, 0, 0)),
        ("must have one dtype", (grad, W, grad.double(), 5, 5, 1, 1, 0, 0)),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*args)
