"""`iterate`: a shrinking batch gives the full batch's results without a step on finished images."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdynat.attack_engine.shrinking_batch import iterate


@dataclass(frozen=True)
class Count:
    """Counts `value` up to `goal`."""

    value: Tensor
    goal: Tensor
    name: str = "kept"


def step(state: Count, i: int) -> Count:
    return replace(state, value=torch.where(state.value < state.goal, state.value + 1, state.value))


def done(state: Count) -> Tensor:
    return state.value >= state.goal


@given(
    goals=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    steps=st.integers(0, 25),
    every=st.integers(1, 7),
    least=st.floats(0, 1),
    max_halvings=st.integers(0, 3),
)
@settings(deadline=None)
def test_the_result_is_that_of_running_all(
    goals: list[int], steps: int, every: int, least: float, max_halvings: int
) -> None:
    goal = torch.tensor(goals)
    start = Count(torch.zeros_like(goal), goal)
    out = iterate(start, step, steps, done=done, every=every, least=least, max_halvings=max_halvings)
    assert out.value.tolist() == goal.clamp_max(steps).tolist()
    assert out.goal.tolist() == goals
    assert out.name == "kept"


def run(goals: list[int], **kwargs: object) -> list[int]:
    sizes = []

    def counted(state: Count, i: int) -> Count:
        sizes.append(len(state.value))
        return step(state, i)

    goal = torch.tensor(goals)
    iterate(Count(torch.zeros_like(goal), goal), counted, 100, done=done, **kwargs)  # type: ignore[arg-type]
    return sizes


def test_finished_images_cost_nothing() -> None:
    assert run([2, 4, 6, 8], every=2) == [4, 4, 3, 3, 2, 2, 1, 1]


def test_shapes_are_few() -> None:
    assert set(run([*range(1, 9), 40], every=1, max_halvings=2)) == {9, 5, 3}


def test_ticks_tell_the_share_and_may_stop() -> None:
    seen: list[float] = []
    goal = torch.tensor([9])
    iterate(Count(torch.zeros_like(goal), goal), step, 8, done=done, every=2, tick=seen.append)
    assert seen == [i / 8 for i in range(9)]  # also between the looks, which may be far apart

    def stop(share: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        iterate(Count(goal - 9, goal), step, 8, done=done, tick=stop)
