"""MixUp (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, 1905.04899) of batches.

Who is mixed with whom, and how, depends on (seed, epoch, step) and positions of the global batch, not on the
number of processes: a process that lacks an image's partner loads that as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.config import AugmentationConfig
from fastdynat.data.split import seeded_generator
from fastdynat.distributed.shares import Share

STEPS_OF_WEIGHT = 2**24  # weights are multiples of its inverse, so that they and 1 minus them are exact


@dataclass(frozen=True)
class Blend:
    """The mixing of a group of images.

    Attributes:
        weight: the share of an image's own label, a multiple of 2^-24; the rest is its partner's.
        box: (top, left, bottom, right) of the pixels that are the partner's; None blends all pixels by
            `weight`.
    """

    weight: float
    box: tuple[int, int, int, int] | None = None


UNMIXED = Blend(1.0)


@dataclass(frozen=True)
class Mixing:
    """The mixing of a run's batches.

    A batch is cut into groups of consecutive positions. Each has one `Blend`, as in timm's batch mode. The
    partner of an image is half a group further on, round the group's end: positions are in random order, so
    any fixed pairing is a random one, and this one is on the same rank in most cases (timm's is mirrored).

    Attributes:
        mixup, cutmix: alpha of Beta(alpha, alpha); 0 is off.
        prob: probability that a group is mixed.
        switch_prob: probability of CutMix where both are on.
        groups: groups of a batch.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    groups: int = 1

    @classmethod
    def of(cls, config: AugmentationConfig, num_classes: int) -> "Mixing | None":
        """The mixing that `config` turns on; None where it does not."""
        if not config.mixing:
            return None
        return cls(
            num_classes,
            config.mixup,
            config.cutmix,
            config.mixup_prob,
            config.mixup_switch_prob,
            config.mixup_groups,
        )

    def blends(self, key: Sequence[int], height: int, width: int) -> list[Blend]:
        """The blend of each group of a step; key: seed, epoch and step."""
        random = np.random.default_rng(seeded_generator("mixing", *key).initial_seed())
        return [self._blend(random, height, width) for _ in range(self.groups)]

    def _blend(self, random: np.random.Generator, height: int, width: int) -> Blend:
        mixed, switched, y, x = random.random(4).tolist()
        if mixed >= self.prob:
            return UNMIXED
        cut = self.cutmix > 0 and (self.mixup == 0 or switched < self.switch_prob)
        alpha = self.cutmix if cut else self.mixup
        weight = float(random.beta(alpha, alpha))
        if not cut:
            return Blend(round(weight * STEPS_OF_WEIGHT) / STEPS_OF_WEIGHT)
        # As published: the box is cut at the border, and the weight is what remains of the image.
        sides = [int(side * math.sqrt(1 - weight)) // 2 for side in (height, width)]
        centre = [int(y * height), int(x * width)]
        top, left = (max(0, at - half) for at, half in zip(centre, sides, strict=True))
        bottom = min(height, centre[0] + sides[0])
        right = min(width, centre[1] + sides[1])
        own = 1 - (bottom - top) * (right - left) / (height * width)
        return Blend(round(own * STEPS_OF_WEIGHT) / STEPS_OF_WEIGHT, (top, left, bottom, right))

    def ends(self, total: int) -> list[int]:
        """The first position of each group of a batch of `total` images, and its end."""
        return [total * number // self.groups for number in range(self.groups + 1)]

    def partners(self, share: Share) -> list[int]:
        """The partner of each image of `share`, as a position of the global batch."""
        found = []
        for begin, end in pairwise(self.ends(share.total)):
            half, size = (end - begin) // 2, end - begin
            own = share.positions[share.below(begin) : share.below(end)]
            found += [begin + (position - begin + half) % size for position in own]
        return found

    def needed(self, share: Share) -> list[int]:
        """Positions of the global batch that a process loads: its own ones, then the partners it lacks."""
        own = set(share.positions)
        return [*share.positions, *(p for p in sorted(self.partners(share)) if p not in own)]

    def apply(
        self, x: Tensor, labels: Tensor, share: Share, blends: Sequence[Blend]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the images of `share`.

        Args:
            x: float (m, C, H, W), the images at the positions `needed`.
            labels: int64 (m,), theirs.

        Returns:
            The images (n, C, H, W) in the memory format of `x`; their likeliest class, int64 (n,); the mixed
            labels, float32 (n, K), which sum to 1.
        """
        place = {position: row for row, position in enumerate(self.needed(share))}
        partners = torch.tensor([place[p] for p in self.partners(share)], device=x.device, dtype=torch.int64)
        mixed_x = x[: share.images].clone(memory_format=torch.preserve_format)
        weights = torch.ones(share.images)
        for (begin, end), blend in zip(pairwise(self.ends(share.total)), blends, strict=True):
            rows = slice(share.below(begin), share.below(end))
            weights[rows] = blend.weight
            if blend.box is not None:
                top, left, bottom, right = blend.box
                region = (slice(None), slice(top, bottom), slice(left, right))
                mixed_x[(rows, *region)] = x[(partners[rows], *region)]
            elif blend.weight < 1:
                # Not one fused operation, whose rounding could depend on an element's place in memory.
                mixed_x[rows] = mixed_x[rows] * blend.weight + x[partners[rows]] * (1 - blend.weight)
        own, others = labels[: share.images], labels[partners]
        weight = weights.to(x.device)
        likeliest = torch.where(weight >= 0.5, own, others)
        both = [F.one_hot(which, self.num_classes).float() for which in (own, others)]
        return mixed_x, likeliest, both[0] * weight[:, None] + both[1] * (1 - weight)[:, None]
