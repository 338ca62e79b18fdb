"""State of a network that its replica does not follow: numbers in Python, tensors put in another's place."""

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.network_comparison import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCES,
    reference_logits,
    relative_difference,
)
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.network_state import network_state
from fastdynat.errors import UserError


class FollowedState:
    """Checks that the replica of `engine` still computes what `model` does.

    A refresh copies the tensors that the network had when the replica was made. A number that the network's
    code has changed since then keeps its old value there, and so does a buffer that it replaced by another
    tensor, as ``self.mean = 0.9 * self.mean + 0.1 * m`` does.
    """

    def __init__(self, model: nn.Module, engine: AttackEngine, example: Tensor) -> None:
        """example: (n, C, H, W) images as the model takes them."""
        self._model, self._engine, self._example = model, engine, example
        self._marks = network_state(model).marks

    def check(self) -> None:
        """Raise UserError if state that the replica does not follow has changed the logits in eval mode.

        Refreshes the replica. Networks without such a change are not called.
        """
        marks = network_state(self._model).marks
        if marks == self._marks:
            return
        self._engine.refresh()
        x, ascent = self._example, self._engine.ascent
        x = self._engine.to_memory_format(x)
        with attack_mode(self._model, "eval"), ascent.autocast(x):
            want = reference_logits(self._model, x)
        replica = self._engine.replica.network
        with attack_mode(replica, "eval"), ascent.autocast(x):
            got = reference_logits(replica, x)
        most = FLOAT32_TOLERANCE if ascent.dtype is None else HALF_TOLERANCES[ascent.dtype][0]
        difference = relative_difference(want, got, torch.max)
        if not difference <= most:
            raise UserError(
                f"{type(self._model).__name__} changes state while it trains that attacks do not follow: its "
                f"logits differ by {difference:.1g} of theirs from those of its attacked copy; keep that "
                "state in a tensor (self.register_buffer), changed in place (self.mean.mul_(0.9), not "
                "self.mean = ...)"
            )
        self._marks = network_state(self._model).marks  # the passes above may have moved it, too
