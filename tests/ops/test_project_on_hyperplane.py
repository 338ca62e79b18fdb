"""Projection on a hyperplane in a box: exact oracle by sorting, optimality, unreachable and odd planes."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIMULATED_CUDA, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.boundary_reference import sorted_projection
from torch import Tensor

from fastdynat import ops
from fastdynat.errors import UserError

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float64)
W_DTYPES = (*DTYPES, torch.bfloat16, torch.float16)
NORMS = ("linf", "l2")
ON_CPU = [
    "eager",
    pytest.param("cpp", marks=needs("ext")),
    SIMULATED_CUDA,
    pytest.param(
        "triton", marks=[needs("triton"), pytest.mark.skipif(torch.cuda.is_available(), reason="see ON_GPU")]
    ),
]
ON_GPU = [pytest.param(name, marks=[needs("gpu"), pytest.mark.gpu]) for name in ("eager", "cuda", "triton")]
SHAPES = [(0, 3, 2, 2), (2, 0), (3,), (1, 1), (4, 17), (3, 3, 8, 8), (3, 3, 9, 11), (1, 12291)]
GPU_SHAPES = [
    *SHAPES,
    (64, 3, 32, 32),
    (3, 4096),
    (2, 4097),
    (3, 12288),
    (2, 12289),
    (2, 3, 224, 224),
    (70000, 3),
]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype | None = None,
    far: float = 0.1,
) -> Any:
    """Saturated images, weights of all sizes and zeros; the planes' offset is `far` of the reach."""
    x = (torch.rand(shape, dtype=dtype) * 1.4 - 0.2).clamp(0, 1)
    w = torch.randn(shape, dtype=dtype) * torch.rand(shape, dtype=dtype) ** 4
    w = torch.where(torch.rand(shape) < 0.1, 0.0, w).to(w_dtype or dtype)
    at = (x + 0.03 * torch.randn(shape, dtype=dtype)).clamp(0, 1)
    wide = w.to(dtype).reshape(rows := (shape[0], x[:1].numel()))
    value = (wide * (at - x).reshape(rows)).sum(1) + far * wide.abs().sum(1) * torch.where(
        torch.rand(len(x)) < 0.5, -1, 1
    )
    return x, w, value, at


def project(x: Tensor, w: Tensor, value: Tensor, at: Tensor, **kwargs: Any) -> Tensor:
    return ops.project_on_hyperplane(x, w, value, at, **kwargs)


