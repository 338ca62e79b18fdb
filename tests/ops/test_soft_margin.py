"""Soft margin: float64 oracle, gradient, the paper's bounds, meaningless rows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIMULATED_CUDA, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdynat import ops

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ON_CPU = [
    "eager",
    pytest.param("cpp", marks=needs("ext")),
    pytest.param(
        "triton", marks=[needs("triton"), pytest.mark.skipif(torch.cuda.is_available(), reason="see ON_GPU")]
    ),
    SIMULATED_CUDA,
]
ON_GPU = [pytest.param(name, marks=[needs("gpu"), pytest.mark.gpu]) for name in ("eager", "cuda", "triton")]
# Rows side by side and one at a time on the CPU; one, four or more values per lane and a block on the GPU;
# chunks in Triton.
SHAPES = [(0, 10), (1, 2), (33, 2), (7, 3), (67, 10), (5, 100), (5, 129), (3, 1000), (2, 1025), (3, 4099)]
# Of the margin, in units of the largest logit, and of the gradient, whose entries are at most 1.
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 3e-7, torch.float16: 3e-7}
GRAD_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# numpy, in which Triton interprets, remarks on inf - inf.
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def inputs(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits whose rows are wide and narrow by turns, and labels, many of them the prediction."""
    n, k = shape
    logits = torch.randn(shape) * torch.tensor([0.1, 1.0, 8.0]).repeat(n)[:n, None]
    labels = torch.where(torch.rand(n) < 0.5, logits.argmax(1), torch.randint(k, (n,)))
    return logits.to(dtype), labels


def oracle(logits: Tensor, labels: Tensor, temperature: float = 5.0) -> tuple[Tensor, Tensor]:
    """(margin, gradient) from the formula, in float64 numpy, row by row."""
    z = logits.double().numpy()
    margin, grad = np.empty(len(z)), np.zeros_like(z)
    for i, y in enumerate(labels.tolist()):
        others = np.delete(z[i], y)
        e = np.exp(temperature * (others - others.max()))
        margin[i] = z[i, y] - (temperature * others.max() + np.log(e.sum())) / temperature
        grad[i] = np.insert(-e / e.sum(), y, 1.0)
    return torch.tensor(margin), torch.tensor(grad)


def margin_and_grad(logits: Tensor, labels: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    margin = ops.soft_margin(logits, labels, **kwargs)
    (grad,) = torch.autograd.grad(margin.sum(), logits)
    return margin.detach(), grad


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol, equal_nan=True)


