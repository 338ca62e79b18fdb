"""NVIDIA DALI loader: images in memory, or files decoded by DALI's threads (on a GPU by its decoder)."""

import os
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, types
from nvidia.dali.data_node import DataNode
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastdynat.data.decode import Cut, cut_out, fit_square
from fastdynat.data.epoch_plan import EpochPlan
from fastdynat.data.extra_sampler import ExtendedImages
from fastdynat.data.image_sets import ImageSet
from fastdynat.data.imagefolder import FileSet
from fastdynat.data.loader import PlannedDraws, PlannedLoader
from fastdynat.errors import UserError
from fastdynat.ops.augment import to_unit

PREFETCH = 2  # batches that DALI works on ahead

# A forked process has none of DALI's threads, and destroying a pipeline there would wait for them forever: it
# keeps them all.
_alive: WeakSet[Pipeline] = WeakSet()
_kept: list[Pipeline] = []
os.register_at_fork(before=lambda: _kept.extend(_alive), after_in_parent=_kept.clear)


class _Feed:
    """The requests of the current epoch, which the pipeline pulls one by one."""

    def __init__(self) -> None:
        self.requests: Iterator[tuple[Any, ...]] = iter(())

    def __call__(self) -> tuple[Any, ...]:
        return next(self.requests)


