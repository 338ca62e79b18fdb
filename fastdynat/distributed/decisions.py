"""Agreement between ranks: rank 0 decides, all succeed or all fail, all have the same values."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from fastdynat.distributed.session import present_session
from fastdynat.distributed.world import world
from fastdynat.errors import ToldElsewhere, UserError

T = TypeVar("T")


def first_decides(decide: Callable[[], T]) -> T:
    """Call `decide` on rank 0 and return its result on every rank; it must be picklable.

    The other ranks wait without a time limit.

    Raises:
        UserError: `decide` raised it; on rank 0.
        ToldElsewhere: `decide` raised a UserError; on the other ranks.
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
    """Call `act` on every rank; return this rank's result once `act` has succeeded on all ranks.

    Raises:
        UserError: `act` raised it on this rank, the lowest on which it did.
        ToldElsewhere: `act` raised a UserError on another rank.
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
    """`all_can` for an `act` that may download or prepare files: rank 0, then local ranks 0, then the others.

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
    """Raise an error if `facts`, picklable values by their names in messages, differ between the ranks.

    Raises:
        UserError: on rank 0, for the first fact that differs.
        ToldElsewhere: on the other ranks.
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
    """The name of `rank` for messages, with its host and pid if they are known."""
    session = present_session()
    return f"rank {rank}" if session is None else str(session.members[rank])


def _meet() -> None:
    if (session := present_session()) is not None:
        session.meet()
