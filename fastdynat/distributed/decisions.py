"""Decisions that all ranks share: what rank 0 finds, what every rank could do, what all must have alike."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from fastdynat.distributed.session import present_session
from fastdynat.distributed.world import world
from fastdynat.errors import ToldElsewhere, UserError

T = TypeVar("T")


def first_decides(decide: Callable[[], T]) -> T:
    """``decide()`` of rank 0 on every rank; the others wait for it without a limit. Returns plain values.

    Raises:
        UserError: rank 0's, on rank 0.
        ToldElsewhere: the same on the others.
    """
    here = world()
    if here.alone:
        return decide()
    value, error = None, None
    if here.first:
        try:
            value = decide()
        except UserError as refusal:
            error = refusal
    _meet()
    found, said = here.from_first((value, None if error is None else str(error)))
    if error is not None:
        raise error
    if said is not None:
        raise ToldElsewhere(said)
    return found  # type: ignore[return-value]


def all_can(act: Callable[[], T]) -> T:
    """``act()`` of this rank, when it has succeeded on all of them.

    Raises:
        UserError: it raised one on a rank: on the lowest such rank, by number and host if that is not 0.
        ToldElsewhere: on the others.
    """
    here = world()
    if here.alone:
        return act()
    error: UserError | None = None
    try:
        value = act()
    except UserError as refusal:
        error = refusal
    _meet()
    said = here.gather(None if error is None else str(error))
    failed = [rank for rank, text in enumerate(said) if text is not None]
    if failed and (error is None or here.rank != failed[0]):
        raise ToldElsewhere(said[failed[0]])
    if error is not None:
        raise error
    return value


def in_turns(act: Callable[[], T]) -> T:
    """`all_can` of what may download or prepare files: rank 0, then one rank of each other machine, then all.

    Raises:
        UserError, ToldElsewhere: as `all_can`.
    """
    here = world()
    if here.alone:
        return act()
    done: list[T] = []
    for turn in (here.first, here.local_rank == 0, True):
        all_can(partial(_extend, done, act) if turn and not done else lambda: None)
    return done[0]


def _extend(done: list[T], act: Callable[[], T]) -> None:
    done.append(act())


def require_alike(facts: Mapping[str, object]) -> None:
    """Refuse ranks whose `facts`, plain values by what they are in words, differ.

    Raises:
        UserError: on rank 0, for the first fact that is another on another rank.
        ToldElsewhere: on the others.
    """
    here = world()
    told = here.gather(dict(facts))
    for name, value in told[0].items():
        for rank, other in enumerate(told):
            if other.get(name) != value:
                both = f"{name}: {value} on {name_of(0)}, {other.get(name)} on {name_of(rank)}"
                text = f"the ranks differ in {both}; start all of them with the same code, command and data"
                raise UserError(text) if here.first else ToldElsewhere(text)


def name_of(rank: int) -> str:
    """Process `rank` of the world in words, with its host and number where they are known."""
    session = present_session()
    return f"rank {rank}" if session is None else str(session.members[rank])


def _meet() -> None:
    if (session := present_session()) is not None:
        session.meet()