class DaliLoader(PlannedLoader):
    """DALI crops and flips uint8 batches, and decodes those that are files; on a GPU where `device` is one.

    DALI has no reflected crops: with them it reads and decodes, and torch crops and flips. Stages after that
    run in torch on its uint8 batches.

    DALI draws nothing: every batch is fed in the order of the plan, so shards and restarts are exact. Images
    in memory and in stores of extra images give the batches of the resident loader, bit for bit; with those,
    files are decoded by Pillow. Files alone: on the CPU those too; kinds that
    DALI does not read as Pillow does are refused. With `FileSet.image_size` the CPU pipeline only decodes,
    and threads of our own resize as the other loaders do. On a GPU decoder and resizing round differently:
    values are within a few of 255, more at the image's border.

    Args:
        images: The training set, in memory or as files.
        workers: Threads of DALI, at least 1.
        options: As for `PlannedLoader`.

    Raises: UserError where DALI cannot work on the device or would read a file differently
    (`FileSet.dali_problem`).
    """

    def __init__(self, images: ImageSet | FileSet | ExtendedImages, *, workers: int, **options: Any) -> None:
        super().__init__(images, **options)
        if workers < 1:
            raise UserError(f"--loader dali needs at least 1 worker, got {workers}; leave --workers out")
        if isinstance(images, FileSet) and images.dali_problem:
            raise UserError(
                f"--loader dali cannot read every file correctly: {images.dali_problem}; use --loader torch, "
                "which can, or convert the file to an 8-bit PNG"
            )
        self._images = images
        self._workers = workers
        self._gpu = self.device.type == "cuda"
        if self._gpu and self._cuts_files:
            raise UserError("scale: --loader dali cannot crop files on a GPU; use --loader torch")
        resizes = isinstance(images, FileSet) and (images.image_size is not None or self._cuts_files)
        self._resized = resizes and not self._gpu
        self._raw = self._resized or self._reflects or self._resized_crop is not None
        self._side = torch.cuda.Stream(self.device) if self._gpu else None
        self._feed = _Feed()
        self._pipeline: Pipeline | None = self._build()

    def _build(self) -> Pipeline:
        device_id = torch.empty(0, device=self.device).get_device() if self._gpu else None
        pipeline = Pipeline(
            batch_size=max(self._num_loaded(step) for step in range(self._steps.count)),
            num_threads=self._workers,
            device_id=device_id,
            prefetch_queue_depth=PREFETCH,
        )
        _alive.add(pipeline)
        try:
            with pipeline:
                pipeline.set_outputs(*self._graph())
            pipeline.build()
        except RuntimeError as error:
            raise UserError(
                f"--loader dali cannot work on {self.device} ({_reason(error)}); use --loader torch"
            ) from error
        return pipeline

    def _graph(self) -> tuple[DataNode, ...]:
        """DALI's graph: uint8 images, cropped and flipped unless done here, and the files' (H, W, C)."""
        in_files = isinstance(self._images, FileSet)
        data, corners, flips = fn.external_source(
            source=self._feed,
            num_outputs=3,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32],
            ndim=[1 if in_files else 3, 1, 0],
            layout=["" if in_files else "CHW", "", ""],
        )
        if isinstance(self._images, FileSet):
            images, shape = _decode(data, self._images.image_size if self._gpu else None, mixed=self._gpu)
            axes, sides = (0, 1), self._images.shape[1:]
        else:
            images, shape = data.gpu() if self._gpu else data, data.shape()
            axes, sides = (1, 2), self._images.shape[1:]
        if self._raw:
            return images, shape, corners, flips  # which DALI would warn of if nothing used them
        images = fn.slice(
            images, start=corners, shape=sides, axes=axes, out_of_bounds_policy="pad", fill_values=0
        )
        return fn.flip(images, horizontal=flips), shape

    def _inputs(self, plan: EpochPlan, steps: range) -> Generator[Tensor]:
        if not self._resized:
            for step, images in zip(steps, self._outputs(plan, steps), strict=True):
                yield self._converted(images, self._draws(plan, step))
            return
        with ThreadPoolExecutor(max_workers=self._workers) as threads:
            # A batch ahead, so that the threads work while the step before it trains.
            ahead: tuple[int, list[Future[np.ndarray]]] | None = None
            try:
                for step, outputs in zip(steps, self._outputs(plan, steps), strict=True):
                    images = _copies(outputs)
                    cuts = self._cuts(self._draws(plan, step)) if self._cuts_files else [None] * len(images)
                    pairs = zip(images, cuts, strict=True)
                    squares = [threads.submit(self._sized, image, cut) for image, cut in pairs]
                    now, ahead = ahead, (step, squares)
                    if now is not None:
                        yield self._resized_batch(plan, *now)
                if ahead is not None:
                    yield self._resized_batch(plan, *ahead)
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _sized(self, pixels: np.ndarray, cut: Cut | None) -> np.ndarray:
        """A decoded image (H, W, C), or the part `cut` of it, in the size of all images."""
        assert isinstance(self._images, FileSet)
        image = Image.fromarray(pixels)
        if cut is not None:
            return np.asarray(cut_out(image, cut, self._images.shape[1:]))
        return np.asarray(fit_square(image, self._images.image_size))

    def _resized_batch(self, plan: EpochPlan, step: int, squares: list[Future[np.ndarray]]) -> Tensor:
        """Resized images (H, W, C) as the batch of `step`."""
        batch = torch.from_numpy(np.stack([square.result() for square in squares])).permute(0, 3, 1, 2)
        return to_unit(self._augmented(batch, self._draws(plan, step)), channels_last=self.channels_last)

    def _outputs(self, plan: EpochPlan, steps: range) -> Generator[Any]:
        """Yield the pipeline's output for each step, in memory that DALI takes back afterwards."""
        self._restart()
        requests = self._feed.requests = (self._request(plan, step) for step in steps)
        for step in steps:
            if self._feed.requests is not requests:
                raise RuntimeError("another epoch of this loader has begun, which ended this one")
            images, shapes, *_ = self._run(plan, step)
            self._check_shapes(shapes, plan, step)
            yield images

    def _restart(self) -> None:
        """Drain the pipeline: drop what an abandoned epoch had requested."""
        self._feed.requests = iter(())
        if self._pipeline is None:
            self._pipeline = self._build()
        with suppress(StopIteration):
            while True:
                self._pipeline.run()
        self._pipeline.reset()

    def _run(self, plan: EpochPlan, step: int) -> tuple[Any, ...]:
        assert self._pipeline is not None
        try:
            return self._pipeline.run()
        except RuntimeError as error:
            reason = _reason(error)
        # DALI cannot go on with it; outside of the handler, so that no traceback keeps it and its threads
        # alive.
        self._pipeline = None
        raise self._explained(reason, plan, step)

    def _request(self, plan: EpochPlan, step: int) -> tuple[Any, np.ndarray, np.ndarray]:
        """The pipeline's input for one batch: pixels or file names, top left corners of the crops, flips."""
        _, indices, shifts, flips, _ = self._draws(plan, step)
        none = torch.zeros(len(indices))
        corners = torch.stack([none, none]) if shifts is None else shifts - self.pad
        if isinstance(self._images, FileSet):
            data: Any = [np.frombuffer(name, dtype=np.uint8) for name in self._images.paths[indices.numpy()]]
        else:
            data = self._images.read(indices).contiguous().numpy()
        return data, corners.T.int().contiguous().numpy(), (none if flips is None else flips).int().numpy()

    def _converted(self, outputs: Any, draws: PlannedDraws) -> Tensor:
        """DALI's images as a batch of our own: DALI takes its buffers back at the next `run`."""
        if self._side is None:
            return to_unit(self._finished(outputs, draws), channels_last=self.channels_last)
        # On a stream beside that of the training, so that the host waits for this copy and not for the steps
        # before it.
        with torch.cuda.stream(self._side):
            x = to_unit(self._finished(outputs, draws), channels_last=self.channels_last)
        self._side.synchronize()
        x.record_stream(torch.cuda.current_stream(self.device))
        return x

    def _finished(self, outputs: Any, draws: PlannedDraws) -> Tensor:
        """uint8 (n, C, H, W) after all of the augmentation: crop and flip here where DALI has not."""
        images = self._channels_first(outputs)
        return self._augmented(images, draws) if self._raw else self._staged(images, draws)

    def _channels_first(self, outputs: Any) -> Tensor:
        """A view of DALI's memory, uint8 (n, C, H, W)."""
        images = from_dlpack(outputs.as_tensor())
        return images.permute(0, 3, 1, 2) if isinstance(self._images, FileSet) else images

    def _check_shapes(self, shapes: Any, plan: EpochPlan, step: int) -> None:
        if not isinstance(self._images, FileSet) or self._images.image_size is not None:
            return
        channels, height, width = self._images.shape
        if (shapes.as_array() != (height, width, channels)).any():
            self._images.read(self._draws(plan, step).indices)  # says which

    def _explained(self, reason: str, plan: EpochPlan, step: int) -> UserError:
        """The error for a failure of DALI in `step`, or in a later step that it was prefetching."""
        if isinstance(self._images, FileSet):
            for ahead in range(step, min(step + PREFETCH + 1, self.steps_per_epoch)):
                try:
                    self._images.read(self._draws(plan, ahead).indices)
                except UserError as found:
                    return found
        return UserError(f"DALI failed in step {step} ({reason}); --loader torch does without it")


