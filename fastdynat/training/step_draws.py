"""Random numbers of training steps: a function of the run's seed, the step and the image alone."""

import itertools

import torch
from torch import Tensor

from fastdynat.ops.image_draws import ImageDraws

STEP = 36  # bits of the counter below the step's number
REPLAY = 64  # draws of one replay


class StepDraws:
    """The source of the draws of one step after the other, in memory that a captured step reads anew.

    Attributes:
        state: int64 (2,) on the device.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.state = torch.tensor([seed, 0], dtype=torch.int64, device=device)

    def begin(self, step: int) -> None:
        """Write the state of step number `step`, without waiting for the device."""
        self.state[1].fill_(step << STEP)

    def of(self, images: Tensor, replay: int) -> ImageDraws:
        """The draws for `images`, int64 (N,) numbers in the training set, in replay number `replay`."""
        return ImageDraws(self.state, images, numbers=itertools.count(replay * REPLAY))
