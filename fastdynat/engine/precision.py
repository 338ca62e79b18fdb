"""Mixed precision, in the update and in the attack."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp.grad_scaler import GradScaler

from fastdynat.attacks import Underflow
from fastdynat.devices import AMP_DTYPES


class Precision:
    """Autocast, the update's gradient scaler and the attack's guard against underflow for one of "off", "bf16", "fp16".

    fp16 needs both: the dynamic scaler for weight gradients, and a guard in the attack, whose gradients the scaler never sees.
    """

    def __init__(self, amp: str, device: torch.device, attack_bn: str) -> None:
        self.device, self.dtype = device, AMP_DTYPES[amp]
        self.scaler = GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.underflow = Underflow.guard(attack_bn, self.dtype)

    def autocast(self) -> AbstractContextManager[object]:
        """A region for one step; never around an optimiser step, whose weights it would serve stale."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()
