"""Comparison of a replica's logits with its model's, at every call."""

import torch
from torch import Tensor

from fastdynat.attack_engine.network_comparison import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCES,
    LOGIT_TOLERANCE,
    logits_differ,
    reference_logits,
    relative_difference,
)
from fastdynat.compat.runner import OnModel, OnReplica

COMPARED = 2  # images of each batch
MOST_SHAPES = 64


class Agreement:
    """Compares the logits of a replica and its model at the caller's own images.

    The first batch of each shape is compared whole, since a network may branch on the shape; later batches by
    their first two images: one forward pass of two images beside an attack of tens of passes of all. This
    notices changes that cannot be seen in a model, such as the contents of a file or a value in a compiled
    extension. Random streams are left as they were; a model that draws in eval mode draws the same numbers as
    its replica.
    """

    def __init__(self) -> None:
        self._shapes: set[torch.Size] = set()
        self._most = LOGIT_TOLERANCE
        self._whole = False  # the model does not take a batch of two

    def __call__(self, on_model: OnModel, replica: OnReplica, x: Tensor) -> bool:
        """x: (N, C, H, W) images in [0, 1]."""
        if len(x) == 0:
            return True
        new = x.shape not in self._shapes and len(self._shapes) < MOST_SHAPES
        part = x if new or self._whole else x[:COMPARED]
        try:
            agrees = self._agree(on_model, replica, part)
        except (RuntimeError, ValueError):
            if part is x:
                raise
            self._whole = True
            agrees = self._agree(on_model, replica, x)
        if agrees:
            self._shapes.add(x.shape)
        return agrees

    def _agree(self, on_model: OnModel, replica: OnReplica, x: Tensor) -> bool:
        want = reference_logits(on_model.eval_logits, x)
        try:
            got = reference_logits(replica.eval_logits, x)
        except Exception:
            # The model takes these images: its code has changed, or a view needs another layout at this size.
            return False
        dtype = on_model.dtype or want.dtype
        most = HALF_TOLERANCES[dtype][0] if dtype in HALF_TOLERANCES else self._most
        if not _read(logits_differ(want, got, most)):
            return True
        if (
            on_model.dtype is not None
            and next((p.dtype for p in on_model.model.parameters()), x.dtype) not in HALF_TOLERANCES
        ):
            # Half precision itself may cost this network more.
            exact = reference_logits(OnModel(on_model.model, on_model.modes, None).eval_logits, x)
            return relative_difference(exact, got, torch.max) <= most + 3 * relative_difference(
                exact, want, torch.max
            )
        if dtype in HALF_TOLERANCES or self._shapes:
            return False
        # A new replica, already checked: its difference is rounding.
        found = relative_difference(want, got, torch.max)
        self._most = min(5 * found, FLOAT32_TOLERANCE)
        return found <= FLOAT32_TOLERANCE


def _read(flag: Tensor) -> bool:
    """The value of a bool tensor; on a GPU an event waits for the work launched before it."""
    if flag.device.type != "cuda":
        return bool(flag)
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    torch.cuda.current_stream(flag.device).record_event().synchronize()
    return bool(host)
