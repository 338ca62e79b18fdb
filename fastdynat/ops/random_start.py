"""Random starting points of attacks, from a counter-based generator that CUDA graphs can advance."""

from typing import Any

import torch
from torch import Tensor

from fastdynat.errors import unknown_name
from fastdynat.ops._layout import images_together
from fastdynat.ops._register import register_operator
from fastdynat.ops._select import select
from fastdynat.ops._size import Size, size_in, split_size
from fastdynat.ops._step import IMAGE_DTYPES

KINDS = ("uniform", "gaussian", "l2")

_WORD = 0xFFFFFFFF
_RADIUS_GROUP = 0xFFFFFFFF  # holds the radius of an image's L2 start: no image has so many elements
_LOG = (
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words from a counter of four and a key of two, all int64 tensors in [0,
    2^32).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The multipliers less 2^32, which fits in int64: a product that wraps is undefined in the C++ that
        # Inductor writes. The low word is the same, the high one is less by the other factor.
        a, b = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        c0, c1, c2, c3 = ((b >> 32) + c2) ^ c1 ^ k0, b & _WORD, ((a >> 32) + c0) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _unit_uniform(word: Tensor) -> Tensor:
    """A multiple of 2^-24 in [0, 1), float32."""
    return (word >> 8).float() * 2**-24


def _log(u: Tensor) -> Tensor:
    """log(u) for normal float32 u > 0, by Cephes' polynomial: math libraries differ in their last bits."""
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the mantissa is in [sqrt(1/2), sqrt(2))
    x = (bits - (exponent << 23)).view(torch.float32) - 1
    e = exponent.float()
    z = x * x
    y = 7.0376836292e-2 * x
    for coefficient in _LOG[:-1]:
        y = (y + coefficient) * x
    y = y + _LOG[-1]
    y = y * x * z - 2.12194440e-4 * e - 0.5 * z
    return x + y + 0.693359375 * e


def _normal_pair(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float32, by Box-Muller: sqrt(-2 log u) at angle 2 pi word1 / 2^32."""
    # Multiples of 2^-31, moved off zero: the tail reaches 6.6 standard deviations.
    u = (word0 >> 1).float() * 2**-31 + 2**-32
    # Through float64, because torch does not round the float32 square root correctly on the CPU.
    radius = torch.sqrt((-2 * _log(u)).double()).float()
    # The nearest quarter turn, exactly, and the remainder in [-pi/4, pi/4], the range of Cephes' polynomials.
    quarter = (word1 + 2**29) >> 30
    t = (word1 - (quarter << 30)).float() * 1.4629180792671596e-9
    z = t * t
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * t + t
    cosine = (
        ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1
    )
    odd = (quarter & 1) != 0
    c, s = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return radius * torch.where(((quarter + 1) & 2) != 0, -c, c), radius * torch.where(
        (quarter & 2) != 0, -s, s
    )


def _eager(
    x: Tensor,
    state: Tensor,
    kind: int,
    scale: float,
    lo: float,
    hi: float,
    images: Tensor | None = None,
    device_scale: Tensor | None = None,
) -> Tensor:
    """The reference."""
    x = images_together(x)
    count, row = x.shape[0], x[:1].numel()
    key = (state[0] & _WORD, (state[0] >> 32) & _WORD)
    counter = (state[1] & _WORD, (state[1] >> 32) & _WORD)
    image = (torch.arange(count, device=x.device) if images is None else images & _WORD).unsqueeze(1)
    # The mask makes it a tensor to Inductor, which would multiply the index itself in 32 bits.
    group = torch.arange((row + 3) // 4, device=x.device) & _WORD
    words = philox((group, image, *counter), key)
    if KINDS[kind] == "uniform":
        lanes = [2 * _unit_uniform(word) - 1 for word in words]
    else:
        lanes = [*_normal_pair(*words[:2]), *_normal_pair(*words[2:])]
    noise = torch.stack(lanes, 2).flatten(1)[:, :row].to(x.dtype)
    length = size = size_in(x.dtype, scale, device_scale)
    if KINDS[kind] == "l2":
        first, *_ = philox((torch.full_like(image, _RADIUS_GROUP), image, *counter), key)
        radius = size * _unit_uniform(first).to(x.dtype)
        length = radius / noise.norm(dim=1, keepdim=True).clamp_min(1e-20)
    moved = x.reshape(count, row) + noise * length
    if KINDS[kind] != "gaussian":
        moved = moved.clamp(lo, hi)
    return torch.empty_like(x).copy_(moved.view(x.shape))


def _fake(x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(images_together(x))


IMPLEMENTATIONS = register_operator("random_start", eager=_eager, fake=_fake)


def random_start(
    x: Tensor,
    state: Tensor,
    *,
    kind: str,
    scale: Size,
    lo: float = 0.0,
    hi: float = 1.0,
    images: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the random points near the images at which an attack starts, as a new, detached tensor.

    ========== ======================= ==================================================================
    kind       scale                   result
    ========== ======================= ==================================================================
    "uniform"  L-inf radius            uniform in the ball, clipped to [lo, hi] (Madry et al. 2018)
    "gaussian" standard deviation      x + scale * N(0, I), neither clipped nor projected (TRADES, DYNAT)
    "l2"       L2 radius               uniform direction, length uniform in [0, scale), clipped to [lo, hi]
    ========== ======================= ==================================================================

    The noise of element e (in (C, H, W) order) of image n depends on `state`, n and e only: not on the batch
    size, the memory layout, the device or the implementation. n is the row of x, or with `images` the number
    of the image that the caller gives, such as its index in the data set: then it does not depend on the
    order of the batch either, nor on how many processes share it and which of them holds the image.

    The noise is drawn in float32 (in steps of 2^-23 * scale if uniform) for float64 images too. Bitwise the
    same in every backend; "l2" up to the rounding of the direction's length, a relative 1e-6 of the move. NaN
    pixels stay NaN.

    Generator: Philox4x32-10 (Salmon et al., SC 2011). Key: the seed. Counter: (e // 4, n, low word, high word
    of the state's counter), word e % 4 for element e. Normal numbers by Box-Muller from pairs of words.

    Args:
        x: (N, ...) float32 or float64, usually (N, C, H, W) in [lo, hi]. The result has its layout where that
            is contiguous or channels-last, else it is contiguous.
        state: int64 (2,) on the device of x, [seed, counter], any values. Read on the device and not changed:
            add 1 to state[1], or draw both anew, for the next start; a captured CUDA graph that does so draws
            anew at each replay.
        kind: a kind of the table.
        scale: >= 0, in units of the pixel range: a number or a scalar tensor, as in
            `pgd_step_linf`.
        lo, hi: the pixel range, lo <= hi.
        images: int64 (N,) on the device of x, the number n of each image; None: 0 to N - 1. Numbers in
            [0, 2^32), repeated ones get equal noise. Not checked, as that would wait for the device: of other
            numbers the low 32 bits count, so that n + 2^32 draws what n does.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown kind or backend.
        RuntimeError: the backend asked for cannot run here.
    """
    if x.dim() == 0:
        raise ValueError("random_start: x needs a first dimension of images, got a scalar")
    if x.dtype not in IMAGE_DTYPES:
        raise ValueError(f"random_start: x must be float32 or float64, got {x.dtype}")
    if x[:1].numel() >= 2**31:
        raise ValueError(
            f"random_start: an image has {x[:1].numel()} elements, at most 2^31 - 1 are possible"
        )
    if state.shape != (2,) or state.dtype != torch.int64:
        raise ValueError(
            f"random_start: state must be int64 of shape (2,), got {state.dtype} {tuple(state.shape)}"
        )
    if state.device != x.device:
        raise ValueError(f"random_start: state is on {state.device} but x is on {x.device}")
    if kind not in KINDS:
        raise unknown_name("kind of start", kind, KINDS)
    if not isinstance(scale, Tensor) and not scale >= 0:
        raise ValueError(f"random_start: scale must be >= 0 (in units of the pixel range), got {scale}")
    if not lo <= hi:
        raise ValueError(f"random_start: lo must not exceed hi, got lo={lo} and hi={hi}")
    if images is not None and (images.shape != x.shape[:1] or images.dtype != torch.int64):
        raise ValueError(
            f"random_start: images must be int64 of shape ({len(x)},), one number per image of x, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    if images is not None and images.device != x.device:
        raise ValueError(f"random_start: images is on {images.device} but x is on {x.device}")
    number, device_scale = split_size("random_start", "scale", scale, x)
    run = select("random_start", IMPLEMENTATIONS, backend, x)
    x = images_together(x.detach())
    images = images.contiguous() if images is not None else None
    return run(x, state.contiguous(), KINDS.index(kind), number, float(lo), float(hi), images, device_scale)