def check(run: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Compare `run` with the oracle."""
    for shape in SHAPES:
        logits, labels = inputs(shape, dtype)
        for temperature in (5.0, 0.3):
            margin, grad = run(logits, labels, temperature)
            expected_margin, expected_grad = oracle(logits, labels, temperature)
            assert margin.shape == shape[:1]
            assert margin.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert grad.dtype == dtype
            largest = max(1.0, float(logits.abs().amax())) if len(labels) else 1.0
            assert_close(
                margin, expected_margin, TOLERANCE[dtype] * (largest + math.log(shape[1]) / temperature)
            )
            assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_agrees_with_the_formula(backend: str, dtype: torch.dtype) -> None:
    check(lambda z, y, t: margin_and_grad(z, y, temperature=t, backend=backend), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_agrees_with_the_formula(backend: str, dtype: torch.dtype) -> None:
    def run(z: Tensor, y: Tensor, t: float) -> tuple[Tensor, Tensor]:
        margin, grad = margin_and_grad(z.cuda(), y.cuda(), temperature=t, backend=backend)
        return margin.cpu(), grad.cpu()

    check(run, dtype)


@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_agrees_on_odd_rows_and_many_rows(backend: str) -> None:
    logits, labels = odd_rows(10)
    margin, grad = margin_and_grad(logits.cuda(), labels.cuda(), backend=backend)
    for actual, expected in zip(
        (margin, grad), margin_and_grad(logits, labels, backend="eager"), strict=True
    ):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    logits, labels = inputs((300_001, 3))  # more rows than one wave of blocks
    margin, grad = margin_and_grad(logits.cuda(), labels.cuda(), backend=backend)
    expected_margin, expected_grad = margin_and_grad(logits, labels, backend="eager")
    assert_close(margin.cpu(), expected_margin, 2e-5)
    assert_close(grad.cpu(), expected_grad, 2e-6)
    labels[::2] = 3  # does not exist
    margin, grad = margin_and_grad(logits.cuda(), labels.cuda(), backend=backend)
    assert_same(margin.isnan().cpu(), labels == 3)
    assert_same(grad.isnan().cpu(), (labels == 3)[:, None].expand(-1, 3))


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradient_is_that_of_autograd(backend: str) -> None:
    logits, labels = inputs((7, 12), torch.float64)
    z = logits.requires_grad_()
    formula = z.gather(1, labels[:, None])[:, 0] - torch.stack(
        [
            torch.logsumexp(5 * torch.cat([row[:y], row[y + 1 :]]), 0) / 5
            for row, y in zip(z, labels.tolist(), strict=True)
        ]
    )
    upstream = torch.randn(7, dtype=torch.float64)
    margin = ops.soft_margin(z, labels, backend=backend)
    (actual,) = torch.autograd.grad(margin, z, upstream)
    (expected,) = torch.autograd.grad(formula, z, upstream)
    assert_close(actual, expected, 1e-14)


@pytest.mark.parametrize("backend", ON_CPU)
def test_margin_and_gradient_at_once_are_the_two_apart(backend: str) -> None:
    logits, labels = inputs((7, 12))
    found = ops.soft_margin_grad(logits.requires_grad_(), labels, temperature=3.0, backend=backend)
    margin, grad = margin_and_grad(logits.detach(), labels, temperature=3.0, backend=backend)
    assert not found.margin.requires_grad
    assert_close(found.margin, margin, 1e-6)
    assert_close(found.grad, grad, 1e-6)


@pytest.mark.parametrize("shape", [(3, 2), (2, 5)], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck(backend: str, shape: tuple[int, int]) -> None:
    logits, labels = inputs(shape, torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: ops.soft_margin(z, labels, backend=backend), logits.requires_grad_()
    )


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradient_is_the_slope_of_a_float32_margin(backend: str) -> None:
    logits, labels = inputs((9, 10))
    logits = logits.clamp(-4, 4)
    _, grad = margin_and_grad(logits, labels, backend=backend)
    direction = torch.randn_like(logits)
    step = 2**-6
    with torch.no_grad():
        up, down = (ops.soft_margin(logits + s * direction, labels, backend=backend) for s in (step, -step))
    assert_close((up - down) / (2 * step), (grad * direction).sum(1), 5e-3)


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_a_gradient_the_margin_is_the_same(backend: str) -> None:
    for shape in ((7, 10), (3, 129), (2, 1025)):
        logits, labels = inputs(shape)
        expected, _ = margin_and_grad(logits, labels, backend=backend)
        plain = ops.soft_margin(logits, labels, backend=backend)
        assert not plain.requires_grad
        assert_same(plain, expected)
        with torch.no_grad():
            assert_same(ops.soft_margin(logits.requires_grad_(), labels, backend=backend), expected)


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_bounds_and_invariances(backend: str, data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 35)), data.draw(st.sampled_from([2, 3, 5, 10, 31, 33]))
    temperature = data.draw(st.floats(0.01, 100))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    logits, labels = inputs((n, k))

    def run(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return margin_and_grad(z, y, temperature=temperature, backend=backend)

    margin, grad = run(logits, labels)
    z = logits.double()
    exact = z.gather(1, labels[:, None])[:, 0] - z.scatter(1, labels[:, None], -INF).amax(1)
    slack = 1e-5 * (1 + 1 / temperature)
    assert (margin <= exact + slack).all()
    assert (exact <= margin + math.log(k - 1) / temperature + slack).all()
    assert_same(grad.gather(1, labels[:, None]), torch.ones(n, 1))
    assert (grad.scatter(1, labels[:, None], 0) <= 0).all()
    assert_close(grad.double().sum(1), torch.zeros(n), 1e-5)

    rows = torch.randperm(n)
    for actual, expected in zip(run(logits[rows], labels[rows]), (margin[rows], grad[rows]), strict=True):
        assert_same(actual, expected)
    cut = data.draw(st.integers(0, n))
    parts = [run(logits[part], labels[part]) for part in (slice(cut), slice(cut, None))]
    assert_same(torch.cat([m for m, _ in parts]), margin)
    assert_same(torch.cat([g for _, g in parts]), grad)
    classes = torch.randperm(k)
    moved, moved_grad = run(logits[:, classes], classes.argsort()[labels])
    assert_close(moved, margin, slack)
    assert_close(moved_grad, grad[:, classes], 1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_extreme_gaps(backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for k in (2, 10, 129):
            logits = torch.zeros(4, k, dtype=dtype)
            logits[0, 0] = 1e4
            logits[1, 0] = -1e4
            logits[2, 1] = 1e4
            logits[3] = 1e4
            uniform = math.log(k - 1) / 5
            margin, grad = margin_and_grad(logits, torch.zeros(4, dtype=torch.int64), backend=backend)
            expected = torch.tensor([1e4 - uniform, -1e4 - uniform, -1e4, -uniform], dtype=torch.float64)
            torch.testing.assert_close(margin.double(), expected, rtol=1e-7, atol=1e-7)
            one_rival = torch.zeros(k)
            one_rival[0], one_rival[1] = 1, -1
            assert_same(grad[2], one_rival.to(dtype))
            for row in (0, 1, 3):
                assert_close(
                    grad[row], torch.full((k,), -1 / (k - 1)).index_fill(0, torch.tensor([0]), 1.0), 1e-7
                )


def odd_rows(k: int) -> tuple[Tensor, Tensor]:
    """Rows with special values, and ordinary ones (3 and 10) between them; the label is 1."""
    logits = torch.randn(11, k)
    logits[0, 2] = NAN
    logits[1, 1] = NAN
    logits[2, 2] = INF
    logits[4, 1] = INF
    logits[5] = -INF
    logits[6] = -INF
    logits[6, 1] = 1.0  # and all others -inf
    logits[7, 1] = -INF
    logits[8, 0] = -INF
    logits[9] = INF
    return logits, torch.ones(11, dtype=torch.int64)


@quiet
@pytest.mark.parametrize("k", [3, 10, 129, 1025, 4099])
@pytest.mark.parametrize("backend", ON_CPU)
def test_special_values_stay_in_their_rows(backend: str, k: int) -> None:
    logits, labels = odd_rows(k)
    margin, grad = margin_and_grad(logits, labels, backend=backend)
    meaningful = [3, 7, 8, 10]
    nan = torch.ones(11, dtype=torch.bool).index_fill(0, torch.tensor(meaningful), False)
    assert_same(margin.isnan(), nan)
    assert_same(grad.isnan(), nan[:, None].expand(-1, k))
    expected_margin, expected_grad = oracle(logits[meaningful], labels[meaningful])
    assert expected_margin[1] == -INF
    assert_close(margin[meaningful], expected_margin, 2e-6)
    assert_close(grad[meaningful], expected_grad, 2e-6)
    assert grad[8, 0] == 0
    # -inf in the whole first chunk of a long row
    logits = torch.full((1, k), -INF)
    logits[0, -1] = 2.0
    margin, grad = margin_and_grad(logits.index_fill(1, torch.tensor([1]), 5.0), labels[:1], backend=backend)
    assert_same(margin, torch.tensor([3.0]))
    assert_same(
        grad,
        torch.zeros(1, k).index_fill(1, torch.tensor([1]), 1.0).index_fill(1, torch.tensor([k - 1]), -1.0),
    )


@quiet
@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**40), 2**32])
@pytest.mark.parametrize("backend", ON_CPU)
def test_labels_out_of_range(backend: str, label: int) -> None:
    logits, _ = inputs((3, 5))
    labels = torch.tensor([4, label, 0])
    if backend in ("cpp", "eager"):
        with pytest.raises(
            RuntimeError, match=rf"soft_margin: labels\[1\] is {label}, expected a class in \[0, 5\)"
        ):
            ops.soft_margin(logits, labels, backend=backend)
        return
    margin, grad = margin_and_grad(logits, labels, backend=backend)
    assert margin[1].isnan()
    assert grad[1].isnan().all()
    expected_margin, expected_grad = oracle(logits[::2], labels[::2])
    assert_close(margin[::2], expected_margin, 2e-6)
    assert_close(grad[::2], expected_grad, 2e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_any_layout_and_never_in_place(backend: str) -> None:
    logits, labels = inputs((9, 10))
    expected = margin_and_grad(logits, labels, backend=backend)
    layouts = {
        "transposed": (logits.t().contiguous().t(), labels),
        "with gaps": (
            torch.stack([logits, -logits], -1)[..., 0],
            torch.stack([labels, labels + 7], -1)[:, 0],
        ),
        "unaligned": (torch.cat([torch.zeros(1), logits.flatten()])[1:].view(9, 10), labels),
    }
    for strange_logits, strange_labels in layouts.values():
        before = strange_logits.clone(), strange_labels.clone()
        for actual, wanted in zip(
            margin_and_grad(strange_logits, strange_labels, backend=backend), expected, strict=True
        ):
            assert_same(actual, wanted)
        assert_same(strange_logits, before[0])
        assert_same(strange_labels, before[1])
    expanded = logits[:1].expand(9, -1)
    assert_same(
        ops.soft_margin(expanded, labels, backend=backend),
        ops.soft_margin(expanded.clone(), labels, backend=backend),
    )


@needs("ext")
def test_cpp_splits_a_large_batch_without_gaps() -> None:
    for shape in ((5001, 10), (301, 1000)):
        logits, labels = inputs(shape)
        margin, grad = margin_and_grad(logits, labels, backend="cpp")
        expected_margin, expected_grad = margin_and_grad(logits, labels, backend="eager")
        assert_close(margin, expected_margin, 1e-5)
        assert_close(grad, expected_grad, 2e-6)


def test_second_derivatives() -> None:
    logits, labels = inputs((3, 5), torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda z: ops.soft_margin(z, labels, backend="eager"), logits.requires_grad_()
    )


@pytest.mark.parametrize("backend", ON_CPU[1:])
def test_no_second_derivative_from_a_stored_gradient(backend: str) -> None:
    logits, labels = inputs((3, 5))
    margin = ops.soft_margin(logits.requires_grad_(), labels, backend=backend)
    with pytest.raises(RuntimeError, match=r'soft_margin: no second derivative .*; backend="eager" has one'):
        torch.autograd.grad(margin.sum(), logits, create_graph=True)


@pytest.mark.parametrize("backend", ON_CPU)
def test_under_autocast(backend: str) -> None:
    logits, labels = inputs((5, 10))
    expected = margin_and_grad(logits, labels, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, wanted in zip(margin_and_grad(logits, labels, backend=backend), expected, strict=True):
            assert_same(actual, wanted)


@pytest.mark.parametrize("name", ["soft_margin", pytest.param("soft_margin_triton", marks=needs("triton"))])
def test_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    for shape in ((5, 7), (0, 3)):
        logits, labels = inputs(shape)
        torch.library.opcheck(operator, (logits, labels, 5.0, False))
        torch.library.opcheck(operator, (logits.requires_grad_(), labels, 5.0, True))
    torch.library.opcheck(
        operator, (inputs((5, 4), torch.bfloat16)[0].t(), torch.zeros(4, dtype=torch.int64), 5.0, True)
    )


@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str) -> None:
    # Without Inductor, which needs a C++ compiler and seconds: tracing and the fake are what is ours here.
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (ops.soft_margin(2 * z, y, backend=backend) * torch.arange(len(y))).sum()

    logits, labels = inputs((7, 10))
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits, labels), logits)
    expected = oracle(2 * logits.detach(), labels)[1] * 2 * torch.arange(7)[:, None]
    assert_close(grad, expected, 5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.rand(4)}, r"soft_margin: logits must be \(N, K\) with K >= 2, got shape \(4,\)"),
        ({"logits": torch.rand(4, 1)}, r"logits must be \(N, K\) with K >= 2, got shape \(4, 1\)"),
        ({"logits": torch.ones(4, 3).int()}, r"logits must be float32, .*, got torch.int32"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            r"labels must have shape \(4,\), one per row, got \(3,\)",
        ),
        ({"labels": torch.zeros(4)}, r"labels must be int64 class indices, got torch.float32"),
        (
            {"labels": torch.zeros(4, dtype=torch.int64, device="meta")},
            r"labels is on meta but the logits are on cpu",
        ),
        ({"temperature": 0.0}, r"temperature must be positive, from 1e-30 to 1e30, got 0.0"),
        ({"temperature": -1.0}, r"temperature must be positive, .* got -1.0"),
        ({"temperature": NAN}, r"temperature must be positive, .* got nan"),
        ({"temperature": INF}, r"temperature must be positive, .* got inf"),
    ],
)
def test_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args = {"logits": torch.rand(4, 3), "labels": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        ops.soft_margin(**args)


@pytest.mark.parametrize("backend", ON_CPU[1::2])
def test_the_registered_operator_checks_for_itself(backend: str) -> None:
    run = torch.ops.fastdynat.soft_margin
    logits, labels = inputs((4, 3))
    for args, message in [
        ((logits[0], labels, 5.0, True), r"logits must be \(N, K\)"),
        ((logits[:, :1], labels, 5.0, True), r"logits must be \(N, K\) with K >= 2, got shape \(4, 1\)"),
        ((logits.int(), labels, 5.0, True), "logits must be float32"),
        ((logits, labels[:3], 5.0, True), r"labels has shape \(3\), expected one entry per row of logits"),
        ((logits, labels.int(), 5.0, True), "labels must be int64"),
        ((logits, labels, NAN, True), "temperature must be in"),
        ((logits, labels, 0.0, True), "temperature must be in"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run(*args)
