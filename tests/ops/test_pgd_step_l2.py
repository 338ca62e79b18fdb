"""The L2 PGD step: float64 oracle, agreement of the implementations, ball, pixel range, odd gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIMULATED_CUDA, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdynat import ops

STEP, EPS = 0.3, 0.5
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
SHAPES = [(0, 3, 2, 2), (2, 0), (1,), (3, 1), (2, 17), (2, 3, 8, 8), (3, 3, 31, 33), (2, 9001)]
GPU_SHAPES = [*SHAPES, (64, 3, 32, 32), (3, 12288), (2, 12289), (2, 3, 224, 224), (70000, 3)]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None
) -> Any:
    """Points inside and outside the ball, gradients with zeros and NaN; every third image has no gradient."""
    x0 = torch.rand(shape, dtype=dtype)
    per_pixel = 2 * EPS / max(1, x0[:1].numel()) ** 0.5
    x_adv = (
        x0 + per_pixel * torch.rand(shape[:1] + (1,) * (len(shape) - 1)) * torch.randn(shape, dtype=dtype)
    ).clamp(0, 1)
    grad = torch.randn(shape) * 1e-3
    odd = torch.rand(shape)
    grad = torch.where(odd < 0.1, 0.0, torch.where(odd > 0.9, NAN, grad))
    grad[::3] = torch.where(odd[::3] < 0.5, 0.0, NAN)
    return x_adv, grad.to(grad_dtype or dtype), x0


def step(x_adv: Tensor, grad: Tensor, x0: Tensor, **kwargs: Any) -> Tensor:
    return ops.pgd_step_l2(x_adv, grad, x0, **{"step_size": STEP, "eps": EPS} | kwargs)


def oracle(x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float = STEP, eps: float = EPS) -> Tensor:
    """The definition in float64 numpy, image by image."""
    largest = float(torch.finfo(x_adv.dtype).max) if x_adv.dtype == torch.float32 else 1e150
    x, clean = x_adv.double().numpy(), x0.double().numpy()
    g = np.nan_to_num(grad.to(x_adv.dtype).double().numpy(), nan=0.0, posinf=largest, neginf=-largest)
    out = np.empty_like(x)
    for i in range(len(x)):
        scaled = g[i] / max(np.abs(g[i]).max(initial=0.0), 1e-320)
        length = np.sqrt((scaled**2).sum())
        delta = x[i] + (step_size * scaled / length if length > 0 else 0.0) - clean[i]
        norm = np.sqrt((delta**2).sum())
        out[i] = np.clip(clean[i] + (delta * (eps / norm) if norm > eps else delta), 0.0, 1.0)
    return torch.tensor(out)


def norms(t: Tensor) -> Tensor:
    return t.double().flatten(1).norm(dim=1)


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


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradient_dtypes(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    args = inputs((4, 3, 7, 5), dtype, grad_dtype)
    torch.testing.assert_close(
        step(*args, backend=backend).double(), oracle(*args), rtol=0, atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_agrees_with_cpu(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for shape in GPU_SHAPES:
        args = inputs(shape, dtype, grad_dtype)
        on_gpu = ops.attack_step_l2(
            *(t.cuda() for t in args), step_size=STEP, eps=EPS, low_dtype=torch.float16, backend=backend
        )
        on_cpu = ops.attack_step_l2(*args, step_size=STEP, eps=EPS)
        torch.testing.assert_close(on_gpu.x_adv.cpu(), on_cpu.x_adv, rtol=0, atol=TOLERANCE[dtype])
        assert on_gpu.low is not None
        assert_same(on_gpu.low, on_gpu.x_adv.half())
        assert_same(on_gpu.moved.cpu(), on_cpu.moved)


@needs("ext")
def test_cpp_splits_a_large_batch_without_gaps() -> None:
    args = inputs((33, 3, 32, 33))
    torch.testing.assert_close(step(*args, backend="cpp").double(), oracle(*args), rtol=0, atol=1e-7)
    large = inputs((2, 2_200_000))  # its stores bypass the caches
    torch.testing.assert_close(step(*large, backend="cpp"), step(*large, backend="eager"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("low_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attack_step_narrows_and_says_what_moved(low_dtype: torch.dtype, backend: str) -> None:
    args = inputs((5, 3, 4, 5))
    done = ops.attack_step_l2(*args, step_size=STEP, eps=EPS, low_dtype=low_dtype, backend=backend)
    assert_same(done.x_adv, step(*args, backend=backend))
    assert done.low is not None
    assert done.low.dtype == low_dtype
    # Triton's interpreter cuts off where hardware rounds to bfloat16.
    cut = backend == "triton" and low_dtype == torch.bfloat16
    torch.testing.assert_close(done.low, done.x_adv.to(low_dtype), rtol=2**-7 if cut else 0, atol=0)
    assert done.moved.tolist() == [False, True, True, False, True]
    assert ops.attack_step_l2(*args, step_size=STEP, eps=EPS, backend=backend).low is None


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_of_any_size(backend: str) -> None:
    half = torch.full((1, 2), 0.5)

    def moved(*grad: float, dtype: torch.dtype = torch.float32, image: torch.dtype = torch.float32) -> Tensor:
        x = half.to(image)
        return step(x, torch.tensor([grad], dtype=dtype), x, backend=backend)[0].double() - 0.5

    along, first = torch.tensor([0.6, -0.8]).double() * STEP, torch.tensor([1.0, 0]).double() * STEP
    for scale in (1e-44, 1e-38, 1e-20, 1.0, 1e20, 1e38):
        rtol = 0.2 if scale < 1e-40 else 0  # 3e-44 is a multiple of 1.4e-45
        torch.testing.assert_close(
            moved(3 * scale, -4 * scale) if scale < 1e38 else moved(1.5e38, -2e38),
            along,
            rtol=rtol,
            atol=1e-7,
        )
    for scale in (1e-140, 1e140):
        torch.testing.assert_close(
            moved(3 * scale, -4 * scale, dtype=torch.float64, image=torch.float64), along, rtol=0, atol=1e-7
        )
    torch.testing.assert_close(moved(6e-8 * 3, -6e-8 * 4, dtype=torch.float16), along, rtol=0.05, atol=0)
    # Infinity is the largest finite value of the images' dtype: next to it nothing else counts.
    for dtype in GRAD_DTYPES:
        torch.testing.assert_close(moved(INF, 1.0, dtype=dtype), first, rtol=0, atol=1e-7)
        torch.testing.assert_close(
            moved(INF, -INF, dtype=dtype),
            STEP * torch.tensor([0.5**0.5, -(0.5**0.5)]).double(),
            rtol=0,
            atol=1e-7,
        )
        torch.testing.assert_close(moved(1.0, NAN, dtype=dtype), first, rtol=0, atol=1e-7)
    torch.testing.assert_close(moved(1e300, 1.0, dtype=torch.float64), first, rtol=0, atol=1e-7)
    # The range of float64 images' gradients.
    wide = {"dtype": torch.float64, "image": torch.float64}
    torch.testing.assert_close(
        moved(1e300, 1e150, **wide), STEP * torch.full((2,), 0.5**0.5).double(), rtol=0, atol=1e-7
    )
    assert_same(moved(1e-151, -1e-160, **wide), torch.zeros(2).double())


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_a_gradient_the_point_is_only_projected(backend: str) -> None:
    x0 = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.5]])
    x_adv = torch.tensor([[0.5, 0.6], [0.5, 2.0], [2.0, 0.5]])
    grad = torch.tensor([[0.0, NAN], [0.0, -0.0], [NAN, NAN]])
    expected = torch.tensor([[0.5, 0.6], [0.5, 1.0], [1.0, 0.5]])
    assert_same(step(x_adv, grad, x0, backend=backend), expected)
    assert not ops.attack_step_l2(x_adv, grad, x0, step_size=STEP, eps=EPS, backend=backend).moved.any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_nan_images_stay_nan_and_alone(backend: str) -> None:
    for which in (0, 2):
        args = [t.nan_to_num() for t in inputs((3, 3, 4, 4))]
        clean = step(*args, backend=backend)
        args[which][1, 0, 0, 0] = NAN
        out = step(*args, backend=backend)
        assert out[1].isnan().all()
        assert_same(out[::2], clean[::2])


@pytest.mark.parametrize("backend", ON_CPU)
def test_range_negative_step_and_radius_zero(backend: str) -> None:
    zero = torch.zeros(1, 2)
    grad = torch.tensor([[3.0, -4.0]])
    moved = step(zero, grad, zero, step_size=-2.0, eps=3.0, lo=-1.0, hi=1.5, backend=backend)
    assert_same(moved, torch.tensor([[-1.0, 1.5]]))
    x_adv, grad, x0 = inputs((4, 30))
    assert_same(step(x_adv, grad, x0, eps=0.0, backend=backend), x0)
    # A step back onto the clean image: nothing is left of the norm but rounding, which must not be divided
    # by.
    back = step(x0 + 0.1, torch.ones_like(x0), x0, step_size=-0.1 * 30**0.5, backend=backend)
    torch.testing.assert_close(back, x0.clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_keeps_the_layout_of_x_adv(backend: str) -> None:
    x_adv, grad, x0 = inputs((2, 3, 6, 5))
    plain = step(x_adv, grad, x0, backend="eager")
    last = torch.channels_last
    layouts = {
        "all channels-last": tuple(t.to(memory_format=last) for t in (x_adv, grad, x0)),
        "mixed": (x_adv.to(memory_format=last), grad, x0),
        "mixed the other way": (x_adv, grad.to(memory_format=last), x0),
        "permuted": tuple(t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in (x_adv, grad, x0)),
        "with gaps": tuple(torch.stack([t, t], -1)[..., 0] for t in (x_adv, grad, x0)),
        "expanded": (x_adv, grad, x0[:1].expand(2, -1, -1, -1)),
    }
    for name, args in layouts.items():
        out = step(*args, backend=backend)
        expected = plain if name != "expanded" else step(x_adv, grad, args[2].contiguous(), backend="eager")
        torch.testing.assert_close(out.contiguous(), expected, rtol=0, atol=1e-6)
        kept = name in ("all channels-last", "mixed")
        assert out.is_contiguous(memory_format=last if kept else torch.contiguous_format), name


@needs("ext")
def test_the_registered_operator_takes_any_layout_itself() -> None:
    run = torch.ops.fastdynat.pgd_step_l2
    x_adv, grad, x0 = inputs((2, 3, 6, 5))
    expected, _, moved = run(x_adv, grad, x0, STEP, EPS, 0.0, 1.0)
    gaps = torch.stack([x_adv, x_adv], -1)[..., 1]
    across = (
        x_adv.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    )  # dense, but the images are interleaved
    for x in (x_adv, x_adv.to(memory_format=torch.channels_last), gaps, across):
        out, low, again = run(
            x, grad.to(memory_format=torch.channels_last), x0, STEP, EPS, 0.0, 1.0, torch.bfloat16
        )
        torch.testing.assert_close(out.contiguous(), expected, rtol=0, atol=1e-7)
        assert out.stride() == torch.empty_like(x).stride()
        assert_same(low, out.bfloat16())
        assert_same(again, moved)
    with pytest.raises(RuntimeError, match=r"grad has shape \(2\) but x_adv has shape \(2, 3, 6, 5\)"):
        run(x_adv, torch.rand(2), x0, STEP, EPS, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="x0 and x_adv must have one dtype"):
        run(x_adv, grad, x0.double(), STEP, EPS, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="grad must be float32"):
        run(x_adv, grad.int(), x0, STEP, EPS, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="low_dtype must be bfloat16 or float16"):
        run(x_adv, grad, x0, STEP, EPS, 0.0, 1.0, torch.float64)
    with pytest.raises(RuntimeError, match="needs a first dimension of images"):
        run(*[torch.tensor(1.0)] * 3, STEP, EPS, 0.0, 1.0)


@pytest.mark.parametrize("backend", ON_CPU)
def test_is_out_of_place_and_detached(backend: str) -> None:
    args = inputs((3, 7))
    before = [t.clone() for t in args]
    out = step(*(t.requires_grad_() for t in args), backend=backend)
    assert not out.requires_grad
    assert out.data_ptr() not in {t.data_ptr() for t in args}
    for now, then in zip(args, before, strict=True):
        assert_same(now.detach(), then)


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_properties(backend: str, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40)))
    eps = data.draw(st.floats(0, 2, width=32))
    step_size = data.draw(st.floats(-2, 2, width=32))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x_adv, grad, x0 = inputs(shape)
    kwargs = {"step_size": step_size, "eps": eps, "backend": backend}
    out = ops.pgd_step_l2(x_adv, grad, x0, **kwargs)
    assert ((out >= 0) & (out <= 1)).all()
    # A pixel below 1 is rounded by up to 2**-25, however small the radius is.
    assert (norms(out.double() - x0.double()) <= eps * (1 + 2**-21) + 2**-24 * shape[1] ** 0.5).all()
    torch.testing.assert_close(out.double(), oracle(x_adv, grad, x0, step_size, eps), rtol=0, atol=2e-6)
    still = torch.zeros_like(grad)
    torch.testing.assert_close(ops.pgd_step_l2(out, still, x0, **kwargs), out, rtol=0, atol=2e-7)
    alone = torch.cat(
        [ops.pgd_step_l2(*(t[i : i + 1] for t in (x_adv, grad, x0)), **kwargs) for i in range(shape[0])]
    )
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-7)
    scaled = ops.pgd_step_l2(x_adv, grad * 2.0**40, x0, **kwargs)
    torch.testing.assert_close(scaled, out, rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", ON_CPU)
def test_stays_in_the_ball_to_an_ulp_of_the_radius(backend: str) -> None:
    if backend == "triton":
        x_adv, grad, x0 = inputs((6, 3, 16, 16))
    else:
        x_adv, grad, x0 = inputs((64, 3, 32, 32))
    for _ in range(4):
        x_adv = step(x_adv, grad, x0, backend=backend)
    distance = norms(x_adv.double() - x0.double())
    assert (distance > 0.9 * EPS).any()
    assert (distance <= EPS + 2**-24 * 2).all()


@pytest.mark.parametrize("name", ["pgd_step_l2", pytest.param("pgd_step_l2_triton", marks=needs("triton"))])
def test_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    for shape in ((2, 3, 4, 5), (0, 2)):
        torch.library.opcheck(operator, (*inputs(shape), STEP, EPS, 0.0, 1.0))
    args = (t.to(memory_format=torch.channels_last) for t in inputs((2, 3, 4, 5)))
    torch.library.opcheck(operator, (*args, STEP, EPS, 0.0, 1.0, torch.bfloat16))


@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str) -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = inputs((2, 3, 4, 5))
    for layout in (torch.contiguous_format, torch.channels_last):
        args = tuple(t.to(memory_format=layout) for t in args)
        assert_same(compiled(*args, backend=backend), step(*args, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.rand(4)}, r"grad has shape \(4,\) but x_adv has shape \(2, 3\)"),
        ({"x0": torch.rand(3, 2)}, r"x0 has shape \(3, 2\)"),
        ({"x0": torch.rand(2, 3).double()}, r"x0 is torch.float64 but x_adv is torch.float32"),
        ({"x_adv": torch.rand(2, 3).half()}, r"x_adv must be float32 or float64, got torch.float16"),
        ({"x_adv": torch.tensor(0.5)}, r"pgd_step_l2: x_adv needs a first dimension of images, got a scalar"),
        ({"grad": torch.zeros(2, 3).int()}, r"grad must be .*, got torch.int32"),
        ({"eps": -0.1}, r"eps must be >= 0 .* got -0.1"),
        ({"lo": 2.0}, r"lo=2.0 and hi=1.0"),
        ({"low_dtype": torch.float32}, r"low_dtype must be bfloat16 or float16, got torch.float32"),
    ],
)
def test_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args = dict(zip(("x_adv", "grad", "x0"), inputs((2, 3)), strict=True)) | {"step_size": STEP, "eps": EPS}
    with pytest.raises(ValueError, match=message):
        ops.attack_step_l2(**args | change)
