"""Verdicts on candidates: those of this process, stored ones, or made now."""

import os
import threading
import time
import warnings
from collections.abc import Collection, Iterable

import torch

from fastdynat.errors import UserError
from fastdynat.verification import verdict_store
from fastdynat.verification.crash_marks import mark
from fastdynat.verification.isolated_run import DeviceLost, NotNow, Prepared, lost, not_now, on_own_thread
from fastdynat.verification.operator_check import (
    REFERENCE,
    SPARED,
    CandidateVerdict,
    OperatorCheck,
    registered,
)

Verdicts = dict[str, CandidateVerdict]
AGAIN = "`fastdynat doctor --check` checks it again"
SAID_FROM = {"cpu": 10.0, "cuda": 0.5}  # seconds from which the duration of a check is logged

_known: dict[tuple[str, torch.device], Verdicts] = {}
_lost: dict[torch.device, str] = {}
_lock = threading.RLock()


def _after_fork() -> None:
    """Replace the lock, which another thread of the parent may have held."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def checking_lock() -> threading.RLock:
    """The lock held while a candidate is checked or timed."""
    return _lock


class WrongImplementation(UserError):
    """An implementation requested by name gives wrong results on this machine."""


def peek(name: str, device: torch.device) -> Verdicts | None:
    """The verdicts of this process on check `name`; None if there are none. `device` has its index."""
    return _known.get((name, device))


def known(name: str, device: torch.device) -> Verdicts | None:
    """The verdicts on check `name` of this process, or else stored ones; runs nothing."""
    if (found := _known.get((name, device))) is None and name in registered():
        found = verdict_store.load_verdicts(verdict_store.key_of(registered()[name], device)).verdicts or None
        if found is not None:
            _known[name, device] = found
            _warn(name, found)
    return found


def verdicts(
    name: str, device: torch.device, *, afresh: bool = False, insisted: str | None = None
) -> Verdicts:
    """The verdict on every candidate of check `name` that can run on `device`; checks those without one.

    A candidate that compiles its kernels (`OperatorCheck.compiling`) has the verdict `SPARED` where another
    one is right and no process has checked it.

    Warns once per process of each wrong candidate. Must not be called while the current stream is captured or
    torch.compile traces: use `known` there.

    afresh: check all candidates again, with the cases that a first use leaves out (`Case.deep`).
    insisted: the candidate that is checked even if it compiles.

    Raises:
        DeviceLost: a candidate has broken the CUDA context; its verdict is stored.
    """
    check = registered()[name]
    with _lock:
        if device in _lost:
            raise DeviceLost(_lost[device])
        wanted = [c for c in check.candidates if check.why_not(c, device) is None]
        found = {} if afresh else dict(_known.get((name, device), {}))
        if insisted is not None and found.get(insisted) is SPARED:
            del found[insisted]
        if all(c in found for c in wanted):
            return found
        compiling: frozenset[str] = frozenset() if afresh else check.compiling - {insisted}
        key = verdict_store.key_of(check, device)
        stored = verdict_store.load_verdicts(key)
        found = ({} if afresh else stored.verdicts) | found
        while missing := _due(wanted, found, compiling):
            known_before = verdict_store.Stored(stored.key, {}, {}) if afresh else stored
            found |= _examine(check, device, missing, key, known_before, deep=afresh)
            stored = verdict_store.load_verdicts(key)
        _known[name, device] = found = dict.fromkeys(wanted, SPARED) | found
    _warn(name, found)
    return found


def _due(wanted: list[str], found: Verdicts, compiling: Collection[str]) -> list[str]:
    """The candidates of `wanted` to check next; one that is `compiling` only if no other is right."""
    rest = [c for c in wanted if c not in found]
    one_is_right = any(c in found and found[c].right for c in wanted)
    ready = [c for c in rest if c not in compiling]
    return ready if ready or one_is_right else rest


def _examine(
    check: OperatorCheck,
    device: torch.device,
    candidates: list[str],
    key: dict[str, object],
    stored: verdict_store.Stored,
    *,
    deep: bool,
) -> Verdicts:
    """Check `candidates` on a thread of its own and store the verdicts."""
    found, unsure = dict(stored.verdicts), Verdicts()

    def run() -> None:
        with check.within():
            prepared = Prepared(check, device)
            for candidate in candidates:
                with mark(key, candidate) as (left, note):
                    if why := str(left):
                        found[candidate] = CandidateVerdict(False, left.case, why)
                        continue
                    try:
                        found[candidate] = prepared.examine(candidate, note, deep=deep)
                    except NotNow as error:
                        unsure[candidate] = CandidateVerdict(False, *error.args)
                    except DeviceLost as error:
                        found[candidate] = error.args[1]
                        _lost[device] = error.args[0]
                        raise

    try:
        on_own_thread(run)
    except DeviceLost as error:
        verdict_store.save_verdicts(verdict_store.Stored(stored.key, found, stored.fastest))
        raise DeviceLost(error.args[0]) from None
    except Exception as error:  # the reference itself, or no memory for the cases
        if lost(device):
            raise
        nothing = CandidateVerdict(False, "before the first case", not_now(error))
        unsure |= {c: nothing for c in candidates if c not in found and c not in unsure}
    if not deep:  # what a deep check of another process has found wrong meanwhile stays so
        found |= {
            name: verdict
            for name, verdict in verdict_store.load_verdicts(key).verdicts.items()
            if not verdict.right
        }
    if found:
        verdict_store.save_verdicts(verdict_store.Stored(stored.key, found, stored.fastest))
    return found | unsure


_warned: set[tuple[str, str, CandidateVerdict]] = set()


def _warn(name: str, found: Verdicts) -> None:
    for candidate, verdict in found.items():
        if not verdict.right and verdict is not SPARED and (name, candidate, verdict) not in _warned:
            _warned.add((name, candidate, verdict))
            text = f"{name}: implementation {candidate!r} is left out: {describe_verdict(verdict)}; {AGAIN}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def describe_verdict(verdict: CandidateVerdict) -> str:
    """The wrong case and the deviation in it."""
    return f"wrong in case {verdict.case!r}: {verdict.detail}"


def right(name: str, device: torch.device) -> tuple[str, ...]:
    """The correct candidates of check `name` on `device` by preference, then the reference.

    Checks at first use.
    """
    check, found = registered()[name], verdicts(name, device)
    usable = [c for c in check.candidates if check.why_not(c, device) is None and found[c].right]
    return (*usable, REFERENCE)


def insist(name: str, candidate: str, device: torch.device) -> None:
    """Raise WrongImplementation if `candidate`, which was requested by name, is wrong. Checks at first
    use."""
    verdict = verdicts(name, device, insisted=candidate).get(candidate)
    if verdict is not None and not verdict.right:
        raise WrongImplementation(
            f"{name}: implementation {candidate!r} was asked for but is {describe_verdict(verdict)}; {AGAIN}"
        )


def prepare_checks(device: torch.device, names: Iterable[str] | None = None) -> None:
    """Check now what would be checked at its first use: all registered checks, or `names`.

    Call it before CUDA graphs are captured or networks compiled, when nothing can be checked any more. Logs
    how long it took if that is noticeable."""
    begin = time.perf_counter()
    for name in registered() if names is None else names:
        verdicts(name, device)
    took = time.perf_counter() - begin
    if took > SAID_FROM.get(device.type, 1.0):
        verdict_store.log.warning(
            "compared the operators' implementations with eager on this machine, once, in %.1f s", took
        )
