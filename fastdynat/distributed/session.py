"""Heartbeats and failure reports between the ranks.

Every rank renews a heartbeat in the store. A thread of each rank checks once a second for a failure reported
by another rank, for processes of its machine that have ended, and for heartbeats that have stopped. It then
ends this process, even if the main thread is blocked in a collective. Only the first rank to report a failure
prints it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from fastdynat.distributed.members import Member
from fastdynat.errors import ToldElsewhere, first_line, one_line
from fastdynat.launch import launcher_ended, local_rank

PERIOD = 1.0  # seconds between heartbeats, and between checks of the other ranks
SILENCE = 60.0  # seconds without a heartbeat until a rank is lost; a compiler may hold the GIL for a while
GRACE = 5.0  # seconds for the main thread to end by itself, and to find the rank that failed
STORE_SECONDS = 20.0  # without an answer from the store until the launcher is lost
FAILURE, STOP = "failure", "stop"
LAUNCHER_ENDED = "the launcher has ended without its processes"
# Words in the error of a collective in which another process did not take part.
COLLECTIVE = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "c10d")
TOO_LATE = ("timed out", "timeout")


class Session:
    """The connection of this process to the other ranks, from `join_world` to `leave_world`.

    Attributes:
        members: the processes of the world, by rank.
        stop_wanted: True once any rank has been asked to stop.
    """

    def __init__(
        self, store: Any, watched: Any, members: Sequence[Member], me: Member, minutes: float
    ) -> None:
        """
        Args:
            store: a store that only this world uses.
            watched: the same store on a second connection, because a waiting call blocks its connection.
            minutes: the time limit of a collective, for messages.
        """
        self.members, self.me, self.minutes = members, me, minutes
        self.stop_wanted = False
        self.calls: Callable[[], int] = lambda: 0
        self._store, self._watched = store, watched
        self._meetings = self._beats = 0
        self._leaving, self._ended = threading.Event(), threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._reporting, self._reported = threading.Lock(), False
        self._thread = threading.Thread(target=self._watch, name="fastdynat-ranks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def meet(self) -> None:
        """Barrier without a time limit, for work of unknown duration such as reading data.

        Raises:
            ToldElsewhere: another rank has failed.
        """
        self._meetings += 1
        prefix = f"met/{self._meetings}/"
        self._store.set(f"{prefix}{self.me.rank}", "1")
        waiting = [f"{prefix}{member.rank}" for member in self.members]
        pause = 0.001
        while waiting := [key for key in waiting if not self._store.check([key])]:
            if self._store.check([FAILURE]):
                raise ToldElsewhere("another rank has failed")
            time.sleep(pause)
            pause = min(0.1, 2 * pause)

    def report(self, text: str, code: int, shown: str | None = None) -> bool:
        """Report to all ranks that this process ends because of `text`; they end with exit code `code`, too.

        Only the world's first failure is printed on standard error, as `shown` if given. Returns True if this
        was the first.
        """
        value = json.dumps({"rank": self.me.rank, "text": text, "code": code})
        with self._reporting:  # both threads may find the same failure
            if self._reported:
                return False
            self._reported = True
            try:
                first = bool(self._store.compare_set(FAILURE, "", value) == value.encode())
            except RuntimeError:  # the store is gone, and with it the others' way to report
                first = True
            if first:
                with suppress(OSError):
                    print(shown or f"fastdynat: error: {one_line(text)}", file=sys.stderr, flush=True)
            return first

    def failure(self) -> dict[str, Any] | None:
        """The failure that a rank has reported; None if there is none."""
        with suppress(RuntimeError):
            if self._store.check([FAILURE]):
                found: dict[str, Any] = json.loads(self._store.get(FAILURE))
                return found
        return None

    def request_stop(self) -> None:
        """Set `stop_wanted` on all ranks; the other ranks see it within seconds."""
        self.stop_wanted = True
        with suppress(RuntimeError):
            self._store.set(STOP, "1")

    def lost(self, error: BaseException) -> str | None:
        """A message that names the rank whose end caused `error` here; None if no other rank caused it.

        Waits up to `GRACE` seconds, because the cause may show only after the error.
        """
        if (told := self.failure()) is not None:
            return str(told["text"])
        dead = next((str(member) for member in self._others() if member.dead), None)
        said = str(error).lower()
        if dead is None and not any(word in said for word in COLLECTIVE):
            return None
        before, until = self._beats_of_others(), time.monotonic() + GRACE
        while dead is None and time.monotonic() < until:
            if (told := self.failure()) is not None:
                return str(told["text"])
            time.sleep(0.1)
            dead = next((str(member) for member in self._others() if member.dead), None)
        if dead is not None:
            return f"{dead} was lost: its process has ended"
        now = self._beats_of_others()
        silent = [str(self.members[rank]) for rank in before if before[rank] == now.get(rank)]
        if silent:
            return f"{silent[0]} was lost: it can no longer be reached"
        if any(word in said for word in TOO_LATE):
            return self._late(now)
        return f"a collective of {self.me} failed: {first_line(error)}"

    def _late(self, beats: dict[int, bytes]) -> str:
        """A message that names the ranks that have joined fewer collectives than this one."""
        calls = {rank: int(beat.split()[1]) for rank, beat in beats.items()}
        late = [str(self.members[rank]) for rank, count in sorted(calls.items()) if count < self.calls()]
        limit = f"within {self.minutes:g} minutes (--rank-timeout)"
        if not late:
            return f"a collective did not end {limit}, although all ranks had come to it"
        return f"{', '.join(late)} did not come to a collective {limit}"

    def leave(self, barrier: Callable[[], None]) -> None:
        """Stop monitoring once all ranks have reached `barrier`."""
        self._leaving.set()
        barrier()
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STORE_SECONDS)

    def _others(self) -> list[Member]:
        return [member for member in self.members if member.rank != self.me.rank]

    def _beats_of_others(self) -> dict[int, bytes]:
        with suppress(RuntimeError):
            return self._read_beats(self._store)
        return {}

    def _read_beats(self, store: Any) -> dict[int, bytes]:
        """In two requests, of any number of ranks, once all have begun."""
        ranks = [member.rank for member in self._others()]
        if not store.check([f"beat/{rank}" for rank in ranks]):
            ranks = [rank for rank in ranks if store.check([f"beat/{rank}"])]
        values = store.multi_get([f"beat/{rank}" for rank in ranks]) if ranks else []
        return dict(zip(ranks, values, strict=True))

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._ended.is_set():
            if launcher_ended():  # its store has ended, too: nobody else can be told
                self._end(LAUNCHER_ENDED, 1, shown=self._lowest_here())
            try:
                self._look()
                answered = time.monotonic()
            except RuntimeError:
                if time.monotonic() - answered > STORE_SECONDS:
                    self._end("the launcher's store can no longer be reached", 1, shown=self._lowest_here())
            self._ended.wait(PERIOD)

    def _lowest_here(self) -> bool:
        """True on one process of each machine."""
        return self.me.rank == min(m.rank for m in self.members if m.host == self.me.host)

    def _look(self) -> None:
        """Renew the heartbeat, and end this process if a rank has failed or is lost."""
        self._beats += 1
        self._watched.set(f"beat/{self.me.rank}", f"{self._beats} {self.calls()}")
        if self._watched.check([FAILURE]):
            told = json.loads(self._watched.get(FAILURE))
            if told["rank"] != self.me.rank:
                self._end(told["text"], told["code"], shown=False)
            return
        if not self.stop_wanted and self._watched.check([STOP]):
            self.stop_wanted = True
        if self._leaving.is_set():
            return
        beats = self._read_beats(self._watched) if self._others() else {}
        for member in self._others():
            if member.dead:
                self._end_because(f"{member} was lost: its process has ended")
            if self._silent_for(member.rank, beats.get(member.rank, b"")) > SILENCE:
                self._end_because(f"{member} was lost: no sign of it for {SILENCE:.0f} s")

    def _silent_for(self, rank: int, beat: bytes) -> float:
        now = time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != beat:
            self._seen[rank] = beat, now
        return now - self._seen[rank][1]

    def _end_because(self, text: str) -> None:
        """Report a failure that this process has detected, then end."""
        self.report(text, 1)
        self._end(text, 1, shown=False)

    def _end(self, text: str, code: int, *, shown: bool) -> None:
        """End this process after at most `GRACE` seconds; print `text` first if `shown`."""
        if shown and not self._leaving.is_set():
            with suppress(OSError):
                print(f"fastdynat: error: {one_line(text)}", file=sys.stderr, flush=True)
        if not self._ended.wait(GRACE):
            os._exit(code)


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """Context before the session has begun: ends this process when torchrun has ended without it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(PERIOD):
            if launcher_ended():
                if local_rank() == 0:
                    with suppress(OSError):
                        print(f"fastdynat: error: {LAUNCHER_ENDED}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, name="fastdynat-launcher", daemon=True).start()
    try:
        yield
    finally:
        done.set()


_present: Session | None = None


def present_session() -> Session | None:
    """The session of this process; None if it has not joined a world."""
    return _present


def set_session(session: Session | None) -> None:
    """Set the session of this process."""
    global _present
    _present = session
