"""Permutations of any number of images as functions of a key: single places of them, without the rest."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from fastdynat.data.split import seeded_generator

DRAWN = 2**20  # of at most so many numbers the whole permutation is drawn; it takes 8 MiB
ROUNDS = 8


def permuted(places: Tensor, count: int, *key: int | str) -> Tensor:
    """Numbers at `places`, int64 in [0, count), of a permutation of 0..count-1 that `key` alone decides.

    Up to `DRAWN` numbers it is `torch.randperm`'s. For more it is a Feistel network on the next even number
    of bits, walked along its cycles until it is back in range, so the memory is that of `places`.
    """
    if count <= DRAWN:
        return torch.randperm(count, generator=seeded_generator(*key))[places]
    half = ((count - 1).bit_length() + 1) // 2
    keys = [_round_key(number, *key) for number in range(ROUNDS)]
    values = _feistel(places.numpy().astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(values >= count)):
        values[outside] = _feistel(values[outside], half, keys)
    return torch.from_numpy(values.astype(np.int64))


def _round_key(number: int, *key: int | str) -> np.uint64:
    digest = hashlib.blake2s(repr((key, number)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _feistel(values: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    """`values`, uint64 below 4**half, through a bijection of that range."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
