"""Checks of images, labels and numbers, the same for all attacks; they do not synchronise a GPU."""

import math
import operator
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.errors import UserError

# Pixels may leave [0, 1] by this much: undoing a normalisation rounds. Unscaled pixels leave it by far more.
SLACK = 1e-3
HALF_SLACK = 1e-2
ROW_SLACK = 5e-3  # of the sum of a row of probabilities, after rounding to half precision
STANDARDISED = 10.0  # bound of images normalised by mean and standard deviation
UNNORMALISE = "make their normalisation the model's first layer"


def slack(dtype: torch.dtype) -> float:
    """Distance by which rounding may take images out of [0, 1]; attacks clamp them."""
    return HALF_SLACK if dtype in (torch.float16, torch.bfloat16) else SLACK


def check_range(
    low: float, high: float, within: float = SLACK, *, which: str = "", normalised: str = UNNORMALISE
) -> None:
    """Raise UserError, with fitting advice, unless pixels from `low` to `high` are in [0, 1] up to rounding.

    Args:
        within: the slack allowed.
        which: added to "images" in the message.
        normalised: the advice for normalised images.
    """
    if low >= -within and high <= 1 + within:
        return
    if math.isnan(low) or math.isnan(high):
        raise UserError(
            f"images{which} hold NaN: look for a division by 0 or a broken file where they are made"
        )
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"images{which} hold infinity: look for an overflow where they are made")
    found = f"images{which} must be in [0, 1], got [{low:g}, {high:g}]; "
    if low >= -within and high > STANDARDISED:
        raise UserError(f"{found}divide by 255")
    if low < -within and -1 - within <= low and high <= 1 + within:
        raise UserError(f"{found}(images + 1) / 2 if they were scaled to [-1, 1], else {normalised}")
    if low >= -STANDARDISED and high <= STANDARDISED:
        raise UserError(f"{found}they look normalised: {normalised}")
    raise UserError(f"{found}divide by 255 what is in 0 .. 255; for normalised images {normalised}")


def as_labels(labels: Any, x: Tensor) -> Tensor:
    """A copy of `labels` on the device of `x`: int64 classes (N,), or probabilities (N, K) in their dtype.

    labels: a tensor, or anything `torch.as_tensor` takes, as a list or numpy array.

    Raises:
        UserError: another shape, or classes that are no integers.
    """
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"labels must be a tensor of classes, got {type(labels).__name__}; use torch.as_tensor"
        ) from None
    shape = tuple(labels.shape)
    if labels.dim() == 2 and shape[1] == 1:
        raise UserError(f"labels of shape {shape} are one class per image in a column; use labels[:, 0]")
    if shape[:1] != x.shape[:1] or labels.dim() > 2:
        raise UserError(f"{len(x)} images but labels of shape {shape}; give one class per image")
    if labels.dim() == 1 and (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    ):
        raise UserError(f"labels must be classes, got {labels.dtype}; use labels.long()")
    if labels.dim() == 2 and not labels.is_floating_point():
        raise UserError(
            f"rows of labels must be probabilities, got {labels.dtype}; "
            "use labels.float(), or labels.argmax(1)"
        )
    return labels.detach().to(x.device, torch.int64 if labels.dim() == 1 else x.dtype, copy=True)


def check_label_rows(labels: Tensor | None, classes: int) -> None:
    """Raise UserError where labels are rows of probabilities for another number of classes."""
    if labels is not None and labels.dim() == 2 and labels.shape[1] != classes:
        raise UserError(
            f"labels are rows of {labels.shape[1]} probabilities, the model has {classes} classes"
        )


def check_model(model: object) -> None:
    """Raise UserError unless `model` is a module, which has modes to set and weights to follow."""
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; "
            "wrap what computes the logits in one"
        )


def check_targets(targets: Tensor, classes: int) -> None:
    """Raise UserError unless the result of a user's function, int64 (N,), are classes. Synchronises."""
    outside = targets[(targets < 0) | (targets >= classes)]
    if outside.numel():
        raise UserError(
            f"target_map_function returned class {int(outside[0])}, "
            f"but the model's classes are 0 to {classes - 1}; return one of them for each image"
        )


