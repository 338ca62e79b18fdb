"""Random numbers that belong to images: the same alone, in any batch, in any order, on any process."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdynat.ops.random_start import random_start

# Changes whenever equal seeds draw other numbers than before; stored results are then made anew.
VERSION = 1
# Counters between two draws: one draw may stand for a whole attack, which makes this many of its own.
ATTACK = 2**16
NO_IMAGE = 2**32 - 1  # the number under which draws are made that belong to no image
_INT64 = 2**63


@dataclass(frozen=True)
class ImageDraws:
    """A sequence of random draws for each of N images; the n-th depends on `state`, n and the image's number.

    It stands where a ``torch.Generator`` may stand in an attack (`Randomness`). What it draws does not depend
    on the number, the order or the numbers of the other images. Every draw is a function of tensors on the
    device and of the Python number n: a CUDA graph can be captured around it, and draws anew at a replay once
    `state` has been overwritten.

    The number of the next draw counts up like a generator's state, from 0 in a new object. `take` gives the
    draws of some of the images, which go on in the same sequence as those of all: restarts that attack fewer
    and fewer images draw the numbers that they would draw on all of them. Two pieces of a batch that should
    both draw what the whole batch would have drawn need an object each.

    Attributes:
        state: int64 (2,), key and counter of Philox4x32-10 (`random_start`). Read, never written.
        images: int64 (N,) on the same device, the images' numbers in their data set, in [0, 2^32 - 1). Equal
            numbers draw equally. Of others the low 32 bits count.
        stride: counters from one draw to the next: `ATTACK`, or 1 inside one attack (`fork`).
        numbers: the numbers of the draws to come, from 0 unless given.
    """

    state: Tensor
    images: Tensor
    stride: int = ATTACK
    numbers: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.state.shape != (2,) or self.state.dtype != torch.int64:
            raise ValueError(
                f"ImageDraws: state must be int64 (2,), got {self.state.dtype} {tuple(self.state.shape)}"
            )
        if self.images.dim() != 1 or self.images.dtype != torch.int64:
            raise ValueError(
                f"ImageDraws: images must be int64 (N,), got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.state.device != self.images.device:
            raise ValueError(
                f"ImageDraws: state is on {self.state.device} but images is on {self.images.device}"
            )

    @classmethod
    def of(
        cls,
        seed: int,
        images: Tensor | Sequence[int],
        device: torch.device | str,
        *,
        counter: int = 0,
    ) -> "ImageDraws":
        """Draws of `seed`, any integer (of which the low 64 bits count), for images of these numbers."""
        state = torch.tensor([_int64(seed), _int64(counter)], dtype=torch.int64, device=device)
        return cls(state, torch.as_tensor(images, dtype=torch.int64, device=device))

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def next_state(self) -> Tensor:
        """The state (2,) of the next draw, for an operator such as `random_start`; a new tensor."""
        return self._at(next(self.numbers) * self.stride)

    def _at(self, beyond: int) -> Tensor:
        return torch.stack([self.state[0], self.state[1] + beyond])

    def take(self, rows: Tensor | slice) -> "ImageDraws":
        """The draws of the images in `rows` (int64 indices, (N,) bool or a slice), in the same sequence."""
        return ImageDraws(self.state, self.images[rows], self.stride, self.numbers)

    def fork(self) -> "ImageDraws":
        """The next draw as a sequence of its own, numbered from 0: the draws of one attack, at most 65536.

        A captured attack takes its `state` and `images` as inputs. However much the attack draws, the draws
        that follow it are the same.

        Raises:
            ValueError: this is such a sequence.
        """
        if self.stride == 1:
            raise ValueError("ImageDraws: the draws of one attack cannot be divided again")
        return ImageDraws(self.next_state(), self.images, 1)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape) multiples of 2^-24, uniform in [0, 1)."""
        return self._uniform(self.images, shape, dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape) standard normal numbers, drawn in float32."""
        return self._noise(self.images, "gaussian", shape, dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """(N, *shape) int64, uniform in [0, high) up to a relative high / 2^24; high is at most 2^24."""
        if not 0 < high <= 2**24:
            raise ValueError(f"ImageDraws: high must be in [1, 2^24], got {high}")
        return (self.uniform(*shape, dtype=torch.float64) * high).long()

    def shared_uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(*shape) numbers as `uniform` gives, that belong to no image: the same for any images."""
        nobody = torch.full((1,), NO_IMAGE, dtype=torch.int64, device=self.images.device)
        return self._uniform(nobody, shape, dtype)[0]

    def generator(self) -> torch.Generator:
        """A generator seeded from the next draw and the first image, for code that takes no other source.

        What it gives depends on the batch: on which image is first, and on the number and order of the images
        for all but the first of them. Waits for the device.
        """
        numbers = [*self.next_state().tolist(), *self.images[:1].tolist()]
        seed = int.from_bytes(hashlib.sha256(str(numbers).encode()).digest()[:8], "little", signed=True)
        return torch.Generator(self.images.device).manual_seed(seed)

    def _uniform(self, images: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Exact: the operator gives 2 u - 1 for u in steps of 2^-24.
        return self._noise(images, "uniform", shape, dtype).add_(1).mul_(0.5)

    def _noise(self, images: Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        zero = torch.zeros(len(images), math.prod(shape), dtype=dtype, device=images.device)
        noise = random_start(zero, self.next_state(), images=images, kind=kind, scale=1.0, lo=-1.0)
        return noise.view(len(images), *shape)


# The source of an attack's random numbers: a generator, which draws for the batch as a whole; draws of each
# image; None is torch's global generator.
Randomness = torch.Generator | ImageDraws | None


def next_state(source: Randomness, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State and image numbers of the next draw from `source`, for `random_start`."""
    if isinstance(source, ImageDraws):
        return source.next_state(), source.images
    # Drawn on the device, so seeding, saving and capturing torch's generator covers the operator's too.
    return torch.randint(2**62, (2,), generator=source, device=device), None


def uniform_like(x: Tensor, source: Randomness, *shape: int) -> Tensor:
    """(N, *shape) uniform in [0, 1), in dtype and on the device of `x` (N, ...)."""
    if isinstance(source, ImageDraws):
        return source.uniform(*shape, dtype=x.dtype)
    return torch.rand(len(x), *shape, generator=source, device=x.device, dtype=x.dtype)


def normal_like(x: Tensor, source: Randomness, *shape: int) -> Tensor:
    """(N, *shape) standard normal numbers, in dtype and on the device of `x` (N, ...)."""
    if isinstance(source, ImageDraws):
        return source.normal(*shape, dtype=x.dtype)
    return torch.randn(len(x), *shape, generator=source, device=x.device, dtype=x.dtype)


def _int64(value: int) -> int:
    """`value` modulo 2^64, as a signed number."""
    return (value + _INT64) % (2 * _INT64) - _INT64
