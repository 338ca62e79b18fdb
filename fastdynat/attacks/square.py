"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search without gradients.

A query changes a random square of an image's best perturbation, and is kept if it lowers the margin. A
rejected query changes nothing, so several queries of an image go into one forward pass, all from the same
best perturbation; those after the first accepted one are repeated. Every image sees the same sequence as with
one query at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.lengths import per_image
from fastdynat.attack_engine.shrinking_batch import Tick, no_tick
from fastdynat.attacks.plane_search import NORMS
from fastdynat.attacks.registry import register
from fastdynat.attacks.square_judge import Judge, Queries
from fastdynat.attacks.square_proposals import Draws, proposal
from fastdynat.errors import UserError, unknown_name
from fastdynat.models.logits import predicted_classes
from fastdynat.ops.image_draws import Randomness

# Most queries of an image in one pass.
MOST_ABREAST = 64
# On the CPU larger batches save little, and repeated queries are lost time.
FULL_BATCH = {"cpu": 256}
# The initial acceptance rate, and the weight of the old estimate in each update.
FIRST_RATE, MEMORY = 0.2, 0.9


@register(
    r"square(?P<queries>\d+)?",
    help={"square": "Square Attack (Andriushchenko et al. 2020), 5000 queries, no gradients; squareQ"},
    norms=("linf", "l2", "l1"),
)
@dataclass(frozen=True, kw_only=True)
class Square:
    """Square Attack on images that are classified correctly; minimises the margin.

    Attributes:
        eps: radius of the ball, in [0, 1] pixel units.
        norm: linf, l2 or l1.
        queries: proposals per image.
        p_init: share of the image that the first squares cover; later squares are smaller.
        places: batch size to fill with queries when fewer images are still robust; 0 is the batch size of the
            call, on the CPU 256.
    """

    eps: float
    norm: str = "linf"
    queries: int = 5000
    p_init: float = 0.8
    places: int = 0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm of Square", self.norm, NORMS)
        if self.eps <= 0:
            raise UserError(f"eps of Square must be above 0 (pixel units), got {self.eps:g}; write 8/255")
        if self.queries < 1 or self.places < 0:
            raise UserError(
                f"Square needs queries >= 1 and places >= 0, got {self.queries} and {self.places}"
            )
        if not 0 < self.p_init <= 1:
            raise UserError(f"p_init of Square must be in (0, 1], got {self.p_init:g}; the paper takes 0.8")

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: Randomness = None,
        tick: Tick = no_tick,
    ) -> AttackResult:
        """See `Attack`. `x_adv` is the image with the smallest margin found."""
        return self.run(
            ascent,
            x,
            labels,
            Draws.draw(x, self.norm, self.queries, self.p_init, generator=generator),
            tick=tick,
        )

    @torch.no_grad()
    def run(
        self, ascent: Ascent, x: Tensor, labels: Tensor, draws: Draws, *, tick: Tick = no_tick
    ) -> AttackResult:
        """The search with given `draws`, one row per image of `x`."""
        x = x.contiguous()
        propose = proposal(self.norm, x, self.eps, draws)
        places = self.places or FULL_BATCH.get(x.device.type, len(x))
        judge = Judge(ascent, propose, max(places, len(x)))
        # A tie may count for the label, so it is attacked too.
        right = _with_ties_settled(ascent, x, labels, judge(x, labels)) >= 0
        rows = right.nonzero().squeeze(1)
        if len(rows) == 0:  # not every network takes a batch without images
            return _result(x.clone())
        x_adv = torch.where(per_image(right, x), propose.start(), x)
        begin = x_adv[rows]
        search = _Search(rows, labels[rows], begin, judge(begin, labels[rows]), torch.zeros_like(rows))
        rate = FIRST_RATE
        while True:
            margin = _with_ties_settled(ascent, search.best, search.labels, search.margin)
            search = replace(search, margin=margin)
            standing = (search.margin >= 0) & (search.asked < self.queries)
            left, first = torch.stack(
                [standing.sum(), search.asked.amin()]
            ).tolist()  # waits for the device once
            if left < len(search.rows):
                x_adv[search.rows] = search.best
                search = search.take(standing)
                judge.keep(standing)
            if left == 0:
                break
            tick(first / self.queries)
            search, rate = self._round(judge, search, _abreast(places, left, rate), rate, first)
        tick(1.0)
        return _result(x_adv)

    def _round(
        self, judge: Judge, search: "_Search", abreast: int, rate: float, first: int
    ) -> tuple["_Search", float]:
        """The next `abreast` queries of each image, up to the first accepted one.

        first: the lowest number of queries so far.
        """
        n, position = len(search.rows), torch.arange(len(search.rows), device=search.rows.device)
        ahead = search.asked[:, None] + torch.arange(abreast, device=search.rows.device)
        exists, query = ahead < self.queries, ahead.clamp_max(self.queries - 1).flatten()
        row = position.repeat_interleave(abreast) if abreast > 1 else position
        asked = judge.ask(search.best, search.labels, Queries(row, search.rows[row], query, first))
        found = asked.margin.view(n, abreast)
        kept = (found < search.margin[:, None]) & exists
        some, chosen = kept.any(1), kept.int().argmax(1)
        if abreast > 1:
            rate = MEMORY * rate + (1 - MEMORY) * float(some.sum()) / len(row)
        return replace(
            search,
            best=judge.accept(search.best, asked, some, position * abreast + chosen),
            margin=torch.where(some, found[position, chosen], search.margin),
            asked=torch.where(some, search.asked + chosen + 1, search.asked + abreast).clamp_max(
                self.queries
            ),
        ), rate


@dataclass(frozen=True)
class _Search:
    """State of the search on the images that are still robust."""

    rows: Tensor  # (n,) their rows in the batch
    labels: Tensor
    best: Tensor  # the best perturbed images
    margin: Tensor  # theirs, z_y - max_{k != y} z_k
    asked: Tensor  # (n,) int64: number of queries so far

    def take(self, mask: Tensor) -> "_Search":
        parts: Iterator[Tensor] = (
            part[mask] for part in (self.rows, self.labels, self.best, self.margin, self.asked)
        )
        return _Search(*parts)


def _result(x_adv: Tensor) -> AttackResult:
    return AttackResult(x_adv, torch.zeros((), dtype=torch.int64, device=x_adv.device), 0)


def _with_ties_settled(ascent: Ascent, x: Tensor, labels: Tensor, margin: Tensor) -> Tensor:
    """`margin` (n,), 0 where it is negative only by the rounding of a replica, whose network is right.

    Not on a GPU, where counting these images would wait for the device, unless the ascent is `strict`.
    """
    if ascent.judge is None or (x.is_cuda and not ascent.strict):
        return margin
    rows = (margin < 0).nonzero().squeeze(1)
    if len(rows) == 0:
        return margin
    right = predicted_classes(ascent.judge(x[rows])) == labels[rows]
    return margin.index_fill(0, rows[right], 0.0)


def _abreast(places: int, images: int, rate: float) -> int:
    """Number of queries of each image in one pass: as many as fit, but few beyond the next accepted one."""
    return max(1, min(places // images, int(1 / max(rate, 1 / MOST_ABREAST))))
