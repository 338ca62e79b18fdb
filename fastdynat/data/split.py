"""Choose held-out and limited subsets that keep the share of every class, deterministic in a seed."""

import hashlib

import torch
from torch import Tensor

from fastdynat.errors import UserError

DEFAULT_VAL_IMAGES = 1000  # what Rice et al. 2020 and its successors hold out of CIFAR-10


def seeded_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator whose stream depends on the whole key; the global random state is not involved.

    The key is hashed because PyTorch's CPU generator uses 32 bits of its seed, and because neighbouring seeds
    must not give related streams.
    """
    digest = hashlib.blake2s(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def stratified_split(
    labels: Tensor, *, val_size: int | float | None, limit: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Return (train, val) indices, int64, ascending, disjoint, every class in proportion (within one image).

    Args:
        labels: int64 (N,) classes of the whole training split.
        val_size: Number of validation images, or a float in (0, 1) as their share. 0 means none. None means
            1,000, or 10 % of fewer than 10,000 images.
        limit: Keep at most this many of the remaining images for training; the choice of validation images
            does not depend on it, and a smaller limit keeps a subset of what a larger one keeps, up to
            rounding. None keeps all.
        seed: The choice depends on the labels and this number only.

    Raises: UserError where some class would have no training image left, or a share is less than an image.
    """
    counts = torch.bincount(labels).tolist()
    present = sum(count > 0 for count in counts)
    num_val = _num_val(val_size, len(labels), present)
    val_counts = _apportion(
        num_val, counts, low=[0] * len(counts), high=[max(count - 1, 0) for count in counts]
    )
    left = [count - taken for count, taken in zip(counts, val_counts, strict=True)]
    keep_counts = left
    if limit is not None and limit < sum(left):
        if limit < present:
            raise UserError(
                f"limit {limit} leaves some of the {present} classes without a training image; use more"
            )
        keep_counts = _apportion(limit, left, low=[min(count, 1) for count in left], high=left)

    generator = seeded_generator("split", seed)
    train, val = [], []
    for label, (num_held_out, num_kept) in enumerate(zip(val_counts, keep_counts, strict=True)):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        val.append(members[:num_held_out])
        train.append(members[num_held_out : num_held_out + num_kept])
    return torch.cat(train).sort().values, torch.cat(val).sort().values


def _num_val(val_size: int | float | None, num_images: int, present: int) -> int:
    if val_size is not None:
        told = f"val_size {val_size:g}"
    elif num_images >= 10 * DEFAULT_VAL_IMAGES:
        val_size, told = DEFAULT_VAL_IMAGES, f"the default of val_size ({DEFAULT_VAL_IMAGES:,} images)"
    else:
        val_size, told = 0.1, "the default of val_size (10 %)"
    if isinstance(val_size, float) and val_size != 0 and not 0 < val_size < 1:
        raise UserError(f"val_size {val_size} must be a share in (0, 1) or a whole number of images")
    num_val = round(val_size * num_images) if isinstance(val_size, float) else val_size
    most = num_images - present
    if num_val == 0 and val_size != 0:  # everything that needs validation images would do nothing
        remedy = "1 or more images, or 0" if most else "0"
        raise UserError(
            f"{told} holds none of {num_images} training images out; give --val-size {remedy} to train "
            "without validation"
        )
    if num_val < 0:
        raise UserError(f"val_size {val_size} must not be negative; 0 holds out nothing")
    if num_val > most:
        raise UserError(
            f"{told} holds out {num_val} of {num_images} training images, but each of the {present} classes "
            f"must keep one; give --val-size {most} at most"
        )
    return num_val


def _apportion(total: int, counts: list[int], *, low: list[int], high: list[int]) -> list[int]:
    """Share `total` among classes in proportion to `counts`, each within [low, high], which must allow it."""
    everything = max(sum(counts), 1)
    ideal = [total * count / everything for count in counts]
    shares = [min(max(int(want), lo), hi) for want, lo, hi in zip(ideal, low, high, strict=True)]
    classes = range(len(counts))
    while sum(shares) < total:
        best = max((c for c in classes if shares[c] < high[c]), key=lambda c: ideal[c] - shares[c])
        shares[best] += 1
    while sum(shares) > total:
        best = max((c for c in classes if shares[c] > low[c]), key=lambda c: shares[c] - ideal[c])
        shares[best] -= 1
    return shares
