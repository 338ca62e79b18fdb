"""Random starts: published vectors, a numpy oracle, bitwise equal implementations, distributions."""

import math
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
from fastdynat.ops.random_start import philox

KINDS = ("uniform", "gaussian", "l2")
DTYPES = (torch.float32, torch.float64)
SCALE = 8 / 255
NAN = float("nan")
ON_CPU = [
    "eager",
    pytest.param("cpp", marks=needs("ext")),
    pytest.param(
        "triton", marks=[needs("triton"), pytest.mark.skipif(torch.cuda.is_available(), reason="see ON_GPU")]
    ),
    SIMULATED_CUDA,
]
ON_GPU = [pytest.param(name, marks=[needs("gpu"), pytest.mark.gpu]) for name in ("eager", "cuda", "triton")]
SHAPES = [(0,), (1,), (5,), (0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 8, 8), (3, 3, 5, 7), (2, 1, 6, 6), (1, 1030)]
# With every bit of key and counter in use.
STATE = (0x0123456789ABCDEF, 0x7EDCBA9876543210)
ZERO_COUNTER = 50893511  # with seed 0: the first word of image 0 gives the radius 0


def state_of(seed: int = STATE[0], counter: int = STATE[1]) -> Tensor:
    return torch.tensor([seed, counter])


def start(x: Tensor, state: Tensor | None = None, **kwargs: Any) -> Tensor:
    return ops.random_start(
        x, state_of() if state is None else state, **{"kind": "uniform", "scale": SCALE} | kwargs
    )


