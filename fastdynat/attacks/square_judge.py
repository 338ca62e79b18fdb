"""Margins of the Square Attack's queries, by whole forward passes or only where a query changed the maps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import margin, wide
from fastdynat.attack_engine.patch_forward import PatchForward
from fastdynat.attack_engine.patch_maps import Squares
from fastdynat.attack_engine.shrinking_batch import HALVINGS, replace_rows
from fastdynat.attacks.square_proposals import Change, Colours, Proposal, paste

# Batch sizes are multiples of the largest over this number, where each new size costs (`HALVINGS`).
GRAINS = 16
# Largest difference between the two ways to compute logits, as a share of their range; beyond it the network
# does something else than its trace.
SAME = 1e-4


@dataclass(frozen=True)
class Queries:
    """Queries of one pass.

    Attributes:
        rows: (m,) int64, rows of the best images that they change.
        images: (m,) int64, the numbers of these images in the batch.
        numbers: (m,) int64, which queries.
        first: no number is below it.
    """

    rows: Tensor
    images: Tensor
    numbers: Tensor
    first: int


@dataclass(frozen=True)
class Asked:
    """The answers of one pass.

    Attributes:
        margin: (m,) ``z_y - max_{k != y} z_k``.
        images: (m, C, H, W) of the queries; None where `change` says what they change.
        change: see `images`.
    """

    margin: Tensor
    images: Tensor | None = None
    change: Change | None = None


class Judge:
    """Margins z_y - max_{k != y} z_k of at most `most` images at a time.

    Where each new batch size costs, batches are padded to few sizes with copies of the last image.
    """

    def __init__(self, ascent: Ascent, proposal: Proposal, most: int) -> None:
        self._ascent, self._proposal, self._most = ascent, proposal, most
        self._patches: PatchForward | None = None
        if isinstance(proposal, Colours) and ascent.dtype is None and ascent.max_halvings == 0:
            self._patches = PatchForward.of(ascent.network, proposal.x)
        self._side = 0
        self._verified = False

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """x: (n, C, H, W). labels: (n,)."""
        n = len(x)
        if HALVINGS.get(x.device.type):
            grain = -(-self._most // GRAINS)
            size = max(n, min(-(-n // grain) * grain, self._most))
            x = torch.cat([x, x[-1:].expand(size - n, *x.shape[1:])]) if size > n else x
        return self._margin(self._ascent.logits(self._ascent.to_model_input(x))[:n], labels)

    def keep(self, mask: Tensor) -> None:
        """Go on with the best images `mask` (n,) bool."""
        if self._patches is not None:
            self._patches.keep(mask.nonzero().squeeze(1))

    def ask(self, best: Tensor, labels: Tensor, queries: Queries) -> Asked:
        """best: (n, C, H, W). labels: (n,)."""
        own = labels[queries.rows]
        if isinstance(self._proposal, Colours):
            change = self._proposal.change(best, queries.rows, queries.images, queries.numbers, queries.first)
            return Asked(self._of_change(best, own, queries, change), change=change)
        images = best if len(best) == len(own) else best[queries.rows]
        images = self._proposal.query(images, queries.images, queries.numbers, queries.first)
        return Asked(self(images, own), images=images)

    def accept(self, best: Tensor, asked: Asked, some: Tensor, chosen: Tensor) -> Tensor:
        """`best` with the images of queries `chosen` (n,) where `some` (n,)."""
        change = asked.change
        if change is None:
            assert asked.images is not None
            return replace_rows(best, some, asked.images[chosen])
        if best.is_cuda:  # counting the rows would synchronise
            return torch.where(some.view(-1, 1, 1, 1), paste(best, change.take(chosen)), best)
        rows = some.nonzero().squeeze(1)
        if len(rows) == 0:
            return best
        if self._patches is not None and self._patches.side is not None:
            self._patches.accept(chosen[rows])
        return best.index_copy_(0, rows, paste(best[rows], change.take(chosen[rows])))

    def _of_change(self, best: Tensor, labels: Tensor, queries: Queries, change: Change) -> Tensor:
        patches, side = self._patches, change.pixels.shape[-1]
        if patches is not None and side != self._side:
            self._side, self._verified = side, False
            patches.begin(best, side, self._most)
        if patches is None or patches.side is None:
            rows = queries.rows
            return self(paste(best if len(best) == len(rows) else best[rows], change), labels)
        try:
            found = wide(patches.logits(change.pixels, Squares(queries.rows, change.top, change.left)))
        except Exception:  # of layers of all kinds
            if self._verified:
                raise
            patches.disable()
            return self(paste(best[queries.rows], change), labels)
        if not self._verified:  # once for each size
            whole = wide(self._ascent.logits(self._ascent.to_model_input(paste(best[queries.rows], change))))
            range_ = whole.amax(1) - whole.amin(1)
            if not bool(((found - whole).abs().amax(1) <= SAME * range_).all()):
                patches.disable()
                found = whole
            self._verified = True
        return self._margin(found, labels)

    @staticmethod
    def _margin(logits: Tensor, labels: Tensor) -> Tensor:
        return -margin(wide(logits), labels)
