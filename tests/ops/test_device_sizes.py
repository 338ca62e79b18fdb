"""Step sizes, radii and scales on the device: the bits of equal numbers, read anew, never compiled in."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import SIMULATED_CUDA, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdynat import ops

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
PACKED, ODD, LARGE = (2, 3, 8, 8), (1, 3, 5, 7), (1, 3, 65, 67)  # the last one in several parts
CALLS = [((0, 3, 4, 4), (0.1, 0.2)), (PACKED, (0.3, 0.5)), (ODD, (2 / 255, 8 / 255))]
OTHER_CALLS = [(LARGE, (0.3, 0.5)), (ODD, (0.0, 0.1)), (ODD, (0.1, 0.0)), (ODD, (-0.2, 1e-9))]
KINDS = ("uniform", "gaussian", "l2")
STATE = (0x0123456789ABCDEF, 0x7EDCBA9876543210)


def linf(x_adv: Tensor, grad: Tensor, x0: Tensor, **options: Any) -> tuple[Any, ...]:
    low = torch.bfloat16 if x_adv.dtype == torch.float32 else None
    return (
        ops.pgd_step_linf(x_adv, grad, x0, **options),
        *ops.attack_step_linf(x_adv, grad, x0, low_dtype=low, **options),
    )


def l2(x_adv: Tensor, grad: Tensor, x0: Tensor, **options: Any) -> tuple[Any, ...]:
    return tuple(ops.attack_step_l2(x_adv, grad, x0, low_dtype=torch.float16, **options))


def l1(x_adv: Tensor, grad: Tensor, x0: Tensor, **options: Any) -> tuple[Any, ...]:
    return (ops.pgd_step_l1(x_adv, grad, x0, sparsity=0.8, **options),)


STEPS: dict[str, Callable[..., tuple[Any, ...]]] = {"linf": linf, "l2": l2, "l1": l1}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A point near its clean image, and a gradient with zeros and NaN among its values."""
    x0 = torch.rand(shape, dtype=dtype)
    x_adv = (x0 + torch.empty_like(x0).uniform_(-0.1, 0.1)).clamp(0, 1)
    grad, odd = torch.randn(shape), torch.rand(shape)
    return x_adv, torch.where(odd < 0.1, 0.0, torch.where(odd > 0.9, NAN, grad)).to(grad_dtype), x0


