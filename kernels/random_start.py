"""Random starts as one kernel: one read and one write per pixel; random numbers never reach memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of

GROUPS = 256  # of four elements, per program

KINDS = ("uniform", "gaussian", "l2")


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011): four uint32 words from a counter of four and a key of two."""
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit_uniform(word):
    """A multiple of 2^-24 in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def log_normal_range(u):
    """log(u) for normal u > 0, by Cephes' polynomial: math libraries differ in their last bits."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the mantissa is in [sqrt(1/2), sqrt(2))
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = x * x
    y = 7.0376836292e-2 * x - 1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x - 1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x - 1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x - 2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * z - 2.12194440e-4 * e - 0.5 * z
    return x + y + 0.693359375 * e


@triton.jit
def normal_pair(word0, word1):
    """Two standard normals by Box-Muller: radius sqrt(-2 log u), angle 2 pi word1 / 2^32."""
    # Multiples of 2^-31, moved off zero: the tail reaches 6.6 standard deviations.
    u = (word0 >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    radius = tl.sqrt_rn(-2.0 * log_normal_range(u))
    # The nearest quarter turn, exactly, and the rest, in [-pi/4, pi/4], for which Cephes' polynomials are
    # made.
    quarter = (word1 + 0x20000000) >> 30
    t = (word1 - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    z = t * t
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * t + t
    cosine = (
        ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    )
    odd = (quarter & 1) != 0
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    return radius * tl.where(((quarter + 1) & 2) != 0, -c, c), radius * tl.where((quarter & 2) != 0, -s, s)


@triton.jit
def group_of(item, pixels, CHANNELS: tl.constexpr, FOURS: tl.constexpr):
    """The group of four elements in the C order that is the item-th to be worked on.

    Channels-last images are walked four pixels at a time through all channels, so that neighbours are near in
    memory.
    """
    if CHANNELS > 1 and FOURS:
        return (item % CHANNELS) * (pixels // 4) + item // CHANNELS
    return item


@triton.jit
def image_of(images_ptr, n, NUMBERED: tl.constexpr):
    """The number of row n in the generator's counter, uint32: the low word of the caller's, or n itself."""
    if NUMBERED:
        return tl.load(images_ptr + n).to(tl.uint64, bitcast=True).to(tl.uint32)
    return n.to(tl.uint32)


@triton.jit
def draw(
    first,
    image,
    state_ptr,
    pixels,
    KIND: tl.constexpr,
    CHANNELS: tl.constexpr,
    FOURS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The noise of the elements of GROUPS groups from the item `first` on: (4 * GROUPS,) float32."""
    seed = tl.load(state_ptr).to(tl.uint64, bitcast=True)
    counter = tl.load(state_ptr + 1).to(tl.uint64, bitcast=True)
    group = group_of(first + tl.arange(0, GROUPS), pixels, CHANNELS, FOURS).to(tl.uint32)
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = philox(
        group,
        zero + image,
        zero + counter.to(tl.uint32),
        zero + (counter >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    if KIND == "uniform":
        z0 = 2.0 * unit_uniform(w0) - 1.0
        z1 = 2.0 * unit_uniform(w1) - 1.0
        z2 = 2.0 * unit_uniform(w2) - 1.0
        z3 = 2.0 * unit_uniform(w3) - 1.0
    else:
        z0, z1 = normal_pair(w0, w1)
        z2, z3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def elements(first, row, pixels, CHANNELS: tl.constexpr, FOURS: tl.constexpr, GROUPS: tl.constexpr):
    """The offsets in memory of the elements that `draw` returns, and a mask of those that exist."""
    lanes = tl.arange(0, 4 * GROUPS)
    item = first + lanes // 4
    element = 4 * group_of(item, pixels, CHANNELS, FOURS) + lanes % 4
    exists = (item < tl.cdiv(row, 4)) & (element < row)
    if CHANNELS > 1:
        element = (element % pixels) * CHANNELS + element // pixels
    return element, exists


@triton.jit
def random_start_kernel(
    x_ptr,  # (images, row) float; each image (channels, pixels), or (pixels, CHANNELS) if CHANNELS > 1
    state_ptr,  # (2,) int64: seed, counter
    images_ptr,  # (images,) int64: their numbers; unused unless NUMBERED
    out_ptr,  # as x; not aliased with it
    row,
    pixels,
    scale: tl.float64,  # an unannotated float would reach float64 images rounded to float32
    lo: tl.float64,
    hi: tl.float64,
    scale_ptr,  # float64 scalar that replaces `scale`; unused unless READ_SCALE
    KIND: tl.constexpr,
    CHANNELS: tl.constexpr,
    FOURS: tl.constexpr,  # pixels % 4 == 0
    NUMBERED: tl.constexpr,
    TILES: tl.constexpr,  # of GROUPS groups, per program: 1, or the whole image if KIND is "l2"
    GROUPS: tl.constexpr,
    READ_SCALE: tl.constexpr,
):
    """Write clamp(x + scale * noise, lo, hi), as fastdynat.ops.random_start defines it.

    Grid: (tiles per image, images), flattened with the tiles of an image side by side; (images,) if KIND is
    "l2", whose programs draw an image's numbers twice: for its length and for its move.
    """
    dtype = x_ptr.dtype.element_ty
    if READ_SCALE:
        scale = tl.load(scale_ptr)
    scale = tl.full((1,), scale, dtype)
    lo = tl.full((1,), lo, dtype)
    hi = tl.full((1,), hi, dtype)
    if KIND == "l2":
        n = tl.program_id(0)
        image = image_of(images_ptr, n, NUMBERED)
        begin = 0
        squares = tl.zeros((4 * GROUPS,), dtype)
        for tile in range(TILES):
            z = draw(tile * GROUPS, image, state_ptr, pixels, KIND, CHANNELS, FOURS, GROUPS).to(dtype)
            _, exists = elements(tile * GROUPS, row, pixels, CHANNELS, FOURS, GROUPS)
            squares += tl.where(exists, z * z, 0.0)
        length = tl.sqrt(tl.sum(squares, axis=0))
        counter = tl.load(state_ptr + 1).to(tl.uint64, bitcast=True)
        seed = tl.load(state_ptr).to(tl.uint64, bitcast=True)
        word, _, _, _ = philox(
            tl.full((1,), 0xFFFFFFFF, tl.uint32),
            image,
            counter.to(tl.uint32),
            (counter >> 32).to(tl.uint32),
            seed.to(tl.uint32),
            (seed >> 32).to(tl.uint32),
        )
        # A direction of length 0 stays 0.
        scale = scale * unit_uniform(word).to(dtype) / tl.maximum(length, 1e-20)
    else:
        blocks = tl.cdiv(tl.cdiv(row, 4), GROUPS)
        n = tl.program_id(0) // blocks
        image = image_of(images_ptr, n, NUMBERED)
        begin = (tl.program_id(0) % blocks) * GROUPS
    base = n.to(tl.int64) * row
    for tile in range(TILES):
        first = begin + tile * GROUPS
        z = draw(first, image, state_ptr, pixels, KIND, CHANNELS, FOURS, GROUPS).to(dtype)
        element, exists = elements(first, row, pixels, CHANNELS, FOURS, GROUPS)
        x = tl.load(x_ptr + base + element, mask=exists)
        x = x + scale * z
        if KIND != "gaussian":
            x = tl.where(x < lo, lo, x)
            x = tl.where(x > hi, hi, x)
        tl.store(out_ptr + base + element, x, mask=exists)


def random_start(
    x: Tensor,
    state: Tensor,
    kind: int,
    scale: float,
    lo: float,
    hi: float,
    images: Tensor | None = None,
    device_scale: Tensor | None = None,
) -> Tensor:
    """Launch the kernel on the current stream; returns the moved images with the layout of `x`.

    x must be contiguous or channels-last, its images below 2^31 elements; `images` contiguous.
    """
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    count = x.shape[0]
    row = x.numel() // count
    channels = 1 if x.is_contiguous() else x.shape[1]
    pixels = row // channels
    tiles = triton.cdiv(row, 4 * GROUPS)
    whole = KINDS[kind] == "l2"
    with on_device_of(x):
        random_start_kernel[(count if whole else count * tiles,)](
            x,
            state,
            images if images is not None else state,
            out,
            row,
            pixels,
            scale,
            lo,
            hi,
            scale_ptr=state if device_scale is None else device_scale,
            READ_SCALE=device_scale is not None,
            KIND=KINDS[kind],
            CHANNELS=channels,
            FOURS=pixels % 4 == 0,
            NUMBERED=images is not None,
            TILES=tiles if whole else 1,
            GROUPS=GROUPS,
            enable_fp_fusion=False,
        )
    return out