def _copies(outputs: Any) -> list[np.ndarray]:
    """Decoded images, uint8 (H, W, C) of different sizes."""
    return [np.array(outputs.at(i)) for i in range(len(outputs))]


def _decode(names: DataNode, image_size: int | None, *, mixed: bool) -> tuple[DataNode, DataNode]:
    """Images (H, W, C) in files as Pillow decodes them, and the shapes they had there.

    Fancy upsampling is what Pillow's libjpeg-turbo does, and the CPU decoder here does anyway; fast IDCT (off
    by default) would change two thirds of the values.
    """
    images = fn.decoders.image(
        fn.io.file.read(names),
        device="mixed" if mixed else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    shape = images.shape()
    return images if image_size is None else _square(images, shape, image_size), shape


def _square(images: DataNode, shape: DataNode, image_size: int) -> DataNode:
    """Resize the shorter side to `image_size` and cut the centre, in the geometry of `imagefolder`."""
    sides = fn.cast(shape[:2], dtype=types.FLOAT64)
    target = types.Constant(image_size, dtype=types.FLOAT64)
    exact = sides * (target / math.min(sides[0], sides[1]))
    # Round half to even, as Python does.
    below = math.floor(exact)
    odd = below - 2 * math.floor(below / 2) == 1
    up = (exact - below > 0.5) | ((exact - below == 0.5) & odd)
    sides = math.max(below + fn.cast(up, dtype=types.FLOAT64), target)
    corner = fn.cast(math.floor((sides - target) / 2), dtype=types.INT32)
    images = fn.resize(
        images, size=fn.cast(sides, dtype=types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True
    )
    return fn.slice(images, start=corner, shape=(image_size, image_size), axes=(0, 1))


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return lines[after] if lines else type(error).__name__
