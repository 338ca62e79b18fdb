"""Background writing: a thread of its own waits for the disk while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import TracebackType


class BackgroundWriter:
    """Runs writes one after the other, each begun only when the one before is done; a failure is raised where
    training is.

    As a context manager: everything is written, or has failed and been raised, when it is left. What ends the
    block by an exception of its own comes first; a failed write then is not reported.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begin `write`, which must not touch what training changes. Raises what the write before it
        raised.
        """
        self.wait()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="fastdynat-writer")
        self._pending = self._thread.submit(write)

    def check(self) -> None:
        """Raise what a finished write raised; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; raises what the write raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            with nullcontext() if error is None else suppress(Exception):
                self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