def oracle(
    x: Tensor, w: Tensor, value: Tensor, at: Tensor, norm: str, lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """Sorts the multipliers at which entries meet their bounds and walks along them, in float64 numpy."""
    points, weights, origins = (t.double().reshape(len(x), x[:1].numel()).numpy() for t in (x, w, at))
    out = points.clip(lo, hi)
    for i in range(len(points)):
        start = out[i].copy()
        c = float(value[i]) + weights[i] @ (start - origins[i])
        direction = np.sign(c) * weights[i]
        (moving,) = np.nonzero(direction)
        d = direction[moving]
        speed = np.sign(d) if norm == "linf" else d
        ends = np.where(d > 0, start[moving] - lo, hi - start[moving]) / np.abs(speed)
        order = np.argsort(ends)
        slopes = np.cumsum((d * speed)[order][::-1])[::-1]  # of the entries from this one on
        way, t = 0.0, 0.0
        for j, slope in zip(order, slopes, strict=True):
            if way + slope * (ends[j] - t) >= abs(c):
                t += (abs(c) - way) / slope
                break
            way, t = way + slope * (ends[j] - t), ends[j]
        else:
            t = INF
        out[i, moving] = np.clip(start[moving] - t * speed, lo, hi) if abs(c) > 0 else start[moving]
    return torch.tensor(out).reshape(x.shape)


def rest(z: Tensor, w: Tensor, value: Tensor, at: Tensor) -> Tensor:
    """The residual of the linear function, (N,)."""
    return value.double() + (w.double() * (z.double() - at.double())).flatten(1).sum(1)


def distance(z: Tensor, x: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(
        (z.double() - x.double()).flatten(1), ord=INF if norm == "linf" else 2, dim=1
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_near_eager(z: Tensor, args: Any, norm: str) -> None:
    """`z` is eager's result on the CPU but for what products in the dtype of x change.

    They leave an error of about eps * sum|w| * (the largest move) in the linear function. The entries that
    are free to move make up for it, by it divided by the slope: few of them with small weights go far.
    """
    x, w, *_ = args
    if x.numel() == 0:
        return
    want = project(*args, norm=norm, backend="eager")
    rows = (len(x), -1)
    size, point = w.double().abs().reshape(rows), want.double().reshape(rows)
    move = (point - x.double().reshape(rows)).abs()
    free = (size > 0) & (point > 1e-6) & (point < 1 - 1e-6)
    slope = torch.where(free, size if norm == "linf" else size * size, 0).sum(1, keepdim=True)
    speed = (size > 0) if norm == "linf" else size
    left = torch.finfo(x.dtype).eps * size.sum(1, keepdim=True) * move.amax(1, keepdim=True)
    allowed = TOLERANCE[x.dtype] + torch.where(slope > 0, left / slope, 0) * speed
    excess = (z.double().reshape(rows) - point).abs() - allowed
    assert excess.max() <= 0, f"off by {float(excess.max()):.2g} more than allowed"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_agrees_with_the_sorted_walk(
    backend: str, dtype: torch.dtype, norm: str, shape: tuple[int, ...]
) -> None:
    for far in (0.001, 0.1, 0.3, 0.45, 2.0):
        args = inputs(shape, dtype, far=far)
        z = project(*args, norm=norm, backend=backend)
        torch.testing.assert_close(z.double(), oracle(*args, norm), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_dtypes_of_w(backend: str, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    for norm in NORMS:
        args = inputs((3, 3, 5, 7), dtype, w_dtype)
        z = project(*args, norm=norm, backend=backend)
        torch.testing.assert_close(z.double(), oracle(*args, norm), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_agrees_with_cpu(backend: str, dtype: torch.dtype, w_dtype: torch.dtype, norm: str) -> None:
    for shape in GPU_SHAPES:
        for far in (0.1, 0.45, 2.0):
            args = inputs(shape, dtype, w_dtype, far)
            on_gpu = project(*(t.cuda() for t in args), norm=norm, backend=backend)
            assert_near_eager(on_gpu.cpu(), args, norm)


@needs("ext")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_agrees_with_eager_on_many_small_images(dtype: torch.dtype, norm: str) -> None:
    for far in (0.1, 0.45, 2.0):
        args = inputs((70000, 3), dtype, far=far)
        assert_near_eager(project(*args, norm=norm, backend="cpp"), args, norm)


@needs("ext")
def test_cpp_splits_a_large_batch_without_gaps() -> None:
    args = inputs((33, 3, 32, 33))
    for norm in NORMS:
        z = project(*args, norm=norm, backend="cpp")
        torch.testing.assert_close(z, project(*args, norm=norm, backend="eager"), rtol=0, atol=2e-7)


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_bounds_the_distance_is_that_of_a_linear_function(backend: str) -> None:
    x, w, value, at = inputs((5, 40), torch.float64)
    c = rest(x, w, value, at).abs()
    for norm, dual in (("linf", 1), ("l2", 2)):
        for bound in (INF, 1e6):
            z = project(x, w, value, at, norm=norm, lo=-bound, hi=bound, backend=backend)
            expected = c / torch.linalg.vector_norm(w, ord=dual, dim=1)
            torch.testing.assert_close(distance(z, x, norm), expected, rtol=1e-9, atol=0)
            torch.testing.assert_close(rest(z, w, value, at), torch.zeros_like(c), rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_properties(backend: str, data: st.DataObject) -> None:
    n, d = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    far = data.draw(st.floats(0, 1))
    norm = data.draw(st.sampled_from(NORMS))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x, w, value, at = args = inputs((n, d), far=far)
    kwargs = {"norm": norm, "backend": backend}
    z = project(*args, **kwargs)
    assert ((z >= 0) & (z <= 1)).all()
    assert_same(z[w == 0], x[w == 0])

    # On the plane, or at the bounds in every entry that could help, and never past the plane.
    small = 1e-6 * w.double().abs().sum(1) + 1e-12
    before, after = rest(x, w, value, at), rest(z, w, value, at)
    helps = w.double() * before.sign()[:, None]
    corner = torch.where(helps > 0, 0.0, torch.where(helps < 0, 1.0, x.double()))
    reachable = rest(corner, w, value, at) * before.sign() < -small
    assert (after.abs() <= torch.where(reachable, small, INF)).all()
    assert (after * before.sign() >= -small).all()
    exhausted = rest(corner, w, value, at) * before.sign() > small
    assert_same(z.double()[exhausted], corner[exhausted])

    # Random points of the box on the plane are not nearer: the line from another point of the box to one
    # beyond the plane.
    others = torch.rand(20, n, d, dtype=torch.float64)
    for other in others:
        there, beyond = rest(other, w, value, at), rest(corner, w, value, at)
        share = (there / (there - beyond)).unsqueeze(1)
        feasible = other + share * (corner - other)
        usable = ((share >= 0) & (share <= 1)).all(1) & reachable
        near = distance(z, x, norm) <= distance(feasible, x, norm) + 1e-5
        assert near[usable].all()

    torch.testing.assert_close(
        project(z, w, value, at, **kwargs), z, rtol=0, atol=2e-6 if reachable.all() else 1
    )
    order, rows = torch.randperm(d), torch.randperm(n)
    shuffled = project(x[rows][:, order], w[rows][:, order], value[rows], at[rows][:, order], **kwargs)
    torch.testing.assert_close(shuffled, z[rows][:, order], rtol=0, atol=2e-6)
    assert_same(torch.cat([project(*(t[i : i + 1] for t in args), **kwargs) for i in range(n)]), z)


@pytest.mark.parametrize("backend", ON_CPU)
def test_l2_optimality(backend: str) -> None:
    """KKT: x - z is a multiple of w where z is inside, no more than it at a bound."""
    x, w, value, at = inputs((6, 50), torch.float64, far=0.15)
    z = project(x, w, value, at, norm="l2", backend=backend)
    inside = (z > 0) & (z < 1) & (w != 0)
    for i in range(len(x)):
        multiples = ((x - z) / w)[i][inside[i]]
        t = multiples.mean()
        torch.testing.assert_close(
            multiples, t.expand_as(multiples), rtol=0, atol=1e-9 * float(1 / w[i][inside[i]].abs().min())
        )
        at_bound = ~inside[i] & (w[i] != 0)
        assert at_bound.any()
        assert ((x - z)[i][at_bound].abs() <= (t * w[i][at_bound]).abs() + 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_weights_of_any_size(backend: str, norm: str) -> None:
    x, w, _, at = inputs((3, 33))
    for scale in (2.0**-130, 2.0**-80, 2.0**100):
        scaled = w * scale
        value = 0.1 * scaled.double().abs().sum(1)
        z = project(x, scaled, value.float(), at, norm=norm, backend=backend)
        # At the far end of float32 the value of the plane itself has few digits.
        atol = 1e-3 if scale < 1e-38 else 2e-6
        torch.testing.assert_close(z.double(), oracle(x, scaled, value, at, norm), rtol=0, atol=atol)
    # Each entry meets its bound at another multiplier, far from the others: the most steps that Newton's
    # method can need.
    n = 40
    w = 2.0 ** -torch.arange(n, dtype=torch.float64)[None]
    x = 2.0 ** (torch.arange(n, dtype=torch.float64)[None] - n)
    for share in (0.2, 0.9, 0.999999):
        value = share * (w * x).sum(1)
        z = project(x, w, value, x, norm=norm, backend=backend)
        torch.testing.assert_close(z, oracle(x, w, value, x, norm), rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_what_cannot_be_projected_stays(backend: str, norm: str) -> None:
    x, w, value, at = inputs((4, 20))
    clean = project(x, w, value, at, norm=norm, backend=backend)
    assert (clean != x).any(1).all()
    for which, bad in ((0, NAN), *((which, bad) for which in (1, 2, 3) for bad in (NAN, INF, -INF))):
        args = [x.clone(), w.clone(), value.clone(), at.clone()]
        args[which].view(4, -1)[1, -1] = bad
        z = project(*args, norm=norm, backend=backend)
        assert_same(z[1], args[0][1])
        assert_same(z[[0, 2, 3]], clean[[0, 2, 3]])
    for no_plane in (torch.zeros_like(w), -torch.zeros_like(w)):
        assert_same(project(x, no_plane, value, at, norm=norm, backend=backend), x)
    assert_same(project(x, w, torch.zeros(4), x, norm=norm, backend=backend), x)  # on the plane


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_points_outside_the_box_start_at_its_border(backend: str, norm: str) -> None:
    x, w, value, at = inputs((3, 15))
    outside = x * 2 - 0.5
    z = project(outside, w, value, at, norm=norm, lo=0.1, hi=0.8, backend=backend)
    assert_same(z, project(outside.clamp(0.1, 0.8), w, value, at, norm=norm, lo=0.1, hi=0.8, backend=backend))
    torch.testing.assert_close(z.double(), oracle(outside, w, value, at, norm, 0.1, 0.8), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_keeps_the_layout_of_x(backend: str) -> None:
    x, w, value, at = inputs((2, 3, 6, 5))
    plain = project(x, w, value, at, backend="eager")
    last = torch.channels_last
    layouts = {
        "all channels-last": tuple(t.to(memory_format=last) for t in (x, w, at)),
        "mixed": (x.to(memory_format=last), w, at),
        "mixed the other way": (x, w.to(memory_format=last), at),
        "permuted": tuple(t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in (x, w, at)),
        "with gaps": tuple(torch.stack([t, t], -1)[..., 0] for t in (x, w, at)),
    }
    for name, (point, normal, origin) in layouts.items():
        z = project(point, normal, torch.stack([value, value], 1)[:, 0], origin, backend=backend)
        torch.testing.assert_close(z.contiguous(), plain, rtol=0, atol=1e-6)
        kept = name in ("all channels-last", "mixed")
        assert z.is_contiguous(memory_format=last if kept else torch.contiguous_format), name


@needs("ext")
def test_the_registered_operator_takes_any_layout_itself() -> None:
    run = torch.ops.fastdynat.project_on_hyperplane
    x, w, value, at = inputs((2, 3, 6, 5))
    expected = run(x, w, value, at, True, 0.0, 1.0)
    gaps = torch.stack([x, x], -1)[..., 1]
    across = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)  # dense, but the images are interleaved
    for point in (x, x.to(memory_format=torch.channels_last), gaps, across):
        z = run(point, w.to(memory_format=torch.channels_last), value, at, True, 0.0, 1.0)
        torch.testing.assert_close(z.contiguous(), expected, rtol=0, atol=1e-6)
        assert z.stride() == torch.empty_like(point).stride()
    for change, message in (
        ({1: torch.rand(2)}, r"w has shape \(2\) but x has shape \(2, 3, 6, 5\)"),
        ({2: torch.rand(3)}, r"value has shape \(3\), expected one entry per row of x"),
        ({2: value.double()}, r"value must be of the dtype of x"),
        ({3: at.double()}, r"at and x must have one dtype"),
        ({1: w.int()}, r"w must be float32"),
    ):
        args = [change.get(i, t) for i, t in enumerate((x, w, value, at))]
        with pytest.raises(RuntimeError, match=message):
            run(*args, False, 0.0, 1.0)


@pytest.mark.parametrize("backend", ON_CPU)
def test_is_out_of_place_and_detached(backend: str) -> None:
    args = inputs((3, 7))
    before = [t.clone() for t in args]
    z = project(*(t.requires_grad_() for t in args), backend=backend)
    assert not z.requires_grad
    assert z.data_ptr() not in {t.data_ptr() for t in args}
    for now, then in zip(args, before, strict=True):
        assert_same(now.detach(), then)


@pytest.mark.parametrize(
    "name", ["project_on_hyperplane", pytest.param("project_on_hyperplane_triton", marks=needs("triton"))]
)
def test_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    for shape in ((2, 3, 4, 5), (0, 2)):
        torch.library.opcheck(operator, (*inputs(shape), True, 0.0, 1.0))
    x, w, value, at = (
        t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs((2, 3, 4, 5))
    )
    torch.library.opcheck(operator, (x, w, value, at, False, 0.0, 1.0))


@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str) -> None:
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    args = inputs((2, 3, 4, 5))
    assert_same(compiled(*args, norm="l2", backend=backend), project(*args, norm="l2", backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.rand(4)}, r"w has shape \(4,\), expected \(2, 3\) to go with x"),
        ({"at": torch.rand(3, 2)}, r"at has shape \(3, 2\)"),
        ({"value": torch.rand(2, 1)}, r"value has shape \(2, 1\), expected \(2,\)"),
        (
            {"value": torch.rand(2).half()},
            r"value is torch.float16 but x is torch.float32; use value.to\(x.dtype\)",
        ),
        ({"at": torch.rand(2, 3).double()}, r"at is torch.float64 but x is torch.float32"),
        ({"x": torch.rand(2, 3).half()}, r"x must be float32 or float64, got torch.float16"),
        ({"x": torch.tensor(0.5)}, r"x needs a first dimension of images, got a scalar"),
        ({"w": torch.zeros(2, 3).int()}, r"w must be .*, got torch.int32"),
        ({"w": torch.rand(2, 3, device="meta")}, r"w is on meta but x is on cpu"),
        ({"lo": 2.0}, r"lo=2.0 and hi=1.0"),
        ({"norm": "l1"}, r"unknown norm 'l1'"),
    ],
)
def test_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args = dict(zip(("x", "w", "value", "at"), inputs((2, 3)), strict=True))
    with pytest.raises(UserError if "norm" in change else ValueError, match=message):
        ops.project_on_hyperplane(**args | change)


@pytest.mark.parametrize("far", [0.1, 0.9, 1.5])  # 1.5: out of the box's reach
def test_the_benchmarks_plain_form_is_the_published_sort(monkeypatch: pytest.MonkeyPatch, far: float) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    plain = importlib.import_module("cases").plain_projection
    released = importlib.import_module("dyart_cost").project_by_sorting
    torch.manual_seed(0)
    x, w, value, at = inputs((6, 3, 5, 5), far=far)
    found = plain(x, w, value, at).flatten(1)
    rows, normal = x.flatten(1), w.flatten(1)
    offset = (normal * at.flatten(1)).sum(1) - value
    torch.testing.assert_close(found, rows + released(rows, normal, offset), rtol=0, atol=2e-6)
    alone = [sorted_projection(*image) for image in zip(rows.double(), normal.double(), offset, strict=True)]
    torch.testing.assert_close(found.double(), rows + torch.stack(alone), rtol=0, atol=2e-6)
    assert not torch.equal(found, rows)
