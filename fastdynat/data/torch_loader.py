"""Batches read and augmented by the worker processes of torch.utils.data.DataLoader."""

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdynat.data.epoch_plan import EpochPlan
from fastdynat.data.extra_sampler import ExtendedImages
from fastdynat.data.image_sets import Images
from fastdynat.data.loader import PlannedDraws, PlannedLoader
from fastdynat.errors import UserError
from fastdynat.ops.augment import to_unit
from fastdynat.terminal.interrupts import STOPPING

LONGEST_END = 10.0  # seconds to wait for a worker that was killed; one that waits for a disk cannot end


class _Steps(Dataset[Tensor | UserError]):
    """The steps of one epoch as a map-style data set: step -> uint8 (n, C, H, W)."""

    def __init__(
        self,
        draws: Callable[[int], PlannedDraws],
        read: Callable[[PlannedDraws], Tensor],
        augmented: Callable[[Tensor, PlannedDraws], Tensor],
    ):
        self._draws, self._read, self._augmented = draws, read, augmented

    def __getitem__(self, step: int) -> Tensor | UserError:
        draws = self._draws(step)
        try:
            return self._augmented(self._read(draws), draws)
        except UserError as error:
            return error  # raised in a worker it would arrive as a traceback in a message


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and launchers signal a whole process group; a worker that ended would end the step being saved.

    A worker ends when its parent does, which it looks for every few seconds.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # discards what came during `_signals_wait`
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that stop a run wait, also in processes forked within: a worker does not ignore them at once.

    One that they end may leave a lock of the result queue taken, and the other workers waiting for it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(batches: Any) -> None:
    """End the workers of the iterator `batches`; those that hang are killed.

    torch sends them SIGTERM, which they ignore, and Python waits for them when it exits.
    """
    try:
        if shut_down := getattr(batches, "_shutdown_workers", None):
            shut_down()
    finally:  # also where a further Ctrl-C ends the waiting for them
        living = [worker for worker in getattr(batches, "_workers", ()) if worker.is_alive()]
        for worker in living:
            worker.kill()
        for worker in living:
            worker.join(LONGEST_END)


class TorchLoader(PlannedLoader):
    """Worker processes read and augment uint8 batches; the device converts them. Takes any image source.

    The workers are forked when an epoch begins and end with it, also with one that is given up. The values,
    and for image files the decoder (Pillow), are those of the resident loader.

    Args:
        images: The training set, in memory or as files.
        workers: Processes; 0 reads in this one.
        options: As for `PlannedLoader`.
    """

    def __init__(self, images: Images | ExtendedImages, *, workers: int, **options: Any) -> None:
        super().__init__(images, **options)
        self._workers = workers

    def _inputs(self, plan: EpochPlan, steps: range) -> Generator[Tensor]:
        batches: DataLoader[Tensor | UserError] = DataLoader(
            _Steps(lambda step: self._draws(plan, step), self._read, self._augmented),
            batch_size=None,
            sampler=steps,
            num_workers=self._workers,
            # A spawned worker would need its own copy of the images.
            multiprocessing_context="fork" if self._workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            # DataLoader draws a seed: from this generator, not from the one that the attacks use.
            generator=torch.Generator(),
        )
        loaded = None
        try:
            with _signals_wait():
                loaded = iter(batches)
            for batch in loaded:
                if isinstance(batch, UserError):
                    raise batch
                yield to_unit(batch.to(self.device, non_blocking=True), channels_last=self.channels_last)
        finally:
            _end(loaded)
