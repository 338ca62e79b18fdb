"""Processes that form a gloo world on this machine and run functions of tests, all ranks at once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LIMIT = 240.0  # seconds for one call


class RankPool:
    """`size` processes, each with one thread, that join one world and serve calls until `close`."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        self.size, self._ends, self._processes = size, [], []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the death of the process ends our reading
            self._ends.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` on every rank at once; the results by rank.

        The function and its arguments are pickled: a function of a module, plain values, tensors on the CPU.

        Raises:
            AssertionError: it raised on a rank, a rank died, or it took too long; the pool is closed then.
        """
        for end in self._ends:
            end.send((function, arguments))
        found = []
        for rank, end in enumerate(self._ends):
            try:
                answer = end.recv() if end.poll(LIMIT) else ("error", f"no answer within {LIMIT:.0f} s")
            except (EOFError, ConnectionResetError):
                answer = ("error", "the process died")
            if answer[0] == "error":
                self.close()
                raise AssertionError(f"rank {rank}: {answer[1]}")
            found.append(answer[1])
        return found

    @property
    def closed(self) -> bool:
        return not self._processes

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _serve(rank: int, size: int, port: int, end: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    from fastdynat.distributed import join_world

    torch.set_num_threads(1)
    join_world("cpu", minutes=3)
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send(("ok", function(*arguments)))
        except BaseException:
            end.send(("error", traceback.format_exc()))