def noise(shape: tuple[int, ...], state: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The noise alone, at scale 1."""
    return start(torch.zeros(shape), state, **{"scale": 1.0, "lo": -9.0, "hi": 9.0} | kwargs)


def philox_numpy(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 as in the paper, on (..., 4) uint64."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c0, c1, c2, c3 = (
            (b >> shift) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> shift) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], -1)


def oracle(x: Tensor, state: Tensor, kind: str, scale: float, images: Tensor | None = None) -> Tensor:
    """The definition in float64 numpy, clipped to [0, 1]."""
    count, row = x.shape[0], x[:1].numel()
    numbers = np.arange(count) if images is None else images.numpy() % 2**32
    seed, counter = state.tolist()
    key = (seed % 2**32, seed // 2**32)
    tail = np.array([counter % 2**32, counter // 2**32])

    def words(groups: np.ndarray) -> np.ndarray:
        image, group = np.meshgrid(numbers, groups, indexing="ij")
        return philox_numpy(
            np.concatenate([np.stack([group, image], -1), np.broadcast_to(tail, (*group.shape, 2))], -1), key
        )

    drawn = words(np.arange(-(-row // 4))).astype(np.float64)
    if kind == "uniform":
        z = 2 * np.floor(drawn / 2**8) / 2**24 - 1
    else:
        radius = np.sqrt(-2 * np.log((np.floor(drawn[..., 0::2] / 2) + 0.5) / 2**31))
        angle = 2 * math.pi * drawn[..., 1::2] / 2**32
        z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    z = z.reshape(count, -(-row // 4) * 4)[:, :row]
    if kind == "l2":
        length = np.floor(words(np.array([2**32 - 1]))[:, :, 0].astype(np.float64) / 2**8) / 2**24
        z = z / np.linalg.norm(z, axis=1, keepdims=True) * length
    out = x.double() + scale * torch.tensor(z).view(x.shape)
    return out if kind == "gaussian" else out.clamp(0, 1)


def assert_same(actual: Tensor, expected: Tensor, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def tolerance(kind: str, scale: float = 1.0) -> float:
    """Tolerance between implementations: under L2 the rounding of the image's length."""
    return 3e-7 * scale if kind == "l2" else 0.0


def kolmogorov_smirnov(sample: Tensor, cdf: Any) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(n): above 1.95 once in a thousand samples of `cdf`."""
    ordered = cdf(sample.double().flatten().sort().values)
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()) * math.sqrt(n))


def normal_cdf(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    """The vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""
    words = philox(*(tuple(torch.tensor(int(word, 16)) for word in part.split()) for part in (counter, key)))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_first_start_is_the_known_answer(backend: str) -> None:
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    expected = 2 * (words >> 8).double() / 2**24 - 1
    assert_same(noise((1, 4), state_of(0, 0), backend=backend)[0].double(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ON_CPU[:2])
def test_agrees_with_the_definition(backend: str, kind: str) -> None:
    for shape in SHAPES:
        for dtype, atol in ((torch.float32, 7e-7), (torch.float64, 1e-15 if kind == "uniform" else 6e-7)):
            x = torch.rand(shape, dtype=dtype)
            out = start(x, kind=kind, scale=0.5, backend=backend)
            assert out.dtype == dtype
            assert_same(out.double(), oracle(x, state_of(), kind, 0.5), atol)


def numbered(count: int) -> Tensor:
    """`count` numbers of images: the ends of the range, out of order, others and one twice."""
    return torch.tensor([2**32 - 1, 7, 0, 2**31, 7, 123_456_789, 2**31 - 1])[torch.arange(count) % 7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_images_number_the_rows(backend: str, kind: str) -> None:
    for shape in SHAPES[:-1]:
        x = torch.rand(shape)
        out = start(x, kind=kind, scale=0.5, images=numbered(len(x)), backend=backend)
        assert_same(out.double(), oracle(x, state_of(), kind, 0.5, numbered(len(x))), 7e-7)
        rows = start(x, kind=kind, images=torch.arange(len(x)), backend=backend)
        assert torch.equal(rows, start(x, kind=kind, backend=backend))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_numbered_image_keeps_its_noise_in_any_batch(backend: str, kind: str) -> None:
    """Bitwise, the radius of "l2" too: whatever the order, the batch and the share of it."""
    x, images = torch.rand(7, 3, 5, 7), numbered(7)
    whole = start(x, kind=kind, images=images, backend=backend)
    order = torch.tensor([6, 2, 0, 4, 1, 5, 3])
    assert torch.equal(start(x[order], kind=kind, images=images[order], backend=backend), whole[order])
    for rank in range(3):
        share = start(x[rank::3], kind=kind, images=images[rank::3], backend=backend)
        assert torch.equal(share, whole[rank::3])


@pytest.mark.parametrize("backend", ON_CPU)
def test_of_an_image_number_the_low_word_counts(backend: str) -> None:
    x, images = torch.rand(4, 5), torch.tensor([3, 2**32 + 3, 3 - 2**32, 2**63 - 1])
    low = torch.tensor([3, 3, 3, 2**32 - 1])
    assert torch.equal(start(x, images=images, backend=backend), start(x, images=low, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ON_CPU[1:])
def test_backends_are_equal(backend: str, kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = torch.rand(shape, dtype=dtype)
        for images in (None, numbered(len(x))):
            expected = start(x, kind=kind, images=images, backend="eager")
            assert_same(start(x, kind=kind, images=images, backend=backend), expected, tolerance(kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_equals_cpu(backend: str, kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]:
            x = torch.rand(shape, dtype=dtype).to(memory_format=layout)
            on_gpu = start(x.cuda(), state_of().cuda(), kind=kind, backend=backend)
            assert_same(on_gpu.cpu(), start(x, kind=kind, backend="eager"), tolerance(kind))
            images = numbered(len(x))
            on_gpu = start(x.cuda(), state_of().cuda(), kind=kind, images=images.cuda(), backend=backend)
            expected = start(x, kind=kind, images=images, backend="eager")
            assert_same(on_gpu.cpu(), expected, tolerance(kind))


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_replayed_graph_reads_the_numbers_anew(backend: str) -> None:
    x, images = torch.rand(4, 3, 8, 8, device="cuda"), torch.arange(4, device="cuda")
    expected = [start(x.cpu(), images=torch.arange(n, n + 4), backend="eager") for n in (0, 50_000)]
    start(x, state_of().cuda(), images=images, backend=backend)  # compiles outside the capture
    state, graph = state_of().cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = start(x, state, images=images, backend=backend)
    for n, values in zip((0, 50_000), expected, strict=True):
        images.copy_(torch.arange(n, n + 4))
        graph.replay()
        assert_same(out.cpu(), values)


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_replayed_graph_draws_anew(backend: str) -> None:
    x, state = torch.rand(4, 3, 8, 8, device="cuda"), state_of(3, 0).cuda()
    expected = [start(x.cpu(), state_of(3, count), backend="eager") for count in range(4)]
    start(x, state, backend=backend)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = start(x, state, backend=backend)
        state[1].add_(1)
    for count in range(4):
        graph.replay()
        assert_same(out.cpu(), expected[count])


@needs("ext")
@pytest.mark.parametrize("kind", KINDS)
def test_cpp_splits_a_large_batch_without_gaps(kind: str) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(33, 3, 32, 33).to(memory_format=layout)
        for images in (None, numbered(33)):
            expected = start(x, kind=kind, images=images, backend="eager")
            assert_same(start(x, kind=kind, images=images, backend="cpp"), expected, tolerance(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_values_do_not_depend_on_the_layout(backend: str, kind: str) -> None:
    for shape in ((2, 3, 4, 6), (2, 3, 5, 3), (3, 2, 1, 1)):
        x, images = torch.rand(shape), numbered(shape[0])
        plain = start(x, kind=kind, images=images, backend=backend)
        spread = torch.stack([images, images + 1], 1)[:, 0]
        assert not spread.is_contiguous()
        assert torch.equal(start(x, kind=kind, images=spread, backend=backend), plain)
        last = x.to(memory_format=torch.channels_last)
        layouts = {
            "channels-last": last,
            "gaps": torch.stack([x, x], -1)[..., 0],
            "turned": x.mT.contiguous().mT,
        }
        for name, given_x in layouts.items():
            out = start(given_x, kind=kind, images=images, backend=backend)
            assert_same(out.contiguous(), plain, tolerance(kind))
            assert out.stride() == (last if name == "channels-last" else x).stride(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_an_image_does_not_depend_on_the_others(backend: str, kind: str) -> None:
    x = torch.rand(7, 3, 4, 4)
    assert_same(start(x[:3], kind=kind, backend=backend), start(x, kind=kind, backend=backend)[:3])


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_stays_in_ball_and_range(backend: str, data: st.DataObject) -> None:
    scale = data.draw(st.floats(0, 1, width=32))
    state = state_of(data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 2**63 - 1)))
    x = torch.rand(3, data.draw(st.integers(1, 40)))
    near = start(x, state, scale=scale, backend=backend)
    assert ((near >= x - scale) & (near <= x + scale)).all()
    assert ((near >= 0) & (near <= 1)).all()
    near = start(x, state, kind="l2", scale=scale, backend=backend)
    assert ((near.double() - x.double()).norm(dim=1) <= scale + 1e-6).all()
    assert ((near >= 0) & (near <= 1)).all()


def test_uniform_is_uniform() -> None:
    u = noise((64, 4096))
    assert u.min() >= -1
    assert u.max() < 1
    n = u.numel()
    assert abs(u.mean()) < 4 * math.sqrt(1 / 3 / n)
    assert abs(u.var() - 1 / 3) < 4 * math.sqrt(4 / 45 / n)
    assert kolmogorov_smirnov(u, lambda v: (v + 1) / 2) < 1.95


def test_gaussian_is_normal() -> None:
    z = noise((64, 4096), kind="gaussian")
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert kolmogorov_smirnov(z, normal_cdf) < 1.95
    assert z.abs().max() > 4  # of 262,144 normals the largest is above 4 with probability 1 - 6e-8


def test_gaussian_is_not_clipped() -> None:
    x = torch.tensor([[0.0, 1.0] * 50])
    out = start(x, kind="gaussian", scale=0.001)
    assert out.min() < 0
    assert out.max() > 1


def test_l2_directions_and_radii() -> None:
    """The direction's share in each coordinate is normal for many dimensions, the radius uniform."""
    moves = noise((4096, 256), kind="l2", scale=2.0).double()
    radii = moves.norm(dim=1)
    assert kolmogorov_smirnov(radii, lambda r: r / 2) < 1.95
    directions = moves / radii[:, None]
    assert directions.mean(0).norm() < 1.2 / math.sqrt(4096)  # the norm's expectation is 1 / sqrt(4096)
    plane = noise((20_000, 2), kind="l2").double()
    assert (
        kolmogorov_smirnov(torch.atan2(plane[:, 1], plane[:, 0]), lambda a: (a + math.pi) / (2 * math.pi))
        < 1.95
    )
    # Radius and direction come from other words.
    assert abs(torch.corrcoef(torch.stack([radii, directions[:, 0]]))[0, 1]) < 4 / math.sqrt(4096)


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_images_counters_seeds_and_lanes_are_independent(kind: str) -> None:
    shape, n = (4, 40_000), 40_000
    draws = [
        noise(shape, state_of(*state), kind=kind)
        for state in ((1, 0), (2, 0), (1, 1), (1, 2**32), (1 + 2**32, 0))
    ]
    rows = torch.cat(draws)
    lanes = draws[0][:1].view(-1, 4).T
    for sample, size in ((rows, n), (lanes, n // 4), (lanes.abs(), n // 4)):
        off = torch.corrcoef(sample) - torch.eye(len(sample))
        assert off.abs().max() < 4.5 / math.sqrt(size)
    series = draws[0][0]
    for lag in (1, 2, 3, 4, 32):
        assert abs(torch.corrcoef(torch.stack([series[lag:], series[:-lag]]))[0, 1]) < 4 / math.sqrt(n)
    flat = [draw.flatten() for draw in draws]
    assert all((a == b).float().mean() < 1e-3 for i, a in enumerate(flat) for b in flat[:i])


@pytest.mark.parametrize("backend", ON_CPU)
def test_special_values(backend: str) -> None:
    x = torch.tensor([[NAN, np.inf, -np.inf, 0.5, 0.25]])
    expected = torch.tensor([[NAN, 1.0, 0.0, 0.5, 0.25]])
    for kind in ("uniform", "l2"):
        assert_same(start(x, kind=kind, scale=0.0, backend=backend), expected)
    assert_same(start(x, kind="gaussian", scale=0.0, backend=backend), x)
    assert (start(x, scale=0.1, lo=-3.0, hi=-2.0, backend=backend)[:, 1:] <= -2.0).all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_direction_of_length_zero_moves_nothing(backend: str) -> None:
    state = state_of(0, ZERO_COUNTER)
    assert noise((1, 1), state, kind="gaussian", backend=backend).item() == 0
    assert noise((1, 1), state, kind="l2", backend=backend).item() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_is_out_of_place_and_detached(backend: str, kind: str) -> None:
    x, state = torch.rand(2, 7, requires_grad=True), state_of()
    before, states = x.detach().clone(), state.clone()
    out = start(x, state, kind=kind, backend=backend)
    assert not out.requires_grad
    assert out.data_ptr() != x.data_ptr()
    assert_same(x.detach(), before)
    assert_same(state, states)


@pytest.mark.parametrize("kind", [0, 2])
@pytest.mark.parametrize("name", ["random_start", pytest.param("random_start_triton", marks=needs("triton"))])
def test_registration(name: str, kind: int) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    x = torch.rand(2, 3, 4, 5)
    for given_x in (
        x,
        x.to(memory_format=torch.channels_last),
        torch.rand(0, 4),
        torch.rand(1, 5, dtype=torch.float64),
    ):
        torch.library.opcheck(operator, (given_x, state_of(), kind, SCALE, 0.0, 1.0))
        torch.library.opcheck(operator, (given_x, state_of(), kind, SCALE, 0.0, 1.0, numbered(len(given_x))))


@needs("ext")
def test_the_registered_operator_checks_for_itself() -> None:
    run = torch.ops.fastdynat.random_start
    x = torch.rand(2, 3, 4, 5)
    turned = x.mT.contiguous().mT
    assert_same(run(turned, state_of(), 0, SCALE, 0.0, 1.0), start(x))
    for state in (torch.zeros(3).long(), torch.zeros(2), torch.zeros(4).long()[::2]):
        with pytest.raises(RuntimeError, match=r"state must be a contiguous int64 tensor of shape \(2\)"):
            run(x, state, 0, SCALE, 0.0, 1.0)
    assert_same(run(x, state_of(), 0, SCALE, 0.0, 1.0, numbered(2)), start(x, images=numbered(2)))
    for images, message in (
        (torch.arange(3), r"images has shape \(3\), expected one entry per row of x"),
        (torch.arange(2).int(), "images must be int64"),
        (torch.arange(4)[::2], "images must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(x, state_of(), 0, SCALE, 0.0, 1.0, images)
    with pytest.raises(RuntimeError, match="kind must be 0, 1 or 2, got 3"):
        run(x, state_of(), 3, SCALE, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="x must be float32 or float64"):
        run(x.half(), state_of(), 0, SCALE, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="a first dimension of images"):
        run(torch.tensor(0.5), state_of(), 0, SCALE, 0.0, 1.0)


@pytest.mark.parametrize("kind", ["uniform", "l2"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str, kind: str) -> None:
    torch._dynamo.reset()  # each backend and kind compiles `start` anew; eight at most are allowed
    compiled = torch.compile(start, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.to(memory_format=layout)
        expected = start(x, state_of(), kind=kind, backend="eager")
        assert_same(compiled(x, state_of(), kind=kind, backend=backend), expected, tolerance(kind))
        images = numbered(2)
        expected = start(x, state_of(), kind=kind, images=images, backend="eager")
        found = compiled(x, state_of(), kind=kind, images=images, backend=backend)
        assert_same(found, expected, tolerance(kind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(0.5)}, "x needs a first dimension of images, got a scalar"),
        ({"x": torch.rand(2, 3).half()}, "x must be float32 or float64, got torch.float16"),
        (
            {"x": torch.empty(1, 2**31, device="meta")},
            r"an image has 2147483648 elements, at most 2\^31 - 1 are possible",
        ),
        ({"state": torch.zeros(3).long()}, r"state must be int64 of shape \(2,\), got torch.int64 \(3,\)"),
        ({"state": torch.zeros(2)}, "got torch.float32"),
        ({"state": torch.zeros(2, device="meta").long()}, "state is on meta but x is on cpu"),
        ({"kind": "sobol"}, "unknown kind of start 'sobol'.*known: gaussian, l2, uniform"),
        ({"scale": -0.1}, r"scale must be >= 0 .* got -0.1"),
        ({"scale": NAN}, "scale must be >= 0"),
        ({"lo": 2.0}, "lo=2.0 and hi=1.0"),
        ({"images": torch.arange(3)}, r"images must be int64 of shape \(2,\), .* got torch.int64 \(3,\)"),
        ({"images": torch.arange(2).int()}, r"images must be int64 .* got torch.int32 \(2,\)"),
        ({"images": torch.arange(2, device="meta")}, "images is on meta but x is on cpu"),
    ],
)
def test_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = {"x": torch.rand(2, 3), "state": state_of(), "kind": "uniform", "scale": SCALE}
    with pytest.raises(ValueError, match=message):
        ops.random_start(**args | change)


def test_unknown_backend() -> None:
    with pytest.raises(UserError, match="unknown backend 'tritn'"):
        start(torch.rand(2, 3), backend="tritn")


@pytest.mark.slow
@needs("cxx")
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_draws_the_same_numbers(kind: str) -> None:
    """Products of words must not wrap: in the C++ of Inductor that is undefined, and gave other numbers."""
    x = torch.rand(7, 3, 8, 8)

    def draw(x: Tensor, state: Tensor, images: Tensor | None) -> Tensor:
        return ops.random_start(x, state, kind=kind, scale=0.5, images=images, backend="eager")

    compiled = torch.compile(draw, fullgraph=True)
    for images in (None, numbered(7)):
        for state in (state_of(1, 2), state_of(), state_of(-1, -1), state_of(2**32 - 1, 2**32 - 1)):
            assert_same(compiled(x, state, images), draw(x, state, images), 1e-6)
