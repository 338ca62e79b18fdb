"""State of a network that a checkpoint does not hold: everything outside of its state_dict()."""

import copy

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.network_comparison import (
    LOGIT_TOLERANCE,
    reference_logits,
    relative_difference,
)
from fastdynat.attack_engine.network_modes import attack_mode, loading_twin, loose_tensors, separate_copy
from fastdynat.attack_engine.network_state import network_state
from fastdynat.errors import UserError


class StoredState:
    """Checks that a network built anew and loaded from a checkpoint computes what `model` does.

    A non-persistent buffer, a tensor in a plain attribute or a Python number that the network's code changes
    while it trains is in no checkpoint: resumed, exported and evaluated networks would compute without it.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """example: (n, C, H, W) images as the model takes them."""
        self._model, self._example = model, example
        self._anew = loading_twin(model)
        self._note()

    def _note(self) -> None:
        self._marks = network_state(self._model).marks
        self._values = [t.detach().clone() for t in loose_tensors(self._model)]

    def check(self) -> None:
        """Raise UserError if state outside of state_dict() has changed and changes the logits in eval mode.

        Only copies of the network are called, and none at all without such a change.
        """
        if not self._changed():
            return
        got = self._logits(self._loaded())
        want = self._logits(separate_copy(self._model))
        difference = relative_difference(want, got, torch.max)
        if not difference <= LOGIT_TOLERANCE:
            raise UserError(
                f"{type(self._model).__name__} changes state while it trains that its state_dict(), and so a "
                f"checkpoint, does not hold: loaded again, its logits differ by {difference:.1g} of theirs; "
                "make that state a persistent buffer (self.register_buffer), changed in place"
            )
        self._note()

    def _changed(self) -> bool:
        now = loose_tensors(self._model)
        return (
            network_state(self._model).marks != self._marks
            or len(now) != len(self._values)
            or not all(map(_equal, now, self._values))
        )

    def _loaded(self) -> nn.Module:
        loaded = copy.deepcopy(self._anew)
        try:
            # Not strict: what a lazily made module adds is of no interest here, only what is computed.
            loaded.load_state_dict(self._model.state_dict(), strict=False)
        except RuntimeError:
            raise UserError(
                f"a checkpoint of {type(self._model).__name__} cannot be loaded, since tensors in its "
                "state_dict() change their shapes while it trains; keep their shapes"
            ) from None
        return loaded

    def _logits(self, network: nn.Module) -> Tensor:
        x = self._example
        with attack_mode(network, "eval"), torch.autocast(x.device.type, enabled=False):
            return reference_logits(network, x)


def _equal(a: Tensor, b: Tensor) -> bool:
    """True if the values are known to be the same; NaN equals NaN."""
    try:
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    except RuntimeError:  # of a layout that cannot be compared
        return False
