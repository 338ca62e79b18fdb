"""The L1 and L0 PGD steps: exact oracles by sorting, agreement of the implementations, range, ties."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIMULATED_CUDA, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdynat import ops

STEP, EPS, SPARSITY = 0.7, 1.0, 0.8
NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float64)
GRAD_DTYPES = (*DTYPES, torch.bfloat16, torch.float16)
ON_CPU = [
    "eager",
    pytest.param("cpp", marks=needs("ext")),
    SIMULATED_CUDA,
    pytest.param(
        "triton", marks=[needs("triton"), pytest.mark.skipif(torch.cuda.is_available(), reason="see ON_GPU")]
    ),
]
ON_GPU = [pytest.param(name, marks=[needs("gpu"), pytest.mark.gpu]) for name in ("eager", "cuda", "triton")]
SHAPES = [(0, 3, 2, 2), (2, 0), (1,), (3, 1), (2, 17), (3, 3, 8, 8), (3, 3, 9, 11)]
GPU_SHAPES = [*SHAPES, (1, 8195), (64, 3, 32, 32), (3, 12288), (2, 12289), (2, 3, 224, 224), (70000, 3)]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None
) -> Any:
    """Points in and outside the ball, saturated; gradients with ties, 0, NaN; none for every third image."""
    x0 = (torch.rand(shape, dtype=dtype) * 1.4 - 0.2).clamp(0, 1)
    spread = 4 * EPS / max(1, x0[:1].numel()) * torch.rand(shape[:1] + (1,) * (len(shape) - 1), dtype=dtype)
    x_adv = (x0 + spread * torch.randn(shape, dtype=dtype)).clamp(0, 1)
    grad = torch.randn(shape).mul(16).round() * 1e-3
    odd = torch.rand(shape)
    grad = torch.where(odd < 0.1, 0.0, torch.where(odd > 0.9, NAN, grad))
    grad[::3] = torch.where(odd[::3] < 0.5, 0.0, NAN)
    return x_adv, grad.to(grad_dtype or dtype), x0


def step(x_adv: Tensor, grad: Tensor, x0: Tensor, **kwargs: Any) -> Tensor:
    return ops.pgd_step_l1(x_adv, grad, x0, **{"step_size": STEP, "eps": EPS, "sparsity": SPARSITY} | kwargs)


def oracle(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float = STEP,
    eps: float = EPS,
    sparsity: float = SPARSITY,
) -> Tensor:
    """In float64 numpy: the multiplier from the sorted places where the length of the projection bends."""
    rows = (len(x0), x0[:1].numel())
    points, clean = (t.double().reshape(rows).numpy() for t in (x_adv, x0))
    gradients = np.nan_to_num(grad.to(x_adv.dtype).double().reshape(rows).numpy(), nan=0.0)
    out = np.empty_like(points)
    for i in range(len(points)):
        size = np.abs(gradients[i])
        count = max(1, round((1 - sparsity) * size.size))
        chosen = (size >= np.sort(size)[-count]) & (size > 0) if size.size else size > 0
        delta = points[i] - clean[i] + chosen * np.sign(gradients[i]) * step_size / max(1, chosen.sum())
        room = np.where(delta > 0, 1 - clean[i], clean[i])

        def length(tau: float, delta: Any = delta, room: Any = room) -> Any:
            return np.clip(np.abs(delta) - tau, 0, room)

        tau = 0.0
        if length(0.0).sum() > eps:
            bends = np.unique(np.concatenate([[0.0], np.abs(delta), np.abs(delta) - room]))
            bends = bends[bends >= 0]
            lengths = np.array([length(bend).sum() for bend in bends])
            j = int(np.nonzero(lengths > eps)[0][-1])
            tau = bends[j] + (lengths[j] - eps) / (lengths[j] - lengths[j + 1]) * (bends[j + 1] - bends[j])
        out[i] = clean[i] + np.sign(delta) * length(tau)
    return torch.tensor(out).reshape(x_adv.shape)


def lengths(t: Tensor) -> Tensor:
    return t.double().flatten(1).abs().sum(1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_agrees_with_the_definition(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = inputs(shape, dtype)
    torch.testing.assert_close(
        step(*args, backend=backend).double(), oracle(*args), rtol=0, atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("backend", ON_CPU)
def test_images_too_large_for_registers(backend: str) -> None:
    for shape in ((1, 8195), (1, 12290)) if backend != "triton" else ((1, 8195),):
        args = inputs(shape)
        args[1][0, :5] = torch.arange(1.0, 6.0)  # the other gradients are 0 or NaN
        torch.testing.assert_close(step(*args, backend=backend).double(), oracle(*args), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradient_dtypes(backend: str, grad_dtype: torch.dtype) -> None:
    for dtype in DTYPES[: 1 if backend == "triton" else 2]:
        args = inputs((2, 3, 4, 5), dtype, grad_dtype)
        torch.testing.assert_close(
            step(*args, backend=backend).double(), oracle(*args), rtol=0, atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_agrees_with_cpu(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for shape in GPU_SHAPES:
        args = inputs(shape, dtype, grad_dtype)
        on_gpu = step(*(t.cuda() for t in args), backend=backend)
        torch.testing.assert_close(on_gpu.cpu(), step(*args), rtol=0, atol=TOLERANCE[dtype])


@needs("ext")
def test_cpp_splits_a_large_batch_without_gaps() -> None:
    args = inputs((33, 3, 32, 33))
    torch.testing.assert_close(step(*args, backend="cpp").double(), oracle(*args), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_who_moves(backend: str) -> None:
    half = torch.full((1, 8), 0.5)

    def moved(grad: list[float], sparsity: float) -> list[float]:
        out = step(
            half, torch.tensor([grad]), half, step_size=0.4, eps=2.0, sparsity=sparsity, backend=backend
        )
        return ((out[0] - 0.5) / 0.4).double().mul(1e6).round().div(1e6).tolist()

    grad = [1.0, -4.0, 3.0, 0.5, -2.0, 0.25, 8.0, 0.0]
    assert moved(grad, 0.99) == [0, 0, 0, 0, 0, 0, 1, 0]  # one at least
    assert moved(grad, 0.75) == [0, -0.5, 0, 0, 0, 0, 0.5, 0]
    assert moved(grad, 0.5) == [0, -0.25, 0.25, 0, -0.25, 0, 0.25, 0]
    assert moved([2.0, 2, -2, 2, 1, 1, 1, 1], 0.75) == [
        0.25,
        0.25,
        -0.25,
        0.25,
        0,
        0,
        0,
        0,
    ]  # ties go together
    assert moved([0.0, NAN, 0, 0, -1e-44, 0, 0, 0], 0.5) == [
        0,
        0,
        0,
        0,
        -1,
        0,
        0,
        0,
    ]  # what has no gradient stays
    assert moved([INF, 1.0, -INF, 3e38, 0, 0, 0, NAN], 0.75) == [0.5, 0, -0.5, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_a_gradient_the_point_is_only_projected(backend: str) -> None:
    x0 = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.5]])
    x_adv = torch.tensor([[0.5, 0.625], [0.5, 2.0], [2.9, 0.5]])
    grad = torch.tensor([[0.0, NAN], [0.0, -0.0], [NAN, NAN]])
    expected = torch.tensor([[0.5, 0.625], [0.5, 1.0], [1.0, 0.5]])
    torch.testing.assert_close(step(x_adv, grad, x0, backend=backend), expected, rtol=0, atol=6e-8)
    assert_same(step(x_adv, grad, x0, eps=0.0, backend=backend), x0)


@pytest.mark.parametrize("backend", ON_CPU)
def test_nan_stays_where_it_is(backend: str) -> None:
    for which in (0, 2):
        args = [t.nan_to_num() for t in inputs((3, 40))]
        args[which][1, 7] = NAN
        out = step(*args, eps=0.2, backend=backend)
        assert out.isnan().nonzero().tolist() == [[1, 7]]
        assert (out - args[2])[1].abs().nansum() <= 0.2 + 1e-6


@pytest.mark.parametrize("backend", ON_CPU)
def test_range_and_negative_step(backend: str) -> None:
    zero = torch.zeros(1, 4)
    grad = torch.tensor([[3.0, -4.0, 0.5, 0.0]])
    moved = step(zero, grad, zero, step_size=-4.0, eps=5.0, sparsity=0.5, lo=-1.0, hi=1.5, backend=backend)
    assert_same(moved, torch.tensor([[-1.0, 1.5, 0.0, 0.0]]))


@pytest.mark.parametrize("backend", ON_CPU[:2])  # Triton's interpreter takes seconds for that many passes
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_properties(backend: str, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40)))
    eps = data.draw(st.floats(0, 4, width=32))
    step_size = data.draw(st.floats(-4, 4, width=32))
    sparsity = data.draw(st.floats(0, 0.99))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x_adv, grad, x0 = inputs(shape)
    kwargs = {"step_size": step_size, "eps": eps, "sparsity": sparsity, "backend": backend}
    out = ops.pgd_step_l1(x_adv, grad, x0, **kwargs)
    assert ((out >= 0) & (out <= 1)).all()
    assert (lengths(out.double() - x0.double()) <= eps + 2**-24 * shape[1]).all()
    torch.testing.assert_close(
        out.double(), oracle(x_adv, grad, x0, step_size, eps, sparsity), rtol=0, atol=2e-6
    )
    still = torch.zeros_like(grad)
    torch.testing.assert_close(ops.pgd_step_l1(out, still, x0, **kwargs), out, rtol=0, atol=2e-6)
    order = torch.randperm(shape[1])
    shuffled = ops.pgd_step_l1(x_adv[:, order], grad[:, order], x0[:, order], **kwargs)
    torch.testing.assert_close(shuffled, out[:, order], rtol=0, atol=2e-7)
    alone = [ops.pgd_step_l1(*(t[i : i + 1] for t in (x_adv, grad, x0)), **kwargs) for i in range(shape[0])]
    assert_same(torch.cat(alone), out)


@pytest.mark.parametrize("backend", ON_CPU)
def test_keeps_the_layout_of_x_adv(backend: str) -> None:
    x_adv, grad, x0 = inputs((2, 3, 6, 5))
    plain = step(x_adv, grad, x0, backend="eager")
    last = torch.channels_last
    layouts = {
        "all channels-last": tuple(t.to(memory_format=last) for t in (x_adv, grad, x0)),
        "mixed": (x_adv.to(memory_format=last), grad, x0),
        "permuted": tuple(t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in (x_adv, grad, x0)),
        "with gaps": tuple(torch.stack([t, t], -1)[..., 0] for t in (x_adv, grad, x0)),
    }
    for name, args in layouts.items():
        out = step(*args, backend=backend)
        torch.testing.assert_close(out.contiguous(), plain, rtol=0, atol=1e-6)
        kept = name in ("all channels-last", "mixed")
        assert out.is_contiguous(memory_format=last if kept else torch.contiguous_format), name


@needs("ext")
def test_the_registered_operator_checks_again() -> None:
    run = torch.ops.fastdynat.pgd_step_l1
    x_adv, grad, x0 = inputs((2, 3, 6, 5))
    expected = run(x_adv, grad, x0, STEP, EPS, 5, 0.0, 1.0)
    across = (
        x_adv.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    )  # dense, but the images are interleaved
    out = run(across, grad, x0, STEP, EPS, 5, 0.0, 1.0)
    assert_same(out.contiguous(), expected)
    assert out.stride() == across.stride()
    for change, message in (
        ({1: torch.rand(2)}, r"grad has shape \(2\) but x_adv has shape"),
        ({2: x0.double()}, "x0 and x_adv must have one dtype"),
        ({5: 0}, "count must be at least 1, got 0"),
    ):
        args = [change.get(i, value) for i, value in enumerate((x_adv, grad, x0, STEP, EPS, 5, 0.0, 1.0))]
        with pytest.raises(RuntimeError, match=message):
            run(*args)


@pytest.mark.parametrize("backend", ON_CPU)
def test_is_out_of_place_and_detached(backend: str) -> None:
    args = inputs((3, 7))
    before = [t.clone() for t in args]
    out = step(*(t.requires_grad_() for t in args), backend=backend)
    assert not out.requires_grad
    assert out.data_ptr() not in {t.data_ptr() for t in args}
    for now, then in zip(args, before, strict=True):
        assert_same(now.detach(), then)


@pytest.mark.parametrize("name", ["pgd_step_l1", pytest.param("pgd_step_l1_triton", marks=needs("triton"))])
def test_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    args = (t.to(memory_format=torch.channels_last) for t in inputs((2, 3, 4, 5)))
    torch.library.opcheck(operator, (*args, STEP, EPS, 7, 0.0, 1.0))
    torch.library.opcheck(operator, (*inputs((0, 2)), STEP, EPS, 7, 0.0, 1.0))


@pytest.mark.parametrize("backend", ON_CPU[1:])
def test_compiles_as_one_graph(backend: str) -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = inputs((2, 3, 4, 5))
    assert_same(compiled(*args, backend=backend), step(*args, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.rand(4)}, r"grad has shape \(4,\) but x_adv has shape \(2, 3\)"),
        ({"x_adv": torch.rand(2, 3).half()}, r"x_adv must be float32 or float64, got torch.float16"),
        ({"x_adv": torch.tensor(0.5)}, r"pgd_step_l1: x_adv needs a first dimension of images, got a scalar"),
        ({"eps": -0.1}, r"eps must be >= 0 .* got -0.1"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\).* got 1.0"),
        ({"sparsity": NAN}, r"sparsity must be in \[0, 1\)"),
    ],
)
def test_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args = dict(zip(("x_adv", "grad", "x0"), inputs((2, 3)), strict=True)) | {"step_size": STEP, "eps": EPS}
    with pytest.raises(ValueError, match=message):
        ops.pgd_step_l1(**args | change)


# The L0 step.

L0_SHAPES = [(0, 3, 2, 2), (2, 3, 0, 4), (3, 1, 1, 1), (2, 3, 5, 7), (2, 2, 1, 9)]
L0_GPU_SHAPES = [*L0_SHAPES, (64, 3, 32, 32), (1, 2, 91, 91), (2, 3, 224, 224)]


def l0_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None
) -> Any:
    """Points that differ from the image in some pixels; every third image has no gradient."""
    _, grad, x0 = inputs(shape, dtype, grad_dtype)
    changed = torch.rand(shape[0], 1, *shape[2:]) < 0.3
    return torch.where(changed, torch.rand_like(x0), x0), grad, x0


def l0_step(x_adv: Tensor, grad: Tensor, x0: Tensor, **kwargs: Any) -> Tensor:
    return ops.pgd_step_l0(x_adv, grad, x0, **{"step_size": 2.0, "pixels": 6} | kwargs)


def l0_oracle(x_adv: Tensor, grad: Tensor, x0: Tensor, pixels: int = 6) -> Tensor:
    """In float64 numpy, with a sort."""
    x, clean = x_adv.double().numpy(), x0.double().numpy()
    g = np.nan_to_num(grad.double().numpy(), nan=0.0)
    z = np.clip(x + 2.0 * g / np.maximum(np.abs(g).sum((1, 2, 3), keepdims=True), 1e-300), 0, 1)
    score = ((z - clean) ** 2).sum(1).reshape(len(x), x[0:1, 0].size if len(x) else 0)
    order = np.argsort(-score, axis=1, kind="stable")
    kept = np.zeros_like(score, dtype=bool)
    np.put_along_axis(kept, order[:, :pixels], True, axis=1)
    return torch.tensor(np.where(kept.reshape(len(x), 1, *x.shape[2:]), z, clean))


def differing(a: Tensor, b: Tensor) -> list[int]:
    """The number of pixels, per image."""
    return (a != b).any(1).flatten(1).sum(1).tolist()


@pytest.mark.parametrize("shape", L0_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_l0_agrees_with_the_definition(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = l0_inputs(shape, dtype)
    for pixels in (0, 6, 10**6) if backend == "triton" else (0, 1, 6, 10**6):
        out = l0_step(*args, pixels=pixels, backend=backend)
        torch.testing.assert_close(out.double(), l0_oracle(*args, pixels), rtol=0, atol=1e-7)
        assert all(n <= pixels for n in differing(out, args[2]))


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_l0_gradient_dtypes(backend: str, grad_dtype: torch.dtype) -> None:
    args = l0_inputs((2, 3, 4, 5), grad_dtype=grad_dtype)
    torch.testing.assert_close(l0_step(*args, backend=backend).double(), l0_oracle(*args), rtol=0, atol=1e-7)


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_l0_gpu_agrees_with_cpu(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for shape in L0_GPU_SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            args = [t.to(memory_format=layout) for t in l0_inputs(shape, dtype, grad_dtype)]
            on_gpu = l0_step(*(t.cuda() for t in args), backend=backend)
            torch.testing.assert_close(on_gpu.cpu(), l0_step(*args), rtol=0, atol=1e-7)


def test_l0_large_batches_and_images() -> None:
    for shape in ((33, 3, 32, 33), (1, 2, 91, 91)):
        args = l0_inputs(shape)
        torch.testing.assert_close(l0_step(*args).double(), l0_oracle(*args), rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", ON_CPU)
def test_l0_ties_go_to_the_first_pixels_in_every_layout(backend: str) -> None:
    x0 = torch.zeros(1, 2, 3, 4)
    x_adv = torch.zeros_like(x0)
    x_adv.view(2, 12)[:, [1, 3, 4, 8, 11]] = 0.5
    x_adv.view(2, 12)[1, 6] = 1.0  # further than those: 1 against 1/4 + 1/4
    x_adv.view(2, 12)[0, 9] = 0.25
    still = torch.zeros_like(x0)
    for pixels, kept in (
        (0, []),
        (1, [6]),
        (2, [1, 6]),
        (4, [1, 3, 4, 6]),
        (6, [1, 3, 4, 6, 8, 11]),
        (7, [1, 3, 4, 6, 8, 9, 11]),
    ):
        expected = torch.zeros_like(x0)
        expected.view(2, 12)[:, kept] = x_adv.view(2, 12)[:, kept]
        for layout in (torch.contiguous_format, torch.channels_last):
            args = (t.to(memory_format=layout) for t in (x_adv, still, x0))
            assert_same(l0_step(*args, pixels=pixels, backend=backend).contiguous(), expected)


@pytest.mark.parametrize("backend", ON_CPU)
def test_l0_step_lengths_and_range(backend: str) -> None:
    x0 = torch.full((1, 1, 1, 4), 0.5)
    for scale in (1e-40, 1.0, 1e37):
        grad = scale * torch.tensor([[[[1.0, -2.0, 5.0, NAN]]]])
        out = l0_step(x0, grad, x0, step_size=0.8, backend=backend)
        expected = torch.tensor([[[[0.6, 0.3, 1.0, 0.5]]]])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if scale < 1e-38 else 6e-8)
    out = l0_step(
        x0, torch.tensor([[[[INF, 0.0, -INF, 1.0]]]]), x0, step_size=-0.8, lo=0.25, pixels=1, backend=backend
    )
    assert_same(out, torch.tensor([[[[0.5, 0.5, 0.9, 0.5]]]]))


@pytest.mark.parametrize("backend", ON_CPU)
def test_l0_nan_stays_where_it_is(backend: str) -> None:
    for which in (0, 2):
        args = [t.nan_to_num() for t in l0_inputs((2, 3, 4, 5))]
        args[which][1, 2, 3, 1] = NAN
        out = l0_step(*args, backend=backend)
        assert out.isnan().nonzero().tolist() == [[1, 2, 3, 1]]
        assert differing(out.nan_to_num(), args[2].nan_to_num())[1] <= 6 + 1


@needs("ext")
def test_l0_registered_operator_takes_any_layout_itself() -> None:
    run = torch.ops.fastdynat.pgd_step_l0
    x_adv, grad, x0 = l0_inputs((2, 3, 6, 5))
    expected = run(x_adv, grad, x0, 2.0, 6, 0.0, 1.0)
    inside = x_adv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # images are blocks, rows are not
    across = x_adv.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for x in (
        inside,
        across,
        x_adv.to(memory_format=torch.channels_last),
        torch.stack([x_adv, x_adv], -1)[..., 1],
    ):
        out = run(x, grad, x0, 2.0, 6, 0.0, 1.0)
        assert_same(out.contiguous(), expected)
        assert out.stride() == torch.empty_like(x).stride()
    for change, message in (
        ({0: x_adv[0], 1: grad[0], 2: x0[0]}, r"x_adv must be \(N, C, H, W\), has shape \(3, 6, 5\)"),
        ({4: -1}, "pixels must not be negative, got -1"),
        ({1: torch.rand(2)}, r"grad has shape \(2\) but x_adv has shape"),
    ):
        args = [change.get(i, value) for i, value in enumerate((x_adv, grad, x0, 2.0, 6, 0.0, 1.0))]
        with pytest.raises(RuntimeError, match=message):
            run(*args)


@pytest.mark.parametrize("name", ["pgd_step_l0", pytest.param("pgd_step_l0_triton", marks=needs("triton"))])
def test_l0_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    args = (t.to(memory_format=torch.channels_last) for t in l0_inputs((2, 3, 4, 5)))
    torch.library.opcheck(operator, (*args, 2.0, 6, 0.0, 1.0))


@pytest.mark.parametrize("backend", ON_CPU)
def test_l0_compiles_and_is_out_of_place(backend: str) -> None:
    compiled = torch.compile(l0_step, fullgraph=True, backend="aot_eager")
    args = l0_inputs((2, 3, 4, 5))
    before = [t.clone() for t in args]
    out = compiled(*args, backend=backend)
    assert_same(out, l0_step(*(t.requires_grad_() for t in args), backend=backend))
    assert not out.requires_grad
    for now, then in zip(args, before, strict=True):
        assert_same(now.detach(), then)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_adv": torch.rand(2, 3)}, r"pgd_step_l0: x_adv must be \(N, C, H, W\), got shape \(2, 3\)"),
        ({"pixels": -1}, r"pixels must be >= 0, got -1"),
        ({"grad": torch.rand(4)}, r"grad has shape \(4,\)"),
    ],
)
def test_l0_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args = dict(zip(("x_adv", "grad", "x0"), l0_inputs((1, 1, 2, 3)), strict=True)) | {
        "step_size": 1.0,
        "pixels": 1,
    }
    with pytest.raises(ValueError, match=message):
        ops.pgd_step_l0(**args | change)
