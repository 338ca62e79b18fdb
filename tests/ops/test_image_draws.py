"""Draws of images: independent of the batch, reproducible, uniform and normal, and legal in a capture."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdynat.ops.image_draws import (
    ATTACK,
    NO_IMAGE,
    ImageDraws,
    Randomness,
    next_state,
    normal_like,
    uniform_like,
)

SEED = 2**63 + 12345  # beyond int64
NUMBERS = [7, 0, 3, 2**32 - 2, 50_000]


def draws(images: list[int] | Tensor = NUMBERS, seed: int = SEED) -> ImageDraws:
    return ImageDraws.of(seed, images, "cpu")


def everything(source: ImageDraws) -> list[Tensor]:
    """One of each kind of draw per image, in a fixed order."""
    return [
        source.uniform(3, 5),
        source.normal(7),
        source.integers(10),
        source.fork().uniform(4),
        source.uniform(2, dtype=torch.float64),
    ]


def test_an_image_draws_the_same_alone_in_any_batch_and_order() -> None:
    whole = everything(draws())
    order = [4, 2, 0, 3, 1]
    for rows in ([0], [1, 2], [3], order):
        part = everything(draws([NUMBERS[row] for row in rows]))
        for one, all_ in zip(part, whole, strict=True):
            assert torch.equal(one, all_[rows])


def test_draws_of_some_images_go_on_in_the_sequence_of_all() -> None:
    all_, some = draws(), draws()
    rows = torch.tensor([False, True, True, False, True])
    assert torch.equal(some.take(rows).uniform(6), all_.uniform(6)[rows])
    assert torch.equal(some.take(torch.tensor([4, 1])).normal(6), all_.normal(6)[[4, 1]])
    assert torch.equal(some.uniform(6), all_.uniform(6))


def test_the_draws_after_a_fork_do_not_depend_on_what_it_drew() -> None:
    idle, busy = draws(), draws()
    idle.fork()
    fork = busy.fork()
    first = [fork.uniform(3) for _ in range(4)]
    assert len({tuple(values.flatten().tolist()) for values in first}) == 4
    assert torch.equal(idle.uniform(3), busy.uniform(3))
    with pytest.raises(ValueError, match="cannot be divided again"):
        fork.fork()


def test_no_two_draws_are_equal() -> None:
    source, other = draws(), draws(seed=SEED + 1)
    found = [source.uniform(4), source.fork().uniform(4), source.uniform(4), other.uniform(4)]
    found += [source.shared_uniform(4)[None], source.shared_uniform(4)[None]]
    rows = torch.cat(found)
    assert len(rows.unique(dim=0)) == len(rows)


def test_draws_that_belong_to_no_image_do_not_depend_on_the_images() -> None:
    shared = draws().shared_uniform(2, 3)
    assert shared.shape == (2, 3)
    assert torch.equal(shared, draws([1]).shared_uniform(2, 3))
    assert torch.equal(shared, draws([NO_IMAGE]).uniform(2, 3)[0])
    assert not torch.equal(shared, draws(seed=1).shared_uniform(2, 3))


def test_states_count_in_steps_that_leave_room_for_an_attack() -> None:
    source = ImageDraws.of(5, [0], "cpu", counter=3 << 32)
    assert [source.next_state().tolist() for _ in range(2)] == [[5, 3 << 32], [5, (3 << 32) + ATTACK]]
    fork = source.fork()
    assert [fork.next_state().tolist()[1] for _ in range(2)] == [(3 << 32) + 2 * ATTACK + k for k in range(2)]
    assert source.state.tolist() == [5, 3 << 32]


def test_numbers_are_uniform_and_normal() -> None:
    source = draws(torch.arange(2000))
    u, z, k = source.uniform(10), source.normal(10), source.integers(3, 10)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(u.var()) - 1 / 12) < 0.002
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert abs(float(z.mean())) < 0.03
    assert abs(float(z.std()) - 1) < 0.02
    assert k.dtype == torch.int64
    assert k.unique().tolist() == [0, 1, 2]
    assert all(abs(count / k.numel() - 1 / 3) < 0.02 for count in k.flatten().bincount().tolist())
    # Neither neighbouring images nor neighbouring draws are correlated.
    assert abs(float(torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([u.flatten(), source.uniform(10).flatten()]))[0, 1])) < 0.03


def test_a_generator_is_a_function_of_seed_draw_and_first_image() -> None:
    def first(source: ImageDraws) -> float:
        return float(torch.rand((), generator=source.generator()))

    assert first(draws()) == first(draws(NUMBERS[:1]))
    source = draws()
    different = {first(source), first(source), first(draws([1])), first(draws(seed=1)), first(draws([]))}
    assert len(different) == 5


def test_a_graph_draws_anew_once_its_state_is_overwritten() -> None:
    """What a capture records: kernels on static tensors, no copy from the host, no wait for the device."""
    state, images = torch.tensor([SEED - 2**64, 0]), torch.tensor(NUMBERS)

    def attack(state: Tensor, images: Tensor) -> Tensor:
        source = ImageDraws(state, images)
        return source.uniform(3) + source.fork().normal(3)

    before = attack(state, images)
    state[1] = 1 << 32
    after = attack(state, images)
    assert not torch.equal(before, after)
    with torch.device("meta"):  # a value that the host needed would raise
        found = attack(torch.empty(2, dtype=torch.int64), torch.empty(5, dtype=torch.int64))
    assert found.shape == (5, 3)


def test_a_generator_draws_as_it_did() -> None:
    x, own = torch.zeros(3, 2, dtype=torch.float64), torch.Generator().manual_seed(4)
    source: Randomness = torch.Generator().manual_seed(4)
    state, images = next_state(source, x.device)
    assert images is None
    assert torch.equal(state, torch.randint(2**62, (2,), generator=own))
    assert torch.equal(uniform_like(x, source, 4), torch.rand(3, 4, generator=own, dtype=torch.float64))
    assert torch.equal(normal_like(x, source, 4), torch.randn(3, 4, generator=own, dtype=torch.float64))


def test_what_does_not_fit_is_refused() -> None:
    good = draws()
    for wrong, message in (
        ({"state": torch.zeros(3, dtype=torch.int64)}, "state must be int64"),
        ({"state": torch.zeros(2)}, "state must be int64"),
        ({"images": torch.zeros(2, 1, dtype=torch.int64)}, "images must be int64"),
        ({"images": torch.zeros(2)}, "images must be int64"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(good, **wrong)
    for high in (0, 2**24 + 1):
        with pytest.raises(ValueError, match="high"):
            good.integers(high)