def check_number(name: str, value: Any) -> None:
    """Raise UserError unless `value` is one number, or a tensor or array of one."""
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"{name} must be one number in pixel units, such as 8/255, got {value!r}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise UserError unless `value` is an integer of at least `least`."""
    try:
        enough = operator.index(value) >= least
    except TypeError:
        raise UserError(f"{name} must be a whole number, got {value!r}") from None
    if not enough:
        raise UserError(f"{name} must be >= {least}, got {value}")


class DeferredCheck:
    """Checks numbers that a device is still computing, without waiting for it.

    On the CPU the check runs at once. On a GPU the first one waits; later numbers are copied to the host
    asynchronously, and each call checks those of earlier calls that are there: an error then comes late, and
    for numbers that no later call finds there not at all.
    """

    def __init__(self, check: Callable[..., None]) -> None:
        """check: called with the numbers, `about`, and the call they belong to, in words."""
        self._check = check
        self._first = True
        self._pending: deque[tuple[torch.cuda.Event, Tensor, tuple[Any, ...]]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """Without the numbers on their way, which are this object's to check: events cannot be copied."""
        return {**vars(self), "_pending": deque()}

    def __call__(self, numbers: Tensor, *about: Any) -> None:
        """numbers: (n,), of one dtype."""
        if not numbers.is_cuda or self._first:
            self._first = False
            self._check(numbers.tolist(), *about, "")
            return
        earlier = len(self._pending)
        self._pending.append((*_on_their_way(numbers), about))
        for _ in range(earlier):
            oldest = self._oldest_there()
            if oldest is None:
                return
            host, its_about = oldest
            self._check(host.tolist(), *its_about, " (of an earlier call)")

    def _oldest_there(self) -> tuple[Tensor, tuple[Any, ...]] | None:
        """The oldest numbers, if they are there. Taken before they are asked for: threads share a check."""
        with suppress(IndexError):
            oldest = self._pending.popleft()
            if oldest[0].query():
                return oldest[1:]
            self._pending.appendleft(oldest)
        return None


def _on_their_way(numbers: Tensor) -> tuple[torch.cuda.Event, Tensor]:
    """Numbers that are being copied to the host, and the event after which they are there."""
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    return torch.cuda.current_stream(numbers.device).record_event(), host


class InputCheck:
    """Raises UserError for images outside [0, 1], classes outside [0, K) and rows that are no probabilities.

    Checks are deferred on a GPU (`DeferredCheck`).
    """

    def __init__(self, normalised: str = UNNORMALISE) -> None:
        """normalised: the advice for normalised images."""
        self._normalised = normalised
        self._later = DeferredCheck(self._check)

    def __call__(
        self,
        x: Tensor | None,
        labels: Tensor | None = None,
        classes: int | None = None,
        *,
        within: float = SLACK,
    ) -> None:
        """
        Args:
            x: (N, C, H, W) floats; None is not checked.
            labels: as `as_labels` returns them; None is not checked.
            classes: K; None where it is not known.
            within: the slack allowed for images.
        """
        some = labels if x is None else x
        if some is None or some.numel() == 0:
            return
        check = [torch.zeros((), device=some.device)] * 2 if x is None else [*torch.aminmax(x)]
        if labels is not None and labels.dim() == 1:
            check += torch.aminmax(labels)
        elif labels is not None:
            check += [labels.amin(), (labels.sum(1) - 1).abs().amax()]
        rows = labels is not None and labels.dim() == 2
        self._later(torch.stack([value.double() for value in check]), classes, rows, within)

    def _check(
        self, numbers: list[float], classes: int | None, rows: bool, within: float, which: str
    ) -> None:
        low, high, *labels = numbers
        check_range(low, high, within, which=which, normalised=self._normalised)
        if not labels:
            return
        least, most = labels
        if rows and not (least >= 0 and most <= ROW_SLACK):  # NaN fails too
            found = f"one of {least:g}" if least < 0 else f"a sum that is {most:g} away from 1"
            raise UserError(
                f"rows of labels{which} must be probabilities, >= 0 and of sum 1, got {found}; use softmax(1)"
            )
        if not rows and not (least >= 0 and (classes is None or most < classes)):
            known = "the model's classes" if classes is None else f"in [0, {classes}), the model's classes"
            raise UserError(f"labels{which} must be {known}, got {least:g} to {most:g}; number them from 0")
