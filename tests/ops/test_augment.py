"""Augmented batches: a per-image oracle, bitwise equal implementations, indices out of range."""

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
# (stored images, images in the batch, channels, height, width, pad)
SIZES = [
    (5, 7, 3, 8, 8, 4),
    (3, 4, 1, 7, 9, 3),
    (4, 3, 3, 5, 2, 4),
    (2, 3, 4, 1, 1, 2),
    (3, 2, 2, 6, 3, 0),
    (2, 1, 5, 13, 17, 1),
]
EMPTY = [(5, 0, 3, 8, 8, 4), (0, 0, 3, 8, 8, 4), (5, 2, 3, 0, 8, 4), (5, 2, 0, 8, 8, 4)]


def inputs(
    stored: int, batch: int, channels: int, height: int, width: int, pad: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = torch.randint(256, (stored, channels, height, width), dtype=torch.uint8)
    indices = torch.randint(max(stored, 1), (batch,))
    shifts = torch.randint(2 * pad + 1, (2, batch))
    return images, indices, shifts, torch.rand(batch) < 0.5


def oracle(
    images: Tensor, indices: Tensor, shifts: Tensor | None, flips: Tensor | None, pad: int, dtype: torch.dtype
) -> Tensor:
    """The definition, image by image in numpy."""
    _, channels, height, width = images.shape
    out = np.zeros(
        (len(indices), channels, height, width), np.float64 if dtype == torch.float64 else np.float32
    )
    for n, index in enumerate(indices.tolist()):
        image = images[index].numpy()
        if shifts is not None:
            top, left = shifts[:, n].tolist()
            padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
            image = padded[:, top : top + height, left : left + width]
        if flips is not None and flips[n]:
            image = image[:, :, ::-1]
        out[n] = image.astype(out.dtype) / out.dtype.type(255)
    return torch.tensor(out).to(dtype)


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0, equal_nan=True)


def cut_off(backend: str, dtype: torch.dtype) -> float:
    """The relative tolerance: Triton's interpreter cuts off the bits that a GPU rounds to bfloat16."""
    return 2**-7 if (backend, dtype) == ("triton", torch.bfloat16) else 0.0


