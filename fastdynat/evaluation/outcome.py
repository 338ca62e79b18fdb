"""The result of an evaluation under one attack, image by image, with its statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from fastdynat.documents import DocumentError
from fastdynat.documents.numbers import Count, Finite, Positive, Share

Distance = Annotated[float, Meta(ge=0)]
Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One cell of an evaluation table; plain JSON values.

    Attributes:
        accuracy: share of all images classified correctly after the attack, in [0, 1].
        ci: its 95 % confidence interval over images (`wilson`).
        per_class: accuracy of each class; None for a class without images.
        robust_bits: the images classified correctly after the attack (`unpack_bits`), in the test set's
            order.
        zero_grad_share: share of the attack's image gradients that were zero in every pixel; None for clean
            accuracy.
        distances: of a minimum-norm attack, each image's distance in its norm; 0 for a misclassified clean
            image, None where nothing was found. None for other attacks.
        images_per_s: images that were attacked, per second; all images where stages are taken as one attack.
        batch_size: images per batch, after halvings when memory ran out.
        gradients: image gradients that the attack computed, those that `zero_grad_share` is a share of; None
            where they were not counted.
    """

    attack: str
    accuracy: Share
    ci: tuple[Share, Share]
    per_class: list[Share | None]
    robust_bits: str
    correct: Count
    images: Positive
    seconds: Finite
    images_per_s: float
    zero_grad_share: Share | None
    distances: list[Distance | None] | None
    batch_size: Positive
    gradients: Count | None = None

    @property
    def zero_grads(self) -> int:
        """The number of image gradients that were zero in every pixel; 0 where they were not counted."""
        return round((self.zero_grad_share or 0.0) * (self.gradients or 0))

    def check(self, origin: str) -> "Measurement":
        """This measurement, or DocumentError if its numbers disagree. `origin` names its file."""
        if len(self.robust_bits) != 2 * (-(-self.images // 8)) or set(self.robust_bits) - set(
            "0123456789abcdef"
        ):
            raise DocumentError(
                f"{origin}: robust_bits are not those of {self.images} images: it was damaged or edited"
            )
        correct = int(unpack_bits(self.robust_bits, self.images).sum())
        if correct != self.correct or self.accuracy != correct / self.images:
            raise DocumentError(f"{origin}: its accuracy is not that of its images: it was damaged or edited")
        if self.distances is not None and len(self.distances) != self.images:
            raise DocumentError(
                f"{origin}: {len(self.distances)} distances of {self.images} images: it was damaged or edited"
            )
        return self

    @classmethod
    def of(
        cls,
        attack: str,
        robust: Tensor,
        labels: Tensor,
        *,
        classes: int,
        seconds: float,
        batch_size: int,
        zero_grad_share: float | None = None,
        gradients: int | None = None,
        distances: Tensor | None = None,
        attacked: int | None = None,
    ) -> "Measurement":
        """From the images that stay correct, `robust` (N,) bool, and `distances` (N,), infinite if none
        found.

        attacked: how many of the N images `seconds` were spent on; None is all.
        """
        correct, total = int(robust.sum()), len(robust)
        return cls(
            attack=attack,
            accuracy=correct / total,
            ci=wilson(correct, total),
            per_class=class_accuracies(robust, labels, classes),
            robust_bits=pack_bits(robust),
            correct=correct,
            images=total,
            seconds=seconds,
            # Of networks that are right about no image, the reference AutoAttack attacks none, in no time.
            images_per_s=(total if attacked is None else attacked) / seconds if seconds > 0 else 0.0,
            zero_grad_share=zero_grad_share,
            distances=None if distances is None else [d if isfinite(d) else None for d in distances.tolist()],
            batch_size=batch_size,
            gradients=gradients,
        )


def zero_gradients(parts: Sequence[Measurement]) -> tuple[float | None, int | None]:
    """The share of zero gradients among those of all `parts`, and the number of these gradients.

    Parts whose gradients were not counted, as those of several stages, are taken to be equally large.
    """
    shares = [part.zero_grad_share for part in parts if part.zero_grad_share is not None]
    gradients = sum(part.gradients or 0 for part in parts)
    if all(part.gradients for part in parts if part.zero_grad_share is not None):
        return (sum(part.zero_grads for part in parts) / gradients, gradients) if gradients else (None, None)
    return sum(shares) / len(shares), None


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927), never empty and never outside [0, 1]."""
    share, spread = correct / total, Z95**2 / total
    half = Z95 * sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    # Rounding may leave the end of the range by an ulp.
    return (0.0 if correct == 0 else low), (1.0 if correct == total else high)


def class_accuracies(robust: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """The share of `robust` (N,) bool among the images of each class; None for a class without images."""
    total = torch.bincount(labels, minlength=classes)
    correct = torch.bincount(labels[robust], minlength=classes)
    return [c / t if t else None for c, t in zip(correct.tolist(), total.tolist(), strict=True)]


def pack_bits(mask: Tensor) -> str:
    """A (N,) bool tensor as N / 4 hexadecimal digits, the first image in the highest bit."""
    return np.packbits(mask.cpu().numpy()).tobytes().hex()


def unpack_bits(bits: str, images: int) -> Tensor:
    """The inverse of `pack_bits`: (N,) bool."""
    return torch.from_numpy(
        np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=images).astype(bool)
    )