def held(*numbers: float, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def passed(number: float, backend: str) -> float:
    """`number` as `backend` gets it: the interpreter of Triton rounds numbers to float32."""
    return held(number, dtype=torch.float32).item() if backend == "triton" else number


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("norm", STEPS)
def test_steps_equal_those_with_numbers(
    norm: str, backend: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    step = partial(STEPS[norm], backend=backend)
    plain = dtype == grad_dtype == torch.float32
    for shape, numbers in CALLS + OTHER_CALLS * plain:
        if shape == LARGE and norm == "l1":
            continue  # minutes in the simulators; the checks of `fastdynat.ops` have it
        step_size, eps = (passed(number, backend) for number in numbers)
        tensors, sizes = inputs(shape, dtype, grad_dtype), held(step_size, eps)
        expected = step(*tensors, step_size=step_size, eps=eps)
        same(step(*tensors, step_size=sizes[0], eps=sizes[1]), expected)
        if shape == PACKED and plain:
            same(step(*tensors, step_size=step_size, eps=sizes[1]), expected)
            same(step(*tensors, step_size=sizes[0], eps=eps), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("kind", KINDS)
def test_starts_equal_those_with_numbers(kind: str, backend: str, dtype: torch.dtype) -> None:
    state = torch.tensor(STATE)
    for shape in ((0, 3, 4, 4), PACKED, ODD):
        x, images = torch.rand(shape, dtype=dtype), torch.arange(5, 5 + shape[0])
        for layout in (torch.contiguous_format, torch.channels_last)[: 1 + (shape == PACKED)]:
            x = x.to(memory_format=layout)
            start = partial(ops.random_start, x, state, kind=kind, images=images, backend=backend)
            same((start(scale=held(8 / 255)[0]),), (start(scale=8 / 255),))


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_sizes(backend: str, data: st.DataObject) -> None:
    step_size = passed(data.draw(st.floats(-1, 1)), backend)
    eps = passed(data.draw(st.floats(0, 1)), backend)
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors, sizes = inputs((1, data.draw(st.integers(1, 40))), dtype, dtype), held(step_size, eps)
    for step in STEPS.values():
        expected = step(*tensors, step_size=step_size, eps=eps, backend=backend)
        same(step(*tensors, step_size=sizes[0], eps=sizes[1], backend=backend), expected)
    for kind in KINDS:
        start = partial(ops.random_start, tensors[2], torch.tensor(STATE), kind=kind, backend=backend)
        same((start(scale=sizes[1]),), (start(scale=eps),))


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_float32_scalar_is_the_number_it_holds(backend: str) -> None:
    tensors, sizes = inputs((2, 3, 5, 5), torch.float64, torch.float64), held(0.1, 0.3, dtype=torch.float32)
    for step in STEPS.values():
        numbers = {"step_size": sizes[0].item(), "eps": sizes[1].item()}
        found = step(*tensors, step_size=sizes[0], eps=sizes[1], backend=backend)
        same(found, step(*tensors, **numbers, backend=backend))


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_image_stays_at_radius_zero(backend: str) -> None:
    x_adv, grad, x0 = inputs((2, 3, 5, 5), torch.float32, torch.float32)
    sizes = held(0.1, 0.0)
    for step in STEPS.values():
        assert torch.equal(step(x_adv, grad, x0, step_size=sizes[0], eps=sizes[1], backend=backend)[0], x0)
    for kind in KINDS:
        start = ops.random_start(x0, torch.tensor(STATE), kind=kind, scale=sizes[1], backend=backend)
        assert torch.equal(start, x0)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("suffix", ["", pytest.param("_triton", marks=needs("triton"))])
def test_registration_of_steps(suffix: str, name: str) -> None:
    operator = getattr(torch.ops.fastdynat, f"pgd_step_{name}{suffix}").default
    tensors, sizes = inputs((2, 3, 4, 5), torch.float32, torch.bfloat16), held(0.1, 0.2)
    others = {"linf": (0.0, 1.0, torch.float16, True), "l2": (0.0, 1.0, None), "l1": (3, 0.0, 1.0)}[name]
    for first, second in ((sizes[0], sizes[1]), (None, sizes[1]), (sizes[0], None)):
        torch.library.opcheck(operator, (*tensors, 0.1, 0.2, *others, first, second))


@pytest.mark.parametrize("name", ["random_start", pytest.param("random_start_triton", marks=needs("triton"))])
def test_registration_of_the_start(name: str) -> None:
    operator, state = getattr(torch.ops.fastdynat, name).default, torch.tensor(STATE)
    for kind in range(3):
        arguments = (torch.rand(2, 3, 4, 5), state, kind, 0.0, 0.0, 1.0, None, held(0.1)[0])
        torch.library.opcheck(operator, arguments)


def attack(x: Tensor, grad: Tensor, sizes: Tensor, backend: str) -> tuple[Any, ...]:
    """A start and a step of every norm."""
    step_size, eps = sizes
    start = ops.random_start(x, torch.tensor(STATE), kind="uniform", scale=eps, backend=backend)
    options = {"step_size": step_size, "eps": eps, "backend": backend}
    return tuple(step(start, grad, x, **options)[0] for step in STEPS.values())


@pytest.mark.parametrize("backend", ON_CPU)
def test_one_compiled_graph_serves_all_sizes(backend: str) -> None:
    graphs = []

    def count(module: Any, example: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(attack, fullgraph=True, backend=count)
    x, grad, _ = inputs((2, 3, 4, 5), torch.float32, torch.float32)
    for eps in (0.0, 0.1, 0.2, 1.0):
        sizes = held(eps / 4, eps)
        same(compiled(x, grad, sizes, backend), attack(x, grad, sizes, backend))
    assert len(graphs) == 1


@pytest.mark.slow
@needs("cxx")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_inductor_gives_the_same_bits(backend: str) -> None:
    torch._dynamo.reset()
    x, grad, _ = inputs((2, 3, 4, 5), torch.float32, torch.float32)

    def linf_attack(x: Tensor, grad: Tensor, step_size: Any, eps: Any) -> Tensor:
        start = ops.random_start(x, torch.tensor(STATE), kind="uniform", scale=eps, backend=backend)
        return ops.pgd_step_linf(start, grad, x, step_size=step_size, eps=eps, backend=backend)

    compiled = torch.compile(linf_attack, fullgraph=True)
    for step_size, eps in ((0.1, 0.3), (0.0, 0.0), (2 / 255, 8 / 255)):
        sizes = held(step_size, eps)
        assert torch.equal(compiled(x, grad, sizes[0], sizes[1]), linf_attack(x, grad, step_size, eps))


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_replayed_graph_reads_the_sizes_anew(backend: str) -> None:
    x, grad, _ = (t.cuda() for t in inputs((2, 3, 8, 8), torch.float32, torch.float32))
    sizes, state = held(0.1, 0.3, device="cuda"), torch.tensor(STATE, device="cuda")

    def run(step_size: Any, eps: Any) -> list[Tensor]:
        start = ops.random_start(x, state, kind="uniform", scale=eps, backend=backend)
        options = {"step_size": step_size, "eps": eps, "backend": backend}
        return [step(start, grad, x, **options)[0] for step in STEPS.values()]

    run(*sizes)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*sizes)
    for numbers in ((0.3, 0.5), (0.0, 0.1), (0.1, 0.0), (0.0, 0.0)):
        sizes.copy_(held(*numbers))
        graph.replay()
        same(tuple(out), tuple(run(*numbers)))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            torch.tensor([0.1]),
            r"a number or a scalar of float32 or float64, got torch.float32 \(1,\)",
        ),
        (torch.tensor(1), r"got torch.int64 \(\)"),
        (torch.tensor(0.1).half(), "got torch.float16"),
        (torch.tensor(0.1, device="meta"), "is on meta but the images are on cpu"),
    ],
)
def test_refused_tensors(size: Tensor, message: str) -> None:
    tensors = inputs((2, 3), torch.float32, torch.float32)
    for step in STEPS.values():
        for name in ("step_size", "eps"):
            with pytest.raises(ValueError, match=f"pgd_step_l.*: {name} .*{message}"):
                step(*tensors, **{"step_size": 0.1, "eps": 0.2} | {name: size})
    with pytest.raises(ValueError, match=f"random_start: scale .*{message}"):
        ops.random_start(tensors[0], torch.tensor(STATE), kind="uniform", scale=size)


@needs("ext")
def test_the_registered_operators_check_for_themselves() -> None:
    x, grad, x0 = inputs((2, 3, 4, 5), torch.float32, torch.float32)
    registered = torch.ops.fastdynat
    for bad in (held(0.1), torch.tensor(0.1), torch.tensor(1)):
        message = "must be a float64 scalar, got shape"
        with pytest.raises(RuntimeError, match=f"pgd_step_linf: device_step_size {message}"):
            registered.pgd_step_linf(x, grad, x0, 0.1, 0.2, 0.0, 1.0, None, False, bad)
        with pytest.raises(RuntimeError, match=f"pgd_step_l2: device_eps {message}"):
            registered.pgd_step_l2(x, grad, x0, 0.1, 0.2, 0.0, 1.0, None, None, bad)
        with pytest.raises(RuntimeError, match=f"pgd_step_l1: device_eps {message}"):
            registered.pgd_step_l1(x, grad, x0, 0.1, 0.2, 3, 0.0, 1.0, None, bad)
        with pytest.raises(RuntimeError, match=f"random_start: device_scale {message}"):
            registered.random_start(x, torch.tensor(STATE), 0, 0.1, 0.0, 1.0, None, bad)
