"""What a call is given, checked in one way by all attacks; on a GPU without waiting for it."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.errors import UserError

# Undoing a normalisation rounds; pixels that were never scaled to [0, 1] are far beyond.
SLACK = 1e-3
HALF_SLACK = 1e-2
ROW_SLACK = 5e-3  # of the sum of a row of probabilities, which half precision may have rounded
STANDARDISED = 10.0  # no image that is normalised by mean and standard deviation is farther from 0
UNNORMALISE = "make their normalisation the model's first layer"


def slack(dtype: torch.dtype) -> float:
    """By how much images may leave [0, 1] through rounding; attacks clamp them."""
    return HALF_SLACK if dtype in (torch.float16, torch.bfloat16) else SLACK


def check_range(
    low: float, high: float, within: float = SLACK, *, which: str = "", normalised: str = UNNORMALISE
) -> None:
    """Raise UserError unless pixels from `low` to `high` are in [0, 1], but for rounding; its advice fits
    what was seen.

    normalised: what to do about images that are.
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
    """A copy of `labels` beside the images `x`: int64 classes (N,), or probabilities (N, K) in their dtype.

    labels: a tensor, or what `torch.as_tensor` takes: a list, a numpy array.

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
            f"rows of labels must be probabilities, got {labels.dtype}; use labels.float(), or labels.argmax(1)"
        )
    return labels.detach().to(x.device, torch.int64 if labels.dim() == 1 else x.dtype, copy=True)


def check_classes(labels: Tensor | None, classes: int) -> None:
    """Raise UserError where rows of probabilities are not about `classes`."""
    if labels is not None and labels.dim() == 2 and labels.shape[1] != classes:
        raise UserError(
            f"labels are rows of {labels.shape[1]} probabilities, the model has {classes} classes"
        )


def check_model(model: object) -> None:
    """Raise UserError unless `model` is a module: what is no module has no mode to be put in and no weights
    to be followed.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; wrap what computes the logits in one"
        )


def check_targets(targets: Tensor, classes: int) -> None:
    """Raise UserError unless all that a user's function returned, int64 (N,), are classes. Waits for the
    device.
    """
    outside = targets[(targets < 0) | (targets >= classes)]
    if outside.numel():
        raise UserError(
            f"target_map_function returned class {int(outside[0])}, but the model's classes are 0 to {classes - 1}; "
            "return one of them for each image"
        )


def check_number(name: str, value: Any) -> None:
    """Raise UserError unless `value` is one number; a tensor or an array of one counts."""
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"{name} must be one number in pixel units, such as 8/255, got {value!r}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise UserError unless `value` is a whole number from `least` on."""
    try:
        enough = operator.index(value) >= least
    except TypeError:
        raise UserError(f"{name} must be a whole number, got {value!r}") from None
    if not enough:
        raise UserError(f"{name} must be >= {least}, got {value}")


class Deferred:
    """Has numbers judged that are still being computed.

    On the CPU at once. On a GPU the first ones are waited for; later ones are copied to the host beside what
    else is done, and judged by the next call that finds them there: a verdict then comes a call late, but no
    call waits.
    """

    def __init__(self, judge: Callable[..., None]) -> None:
        """judge: called with the numbers, what they were given with, and which call they are of, in words."""
        self._judge, self._first = judge, True
        self._pending: tuple[torch.cuda.Event, Tensor, tuple[Any, ...]] | None = None

    def __call__(self, numbers: Tensor, *about: Any) -> None:
        """numbers: (n,), of one dtype."""
        if not numbers.is_cuda or self._first:
            self._first = False
            self._judge(numbers.tolist(), *about, "")
            return
        if self._pending is not None and self._pending[0].query():
            _, earlier, its = self._pending
            self._pending = None
            self._judge(earlier.tolist(), *its, " (of an earlier call)")
        if self._pending is None:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (event, host, about)


class InputCheck:
    """Refuses images outside [0, 1], classes outside [0, K), and rows of numbers that are no probabilities
    (see `Deferred`).
    """

    def __init__(self, normalised: str = UNNORMALISE) -> None:
        """normalised: what to do about images that are normalised."""
        self._normalised, self._later = normalised, Deferred(self._judge)

    def __call__(
        self,
        x: Tensor | None,
        labels: Tensor | None = None,
        classes: int | None = None,
        *,
        within: float = SLACK,
    ) -> None:
        """x: (N, C, H, W) floats. labels: as `as_labels` gives them. None: not to be checked. classes: K;
        None: not known.
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

    def _judge(
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
