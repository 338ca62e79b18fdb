"""Every attack does the same to an image alone, in any batch, in any order and in any shard."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attacks import MIM, NamedAttack, Nearest, RestartedPGD, Square, Tick, no_tick, parse_attack
from fastdynat.attacks.registry import entries
from fastdynat.data import ImageSet
from fastdynat.evaluation import measure
from fastdynat.evaluation.autoattack import AutoAttack
from fastdynat.evaluation.outcome import unpack_bits
from fastdynat.ops.image_draws import ImageDraws

N, SEED = 64, 5
EPS = {"linf": 0.05, "l2": 0.5, "l1": 4.0, "l0": 6.0}
ATTACKS = [
    ("fgsm-rs", "linf"),
    ("fgsm-small", "l2"),
    ("bim3", "linf"),
    ("mim3", "l2"),
    ("pgd3-3", "linf"),
    ("pgd3-3", "l2"),
    ("pgd3-3", "l1"),
    ("pgd3", "l0"),
    ("pgd3-2@random", "linf"),
    ("cw3-2@all", "linf"),
    ("apgd-ce6-2", "linf"),
    ("apgd-dlr6-2", "l2"),
    ("apgd-t6", "l1"),
    ("fab-2", "linf"),
    ("fab-t-min-2", "l2"),
    ("square60", "linf"),
    ("square60", "l2"),
    ("square60", "l1"),
    ("deepfool5", "l2"),
    ("cwl2-2x20", "l2"),
    ("sigmazero20", "l0"),
]
IDS = [f"{name} {norm}" for name, norm in ATTACKS]


def named(name: str, norm: str) -> NamedAttack:
    attack = parse_attack(name, eps=EPS[norm], step_size=EPS[norm] / 3, norm=norm)
    search: Any = attack.search
    if hasattr(search, "steps") and search.steps == 100:
        search = replace(search, steps=8)
    return replace(attack, search=search)


@dataclass(frozen=True)
class Case:
    model: nn.Module
    x: Tensor
    labels: Tensor


def case() -> Case:
    model = tiny_cnn(0, dtype=torch.float64).eval()
    x = torch.randint(256, (N, 3, 8, 8), generator=torch.Generator().manual_seed(2)).double() / 255
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[::7] = (labels[::7] + 1) % 10  # some are misclassified as they are
    return Case(model, x, labels)


CASE = case()


def run(attack: NamedAttack, rows: Tensor) -> AttackResult:
    """The attack on some of the images, in this order, in one batch."""
    draws = ImageDraws.of(SEED, rows, "cpu")
    return attack.run(Ascent(CASE.model), CASE.x[rows], CASE.labels[rows], draws=draws)


def test_every_registered_attack_is_here() -> None:
    for entry in entries():
        if entry.module.startswith("fastdynat."):
            assert any(entry.match(name) for name, _ in ATTACKS), entry.pattern


@pytest.mark.parametrize(("name", "norm"), ATTACKS, ids=IDS)
def test_batches_order_and_shards_do_not_matter(name: str, norm: str) -> None:
    attack = named(name, norm)
    whole = run(attack, torch.arange(N))
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    divisions = {
        "alone": [torch.tensor([row]) for row in range(0, N, 9)],
        "batches of 7": list(torch.arange(N).split(7)),
        "shards": [torch.arange(N)[k::3] for k in range(3)],
        "any order": list(shuffled.split(30)),
    }
    for how, parts in divisions.items():
        for rows in parts:
            part = run(attack, rows)
            torch.testing.assert_close(part.x_adv, whole.x_adv[rows], rtol=0, atol=1e-9, msg=how)
            if isinstance(part, Nearest):
                assert isinstance(whole, Nearest)
                assert torch.equal(part.found, whole.found[rows]), how


@settings(deadline=None, max_examples=15)
@given(rows=st.lists(st.integers(0, N - 1), min_size=1, max_size=12, unique=True))
def test_any_choice_of_images_is_attacked_as_in_the_whole(rows: list[int]) -> None:
    for name in ("pgd3-3", "square60"):
        attack = named(name, "linf")
        part, whole = run(attack, torch.tensor(rows)), run(attack, torch.arange(N))
        torch.testing.assert_close(part.x_adv, whole.x_adv[rows], rtol=0, atol=1e-9)


def test_seeds_and_images_do_matter() -> None:
    attack, rows = named("pgd3", "linf"), torch.arange(4)
    x, labels, ascent = CASE.x[rows], CASE.labels[rows], Ascent(CASE.model)
    found = [
        attack.run(ascent, x, labels, draws=ImageDraws.of(seed, rows + first, "cpu")).x_adv
        for seed, first in ((SEED, 0), (SEED + 1, 0), (SEED, 4))
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["clean", "pgd3-2", "apgd-ce6", "square60", "fab"])
def test_a_measurement_is_that_of_any_batch_size_and_of_shards(name: str) -> None:
    images = ImageSet((CASE.x * 255).round().to(torch.uint8), CASE.labels)
    model, attack = tiny_cnn(0).eval(), named(name, "linf")

    def robust(images: ImageSet, size: int, **options: Any) -> Tensor:
        how = {"device": torch.device("cpu"), "seed": SEED, "batch_size": size}
        return unpack_bits(measure(model, images, attack, **how, **options).robust_bits, len(images))

    whole = robust(images, N)
    assert 0 < int(whole.sum()) < N
    assert all(torch.equal(robust(images, size), whole) for size in (1, 7))
    for first in range(3):
        rows = torch.arange(N)[first::3]
        shard = ImageSet(images.images[rows], images.labels[rows])
        assert torch.equal(robust(shard, 10, numbers=rows), whole[rows])
        standing = torch.zeros(N, dtype=torch.bool).index_fill(0, rows, True)
        assert torch.equal(robust(images, 5, standing=standing), whole & standing)
        standing = torch.arange(len(rows)) % 2 == 0
        assert torch.equal(robust(shard, 4, standing=standing, numbers=rows), whole[rows] & standing)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_is_that_of_any_batch_size(norm: str) -> None:
    found = []
    for size in (1, 7, N):
        evaluation = AutoAttack(
            CASE.model,
            norm,
            EPS[norm],
            seed=SEED,
            verbose=False,
            version="custom",
            attacks=["apgd-ce", "square"],
        )
        evaluation.stages = [named("apgd-ce6-2", norm), named("square60", norm)]
        found.append(evaluation.run_standard_evaluation(CASE.x[:40], CASE.labels[:40], bs=size))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-9)


@dataclass(frozen=True)
class Wobble:
    """An attack of a user: one draw from the generator for each batch."""

    norm: str = "linf"

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        tick: Tick = no_tick,
    ) -> Tensor:
        assert isinstance(generator, torch.Generator)
        return x + torch.rand(x.shape, generator=generator, dtype=x.dtype)


class Derived(Square):
    """Squares of a user who overrides the call."""

    __call__: Callable[..., Any] = Wobble.__call__


class Slower(MIM):
    """A user's class that leaves the call as it is."""


def test_attacks_of_others_are_given_a_generator_seeded_from_the_first_image() -> None:
    pgd = named("pgd3", "linf").search
    assert isinstance(pgd, RestartedPGD)
    ours = [NamedAttack("clean"), NamedAttack("pgd3", pgd), NamedAttack("slower", Slower("ce", pgd.spec))]
    assert all(attack.draws_per_image for attack in ours)
    theirs = NamedAttack("wobble", Wobble())
    assert not theirs.draws_per_image
    assert not NamedAttack("derived", Derived(eps=0.1)).draws_per_image
    moved = [run(theirs, torch.tensor(rows)).x_adv - CASE.x[rows] for rows in ([3, 4], [3, 9], [4, 3])]
    torch.testing.assert_close(moved[0], moved[1])
    assert (moved[0].flip(0) - moved[2]).abs().max() > 0.1
