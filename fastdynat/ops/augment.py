"""Training batches from a uint8 set in device memory: gather, crop, flip and convert in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.errors import UserError
from fastdynat.ops._register import register_operator
from fastdynat.ops._select import select

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reflect(images: Tensor, pad: int) -> Tensor:
    """Pad (N, C, H, W) images by reflection, as numpy's mode "reflect": (N, C, H + 2 pad, W + 2 pad).

    Raises UserError unless pad is below H and W.
    """
    if pad >= min(images.shape[2:]):
        height, width = images.shape[2:]
        raise UserError(
            f"{height}x{width} images cannot be padded by reflecting {pad} pixels; use --pad-mode zeros"
        )
    for dim in (2, 3):
        size = images.shape[dim]
        at = torch.arange(-pad, size + pad, device=images.device).abs()
        images = images.index_select(dim, size - 1 - (size - 1 - at).abs())
    return images


def crop(images: Tensor, shifts: Tensor, pad: int, *, pad_mode: str = "zeros") -> Tensor:
    """Pad (N, C, H, W) images and cut each back to (H, W) at its own (top, left), a column of `shifts`.

    pad_mode: "zeros" or "reflect".
    """
    num_images, _, height, width = images.shape
    padded = reflect(images, pad) if pad_mode == "reflect" else F.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.arange(num_images, device=images.device)
    return windows[rows, :, shifts[0], shifts[1]]


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the (N, C, H, W) images left to right where `flips`, bool (N,), is set."""
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)


def to_unit(images: Tensor, *, channels_last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 0..255 to `dtype` in [0, 1], contiguous or channels-last."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    # The divisor is a tensor on the device: CUDA multiplies by the reciprocal of a Python number, which
    # rounds differently.
    return images.to(dtype, memory_format=memory_format).div_(
        torch.full((), 255.0, dtype=dtype, device=images.device)
    )


def _outside(values: Tensor, last: int) -> Tensor:
    """A mask of the values outside [0, last]."""
    return (values < 0) | (values > last)


def _raise_outside(indices: Tensor, shifts: Tensor | None, stored: int, pad: int) -> None:
    """Raise RuntimeError, as the C++ kernel does, naming the first value out of range."""
    for index in indices[_outside(indices, stored - 1)].tolist():
        raise RuntimeError(f"augment: index {index} is outside [0, {stored}), the images of the store")
    if shifts is not None:
        for top, left in shifts[:, _outside(shifts, 2 * pad).any(0)].T.tolist():
            raise RuntimeError(f"augment: shift ({top}, {left}) is outside [0, {2 * pad}], twice the padding")


def _eager(
    images: Tensor,
    indices: Tensor,
    shifts: Tensor | None,
    flips: Tensor | None,
    pad: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The reference, which every other implementation equals bit for bit."""
    outside = None
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        _raise_outside(indices, shifts, images.shape[0], pad)
    else:
        # Raising for a value would wait for the device.
        outside = _outside(indices, images.shape[0] - 1)
        indices = indices.clamp(0, images.shape[0] - 1)
        if shifts is not None:
            outside = outside | _outside(shifts, 2 * pad).any(0)
            shifts = shifts.clamp(0, 2 * pad)
    batch = images[indices]
    if shifts is not None:
        batch = crop(batch, shifts, pad)
    if flips is not None:
        batch = flip(batch, flips)
    x = to_unit(batch, channels_last=channels_last, dtype=dtype)
    return x if outside is None else x.masked_fill_(outside.view(-1, 1, 1, 1), torch.nan)


def _fake(images: Tensor, indices: Tensor, dtype: torch.dtype, channels_last: bool, **_: Any) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (indices.shape[0], *images.shape[1:])
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=memory_format)


IMPLEMENTATIONS = register_operator("augment", eager=_eager, fake=_fake)


def augment(
    images: Tensor,
    indices: Tensor,
    shifts: Tensor | None = None,
    flips: Tensor | None = None,
    *,
    pad: int = 4,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return images[indices], zero-padded, cropped, mirrored and divided by 255: (N, C, H, W) in [0, 1].

    Bitwise the same in every backend: the quotient is that of a true division, rounded to `dtype`.

    Args:
        images: the whole set, uint8 (M, C, H, W), contiguous.
        indices: int64 (N,), the images to take, in [0, M).
        shifts: int64 (2, N), top and left corner of each crop in the image padded by `pad`, in [0, 2 * pad].
            None: no crop.
        flips: bool (N,), True to mirror the crop left to right. None: no mirroring.
        pad: pixels of zeros on each side.
        dtype: float32, float64, bfloat16 or float16.
        channels_last: give the batch in channels-last memory format.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here; on the CPU also for an index or a shift out of
            range. On the GPU, where a check would wait for the device, such an image is NaN throughout.
    """
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(
            f"augment: images must be uint8 of shape (M, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if not images.is_contiguous():
        raise ValueError(
            "augment: images must be contiguous; call .contiguous() on the set once, not on every batch"
        )
    if images[:1].numel() >= 2**31:
        raise ValueError(
            f"augment: an image has {images[:1].numel()} elements, at most 2^31 - 1 are possible"
        )
    num_images = indices.numel()
    wanted: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "indices": (indices, torch.int64, (num_images,))
    }
    wanted |= {"shifts": (shifts, torch.int64, (2, num_images))} if shifts is not None else {}
    wanted |= {"flips": (flips, torch.bool, (num_images,))} if flips is not None else {}
    for name, (tensor, kind, shape) in wanted.items():
        if tensor.dtype != kind or tensor.shape != shape:
            raise ValueError(
                f"augment: {name} must be {kind} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.device != images.device:
            raise ValueError(f"augment: {name} is on {tensor.device} but images is on {images.device}")
    if num_images > 0 and images.shape[0] == 0:
        raise ValueError(f"augment: images is empty, {num_images} of it are asked for")
    if pad < 0:
        raise ValueError(f"augment: pad must be 0 or more pixels, got {pad}")
    if dtype not in DTYPES:
        raise ValueError(f"augment: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    run = select("augment", IMPLEMENTATIONS, backend, images)
    if shifts is not None and shifts.stride(1) != 1:
        shifts = shifts.contiguous()
    flips = flips.contiguous() if flips is not None else None
    return run(images, indices.contiguous(), shifts, flips, pad, dtype, channels_last)
