"""One task of a submitted job: a rank that runs `fastdynat train`, saves when told to, and is requeued."""

import os
import signal
import time
from dataclasses import dataclass
from signal import Signals
from types import FrameType, TracebackType
from typing import Any, Self

from fastdynat.terminal.stop_request import request_stop

SIGNALLED = 128  # exit codes from here on: the run was stopped by a signal, and has saved
VERDICT_SECONDS = 600.0  # after a SIGTERM alone, for SLURM to kill, requeue or cancel


class RequeueSignal:
    """While active, submitit's signal (before the time limit, at preemption) asks the run to save and stop.

    submitit's own handler would end this process in the middle of a step; `pass_on` calls it afterwards.

    Attributes:
        received: whether the signal has come.
    """

    def __init__(self) -> None:
        from submitit import JobEnvironment

        self.number = Signals[f"SIG{JobEnvironment.USR_SIG}"]
        self.received = False
        self._previous: Any = None
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        self._previous = signal.signal(self.number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(self.number, self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker of a loader works until its parent has stopped
            return
        self.received = True
        if not request_stop(Signals(number)):
            raise KeyboardInterrupt  # there is nothing to save yet

    def pass_on(self) -> None:
        """Let submitit requeue the job: rank 0's process ends here, the others return."""
        if callable(self._previous):
            self._previous(self.number, None)


@dataclass(frozen=True)
class TrainTask:
    """`fastdynat train` as a function that submitit stores, runs in every task, and requeues.

    Attributes:
        arguments: of the command, which resumes its run where there is one.
        folder: the directory that relative paths start from.
    """

    arguments: tuple[str, ...]
    folder: str

    def __call__(self) -> int:
        """Train; the exit code of the command, which is also that of the process.

        Raises:
            SystemExit: the command failed, or the job is requeued.
        """
        from submitit import JobEnvironment

        os.chdir(self.folder)
        _export_ranks()
        with RequeueSignal() as requeue:
            code = self._train()
            if (
                code == SIGNALLED + signal.SIGTERM
                and not requeue.received
                and JobEnvironment().cluster == "slurm"
            ):
                _await_verdict(requeue)
        if requeue.received and code >= SIGNALLED:
            requeue.pass_on()
            return code  # of another rank than the first; with exit code 0, or srun would end the first one
        if code:
            raise SystemExit(code)
        return code

    def _train(self) -> int:
        from fastdynat.commands.main import main

        try:
            return main(["train", *self.arguments])
        except KeyboardInterrupt:  # the signal came when the command was as good as over
            return SIGNALLED + signal.SIGINT

    def checkpoint(self) -> Any:
        """The job to requeue, called by submitit: the same one, for the run has saved itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _export_ranks() -> None:
    """Set what torchrun would: the ranks, and the address where they meet."""
    from submitit.helpers import TorchDistributedEnvironment

    # Each process finds its GPU by LOCAL_RANK among all of its node.
    found = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if found.world_size == found.local_world_size:
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # the name of a single node need not resolve
    # torchrun's choice where SLURM has none: processes that share a node must not each use all of its cores.
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))


def _await_verdict(requeue: RequeueSignal) -> None:
    """Wait, after a SIGTERM and with everything saved, for the end that SLURM has in mind.

    A cancelled job is killed; a preempted one is killed and started again by SLURM, or gets the signal. A
    process that ended by itself would count as done.
    """
    until = time.monotonic() + VERDICT_SECONDS
    while not requeue.received and time.monotonic() < until:
        try:
            time.sleep(1.0)
        except KeyboardInterrupt:  # the signal; no run is active
            return