def cases(
    images: Tensor, indices: Tensor, shifts: Tensor, flips: Tensor
) -> list[tuple[Tensor, Tensor, Any, Any]]:
    return [(images, indices, s, f) for s in (shifts, None) for f in (flips, None)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_equals_the_definition(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for size in SIZES + EMPTY if dtype == torch.float32 else SIZES[:2]:
        pad = size[-1]
        for args in cases(*inputs(*size)):
            out = ops.augment(*args, pad=pad, dtype=dtype, channels_last=channels_last, backend=backend)
            assert_same(out, oracle(*args, pad, dtype), rtol=cut_off(backend, dtype))
            assert out.numel() == 0 or out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_is_bitwise_equal_to_cpu(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    for size in SIZES + EMPTY:
        for args in cases(*inputs(*size)):
            given_args = (None if t is None else t.cuda() for t in args)
            out = ops.augment(
                *given_args, pad=size[-1], dtype=dtype, channels_last=channels_last, backend=backend
            )
            assert_same(out.cpu(), oracle(*args, size[-1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_every_pixel_value_is_its_quotient(backend: str, dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = (torch.arange(256, dtype=torch.float64) / 255).view(1, 1, 16, 16)
    # The float64 quotient lies near no boundary of a narrower type, so that rounding it once or twice is the
    # same.
    out = ops.augment(images, torch.tensor([0]), dtype=dtype, backend=backend)
    assert_same(out, expected.to(dtype), rtol=cut_off(backend, dtype))


@needs("ext")
@pytest.mark.parametrize("channels_last", [False, True])
def test_cpp_splits_a_large_batch_without_gaps(channels_last: bool) -> None:
    args = inputs(40, 50, 3, 32, 33, 4)
    out = ops.augment(*args, pad=4, channels_last=channels_last, backend="cpp")
    assert_same(out, ops.augment(*args, pad=4, channels_last=channels_last, backend="eager"))


@pytest.mark.parametrize("backend", ON_CPU)
def test_slices_of_an_epochs_plan(backend: str) -> None:
    images, indices, shifts, flips = inputs(5, 12, 3, 6, 6, 2)
    whole = oracle(images, indices, shifts, flips, 2, torch.float32)
    now = slice(4, 9)
    for shift in (shifts, shifts.T.contiguous().T):
        assert_same(
            ops.augment(images, indices[now], shift[:, now], flips[now], pad=2, backend=backend), whole[now]
        )
    assert_same(
        ops.augment(images, indices[::3], shifts[:, ::3], flips[::3], pad=2, backend=backend), whole[::3]
    )


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_properties(backend: str, data: st.DataObject) -> None:
    height, width, pad = (data.draw(st.integers(low, 7)) for low in (1, 1, 0))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    images, indices, shifts, flips = inputs(3, 2, 2, height, width, pad)
    run = {"pad": pad, "backend": backend}
    # The crop at the padding's corner is the image, and two flips are none.
    centre = torch.full_like(shifts, pad)
    assert_same(ops.augment(images, indices, centre, **run), images[indices].float() / 255)
    out = ops.augment(images, indices, shifts, flips, **run)
    assert_same(ops.augment(images, indices, shifts, ~flips, **run).flip(3), out)


OUT_OF_RANGE = [
    ("index", -1, r"index -1 is outside \[0, 3\), the images of the store"),
    ("index", 3, r"index 3 is outside \[0, 3\)"),
    ("index", -(2**63), "index -9223372036854775808 is outside"),
    ("top", 5, r"shift \(5, 2\) is outside \[0, 4\], twice the padding"),
    ("left", -1, r"shift \(2, -1\) is outside \[0, 4\]"),
    ("left", 2**63 - 1, r"shift \(2, 9223372036854775807\) is outside"),
]


def out_of_range(where: str, value: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of three images whose second has an index or shift that there is not."""
    images, indices, _, flips = inputs(3, 3, 2, 4, 4, 2)
    shifts = torch.full((2, 3), 2)
    {"index": indices, "top": shifts[0], "left": shifts[1]}[where][1] = value
    return images, indices, shifts, flips


@pytest.mark.parametrize(("where", "value", "message"), OUT_OF_RANGE)
@pytest.mark.parametrize("backend", ON_CPU[:2])
def test_out_of_range_is_an_error_on_the_cpu(backend: str, where: str, value: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.augment(*out_of_range(where, value), pad=2, backend=backend)


def assert_only_the_second_is_nan(out: Tensor) -> None:
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU[2:])
def test_out_of_range_is_nan_where_no_check_can_wait(backend: str, dtype: torch.dtype) -> None:
    for where, value, _ in OUT_OF_RANGE:
        assert_only_the_second_is_nan(
            ops.augment(*out_of_range(where, value), pad=2, dtype=dtype, backend=backend)
        )


def test_out_of_range_is_nan_in_a_compiled_graph() -> None:
    compiled = torch.compile(ops.augment, fullgraph=True, backend="aot_eager")
    for where, value, _ in OUT_OF_RANGE:
        assert_only_the_second_is_nan(compiled(*out_of_range(where, value), pad=2, backend="eager"))


@pytest.mark.parametrize("backend", ON_GPU)
def test_out_of_range_is_nan_on_the_gpu(backend: str) -> None:
    for where, value, _ in OUT_OF_RANGE:
        args = (t.cuda() for t in out_of_range(where, value))
        assert_only_the_second_is_nan(ops.augment(*args, pad=2, backend=backend))


@pytest.mark.parametrize("backend", ON_CPU)
def test_inputs_are_left_alone(backend: str) -> None:
    args = inputs(5, 7, 3, 8, 8, 4)
    before = [t.clone() for t in args]
    ops.augment(*args, backend=backend)
    for now, then in zip(args, before, strict=True):
        assert_same(now, then)


@pytest.mark.parametrize("name", ["augment", pytest.param("augment_triton", marks=needs("triton"))])
def test_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    images, indices, shifts, flips = inputs(5, 3, 3, 4, 6, 2)
    torch.library.opcheck(operator, (images, indices, shifts, flips, 2, torch.float32, True))
    torch.library.opcheck(operator, (images, indices, None, None, 2, torch.bfloat16, False))
    torch.library.opcheck(operator, (images, indices[:0], shifts[:, :0], flips[:0], 2, torch.float32, False))


@needs("ext")
def test_the_registered_operator_checks_for_itself() -> None:
    images, indices, shifts, flips = inputs(5, 3, 3, 4, 6, 2)
    wrong = [
        ({"images": images.float()}, r"images must be a contiguous uint8 tensor of shape \(M, C, H, W\)"),
        ({"images": images.mT}, "images must be a contiguous uint8"),
        ({"indices": indices.int()}, r"indices must be a contiguous int64 tensor of shape \(N\)"),
        ({"shifts": shifts[:, :2]}, r"shifts must be an int64 tensor of shape \(2, 3\).*got shape \(2, 2\)"),
        ({"shifts": shifts[:1]}, r"got shape \(1, 3\)"),
        ({"flips": flips[:2]}, r"flips has shape \(2\)"),
        ({"flips": flips.byte()}, "flips must be bool"),
        ({"pad": -1}, "pad must be 0 or more pixels, below 2.31, got -1"),
        ({"dtype": torch.int32}, "dtype must be float32"),
    ]
    good = {
        "images": images,
        "indices": indices,
        "shifts": shifts,
        "flips": flips,
        "pad": 2,
        "dtype": torch.float32,
    }
    for change, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastdynat.augment(*(good | change).values(), False)


@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.augment, fullgraph=True, backend="aot_eager")
    args = inputs(5, 3, 3, 4, 6, 2)
    for channels_last in (False, True):
        out = compiled(*args, pad=2, channels_last=channels_last, backend=backend)
        assert_same(out, oracle(*args, 2, torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(5, 3, 4, 6)},
            r"images must be uint8 of shape \(M, C, H, W\), got torch.float32 \(5, 3, 4, 6\)",
        ),
        ({"images": torch.zeros(5, 4, 6).byte()}, r"got torch.uint8 \(5, 4, 6\)"),
        ({"images": torch.zeros(5, 3, 6, 4).byte().mT}, "images must be contiguous; call .contiguous"),
        ({"images": torch.zeros(0, 3, 4, 6).byte()}, "images is empty, 3 of it are asked for"),
        ({"images": torch.zeros(1, 1, 1, 2**31, device="meta").byte()}, "an image has 2147483648 elements"),
        (
            {"indices": torch.zeros(3)},
            r"indices must be torch.int64 of shape \(3,\), got torch.float32 \(3,\)",
        ),
        ({"indices": torch.zeros(3, 1).long()}, r"indices must be .* got torch.int64 \(3, 1\)"),
        (
            {"shifts": torch.zeros(2, 4).long()},
            r"shifts must be torch.int64 of shape \(2, 3\), got torch.int64 \(2, 4\)",
        ),
        ({"flips": torch.zeros(3)}, r"flips must be torch.bool of shape \(3,\), got torch.float32 \(3,\)"),
        ({"flips": torch.zeros(3, device="meta").bool()}, "flips is on meta but images is on cpu"),
        ({"pad": -1}, "pad must be 0 or more pixels, got -1"),
        ({"dtype": torch.int32}, "dtype must be float32, float64, bfloat16 or float16, got torch.int32"),
    ],
)
def test_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args = dict(zip(("images", "indices", "shifts", "flips"), inputs(5, 3, 3, 4, 6, 2), strict=True)) | {
        "pad": 2
    }
    with pytest.raises(ValueError, match=message):
        ops.augment(**args | change)


def test_unknown_backend() -> None:
    with pytest.raises(UserError, match="unknown backend 'tritn'"):
        ops.augment(*inputs(5, 3, 3, 4, 6, 4), backend="tritn")
