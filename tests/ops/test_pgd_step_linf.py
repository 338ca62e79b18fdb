"""The L-inf PGD step: a float64 oracle, bitwise equality of the implementations, selection of one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIMULATED_CUDA, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdynat import ops
from fastdynat.errors import UserError

STEP, EPS = 2 / 255, 8 / 255
NAN = float("nan")
DTYPES = (torch.float32, torch.float64)
GRAD_DTYPES = (*DTYPES, torch.bfloat16, torch.float16)
ON_CPU = [
    "eager",
    pytest.param("cpp", marks=needs("ext")),
    pytest.param(
        "triton", marks=[needs("triton"), pytest.mark.skipif(torch.cuda.is_available(), reason="see ON_GPU")]
    ),
    SIMULATED_CUDA,
]
ON_GPU = [pytest.param(name, marks=[needs("gpu"), pytest.mark.gpu]) for name in ("eager", "cuda", "triton")]
SHAPES = [(0,), (1,), (1025,), (0, 3, 4, 4), (2, 3, 8, 8), (5, 3, 31, 33), (4, 1, 8, 8), ()]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None
) -> Any:
    """A point near its clean image, and a gradient with zeros and NaN among its values."""
    x0 = torch.rand(shape, dtype=dtype)
    x_adv = (x0 + torch.empty_like(x0).uniform_(-EPS, EPS)).clamp(0, 1)
    grad = torch.randn(shape).to(grad_dtype or dtype)
    odd = torch.rand(shape)
    return x_adv, torch.where(odd < 0.1, 0.0, torch.where(odd > 0.9, NAN, grad)).to(grad.dtype), x0


def step(x_adv: Tensor, grad: Tensor, x0: Tensor, **kwargs: Any) -> Tensor:
    return ops.pgd_step_linf(x_adv, grad, x0, **{"step_size": STEP, "eps": EPS} | kwargs)


def oracle(x_adv: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
    """The definition in float64 numpy."""
    x, g, clean = (t.double().numpy() for t in (x_adv, grad, x0))
    sign = np.where(np.isnan(g), 0.0, np.sign(g))
    return torch.tensor(np.clip(np.clip(x + STEP * sign, clean - EPS, clean + EPS), 0.0, 1.0))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_agrees_with_the_definition(backend: str, shape: tuple[int, ...]) -> None:
    args = inputs(shape, torch.float64)
    torch.testing.assert_close(step(*args, backend=backend), oracle(*args), rtol=0, atol=1e-15)
    args = inputs(shape)
    torch.testing.assert_close(step(*args, backend=backend).double(), oracle(*args), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU[1:])
def test_backends_are_bitwise_equal(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for shape in SHAPES:
        args = inputs(shape, dtype, grad_dtype)
        assert_same(step(*args, backend=backend), step(*args, backend="eager"))


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_is_bitwise_equal_to_cpu(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for shape in SHAPES:
        args = inputs(shape, dtype, grad_dtype)
        on_gpu = step(*(t.cuda() for t in args), backend=backend)
        assert_same(on_gpu.cpu(), step(*args, backend="eager"))


@needs("ext")
def test_cpp_splits_a_large_batch_without_gaps() -> None:
    args = inputs((33, 3, 32, 33))
    assert_same(step(*args, backend="cpp"), step(*args, backend="eager"))


@pytest.mark.parametrize("backend", ON_CPU)
def test_special_values(backend: str) -> None:
    tiny = torch.finfo(torch.float16).smallest_normal / 4
    grad = torch.tensor([0.0, -0.0, NAN, -NAN, np.inf, -np.inf, tiny, -tiny])
    expected = 0.5 + STEP * torch.tensor([0, 0, 0, 0, 1, -1, 1, -1])
    half = torch.full_like(grad, 0.5)
    for dtype in GRAD_DTYPES:
        assert_same(step(half, grad.to(dtype), half, backend=backend), expected)
    nan = torch.tensor([NAN])
    assert step(nan, half[:1], half[:1], backend=backend).isnan().all()
    assert step(half[:1], half[:1], nan, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_range_and_negative_step(backend: str) -> None:
    zero = torch.zeros(3)
    grad = torch.tensor([1.0, -1.0, 0.0])
    moved = step(zero, grad, zero, step_size=-2.0, eps=3.0, lo=-1.0, hi=1.5, backend=backend)
    assert_same(moved, torch.tensor([-1.0, 1.5, 0.0]))


@pytest.mark.parametrize("backend", ON_CPU)
def test_keeps_the_layout_of_x_adv(backend: str) -> None:
    x_adv, grad, x0 = inputs((2, 3, 6, 5))
    last = torch.channels_last
    layouts = {
        "all channels-last": tuple(t.to(memory_format=last) for t in (x_adv, grad, x0)),
        "mixed": (x_adv.to(memory_format=last), grad, x0),
        "mixed the other way": (x_adv, grad.to(memory_format=last), x0),
        "permuted": tuple(t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in (x_adv, grad, x0)),
        "with gaps": tuple(torch.stack([t, t], -1)[..., 0] for t in (x_adv, grad, x0)),
        "expanded": (x_adv, grad[:1].expand(2, -1, -1, -1), x0),
    }
    for name, args in layouts.items():
        out = step(*args, backend=backend)
        plain = step(*(t.contiguous() for t in args), backend="eager")
        assert_same(out.contiguous(), plain)
        assert out.stride() == torch.empty_like(args[0]).stride(), name


@needs("ext")
def test_the_registered_operator_takes_any_layout_itself() -> None:
    run = torch.ops.fastdynat.pgd_step_linf
    x_adv, grad, x0 = inputs((2, 3, 6, 5))
    expected = step(x_adv, grad, x0, backend="eager")
    for x in (x_adv, x_adv.to(memory_format=torch.channels_last), torch.stack([x_adv, x_adv], -1)[..., 1]):
        out, _, _ = run(x, grad.to(memory_format=torch.channels_last), x0, STEP, EPS, 0.0, 1.0)
        assert_same(out.contiguous(), expected)
        assert out.stride() == torch.empty_like(x).stride()
    with pytest.raises(RuntimeError, match=r"grad has shape \(2\) but x_adv has shape \(2, 3, 6, 5\)"):
        run(x_adv, torch.rand(2), x0, STEP, EPS, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="x0 and x_adv must have one dtype"):
        run(x_adv, grad, x0.double(), STEP, EPS, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="grad must be float32"):
        run(x_adv, grad.int(), x0, STEP, EPS, 0.0, 1.0)


@pytest.mark.parametrize("backend", ON_CPU)
def test_is_out_of_place_and_detached(backend: str) -> None:
    args = inputs((7,))
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
    n = data.draw(st.integers(1, 40))
    eps = data.draw(st.floats(0, 1, width=32))
    step_size = data.draw(st.floats(-1, 1, width=32))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x_adv, grad, x0 = inputs((n,))
    kwargs = {"step_size": step_size, "eps": eps, "backend": backend}
    out = ops.pgd_step_linf(x_adv, grad, x0, **kwargs)
    assert ((out >= 0) & (out <= 1)).all()
    assert ((out >= x0 - eps) & (out <= x0 + eps)).all()
    still = torch.zeros_like(grad)
    assert_same(ops.pgd_step_linf(out, still, x0, **kwargs), out)
    order = torch.randperm(n)
    assert_same(ops.pgd_step_linf(x_adv[order], grad[order], x0[order], **kwargs), out[order])


@pytest.mark.parametrize(
    "name", ["pgd_step_linf", pytest.param("pgd_step_linf_triton", marks=needs("triton"))]
)
def test_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    for shape in ((2, 3, 4, 5), (0,)):
        torch.library.opcheck(operator, (*inputs(shape), STEP, EPS, 0.0, 1.0))
    args = (t.to(memory_format=torch.channels_last) for t in inputs((2, 3, 4, 5)))
    torch.library.opcheck(operator, (*args, STEP, EPS, 0.0, 1.0))


@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str) -> None:
    # Without Inductor, which needs a C++ compiler and seconds: tracing and the fake are what is ours here.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = inputs((2, 3, 4, 5))
    for layout in (torch.contiguous_format, torch.channels_last):
        args = tuple(t.to(memory_format=layout) for t in args)
        assert_same(compiled(*args, backend=backend), step(*args, backend="eager"))


@pytest.mark.slow
@needs("cxx")
def test_inductor_compiles_the_eager_step_to_the_same_bits() -> None:
    compiled = torch.compile(step, fullgraph=True)
    args = inputs((2, 3, 4, 5))
    assert_same(compiled(*args), step(*args))
    with ops.use_backend("eager"):
        assert_same(compiled(*args), step(*args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.rand(4)}, r"grad has shape \(4,\) but x_adv has shape \(2, 3\)"),
        ({"x0": torch.rand(3, 2)}, r"x0 has shape \(3, 2\)"),
        ({"x0": torch.rand(2, 3).double()}, r"x0 is torch.float64 but x_adv is torch.float32"),
        ({"x_adv": torch.rand(2, 3).half()}, r"x_adv must be float32 or float64, got torch.float16"),
        ({"grad": torch.zeros(2, 3).int()}, r"grad must be .*, got torch.int32"),
        ({"grad": torch.rand(2, 3, device="meta")}, r"grad is on meta but x_adv is on cpu"),
        ({"eps": -0.1}, r"eps must be >= 0 .* got -0.1"),
        ({"eps": NAN}, r"eps must be >= 0"),
        ({"lo": 2.0}, r"lo=2.0 and hi=1.0"),
    ],
)
def test_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args = dict(zip(("x_adv", "grad", "x0"), inputs((2, 3)), strict=True)) | {"step_size": STEP, "eps": EPS}
    with pytest.raises(ValueError, match=message):
        ops.pgd_step_linf(**args | change)


def test_auto_takes_the_best_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDYNAT_KERNELS", raising=False)
    found = ops.available_backends()
    assert set(found) == set(ops.BACKENDS)
    assert found["eager"] is None
    assert ops.selected_backend("cpu") == ("cpp" if found["cpp"] is None else "eager")
    assert ops.selected_backend("meta") == "eager"


def test_call_goes_before_override_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDYNAT_KERNELS", "eager")
    assert ops.selected_backend("cpu") == "eager"
    monkeypatch.setenv("FASTDYNAT_KERNELS", "cuda")
    with ops.use_backend("eager"):
        assert ops.selected_backend("cpu") == "eager"
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: needs cuda tensors, got cpu"):
            ops.selected_backend("cpu", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot run"):
        step(*inputs((2,)))
    assert step(*inputs((2,)), backend="eager").shape == (2,)


def test_use_backend_ends_with_its_body() -> None:
    before = ops.selected_backend("cpu")
    with pytest.raises(KeyError), ops.use_backend("eager"):
        raise KeyError
    assert ops.selected_backend("cpu") == before


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown backend 'tritn': did you mean 'triton'"):
        step(*inputs((2,)), backend="tritn")
    with pytest.raises(UserError, match="known: auto, cpp, cuda, eager, triton"):
        ops.set_backend("nothing")
    monkeypatch.setenv("FASTDYNAT_KERNELS", "cpu")
    with pytest.raises(UserError, match="unknown backend 'cpu'"):
        step(*inputs((2,)))


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds the package under test."""
    env = os.environ | {"PYTHONPATH": str(Path(ops.__file__).parents[2])} | env
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_works_without_triton() -> None:
    code = """
import sys; sys.modules["triton"] = None
import torch; from fastdynat import ops
x = torch.rand(3)
print(ops.pgd_step_linf(x, x, x, step_size=0.1, eps=0.1, backend="eager").shape)
ops.pgd_step_linf(x, x, x, step_size=0.1, eps=0.1, backend="triton")
"""
    done = python(code)
    assert "torch.Size([3])" in done.stdout, done.stderr
    assert "RuntimeError: pgd_step_linf: backend 'triton' cannot run: triton is not installed" in done.stderr


def test_an_extension_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_text("not a library")
    done = python(f"import fastdynat; fastdynat.__path__.insert(0, {str(tmp_path)!r}); import fastdynat.ops")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastdynat._C is built (")
    assert "Rebuild it (pip install -e . --no-build-isolation) or delete the file" in last
