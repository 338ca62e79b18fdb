"""Writing in the background: one thread waits for the disk while training continues.

Every write has a thread of its own, which ends with it. A thread that computes, as checksums and copies of
tensors do, gets threads of its own from OpenMP, and keeps them as long as it lives. While there are more of
these than cores, OpenMP lets waiting threads sleep instead of spin, in training too: steps of a few
milliseconds on two cores took a fifth longer after the first checkpoint.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import TracebackType

THREAD = "fastdynat-writer"


class BackgroundWriter:
    """Runs one write at a time; a failed one raises in the training thread, at the next call.

    As a context manager it waits for the last write, and raises its failure, on exit. An exception of the
    block itself comes first; a failed write is then not reported."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Start `write`, which must not touch what training changes. Raises what the last write raised."""
        self.wait()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD)
        self._pending = self._thread.submit(write)

    def check(self) -> None:
        """Raise what a finished write raised; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written and the thread has ended; raises what the write raised."""
        pending, self._pending = self._pending, None
        thread, self._thread = self._thread, None
        try:
            if pending is not None:
                pending.result()
        finally:
            if thread is not None:
                thread.shutdown()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with nullcontext() if error is None else suppress(Exception):
            self.wait()
