"""Mixed precision of the update; the attack has its own, `fastdynat.attacks.AttackSwitches.dtype`."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp.grad_scaler import GradScaler

from fastdynat.tuning.devices import AMP_DTYPES


class Precision:
    """Autocast and the gradient scaler for one of "off", "bf16", "fp16"."""

    def __init__(self, amp: str, device: torch.device) -> None:
        self.device, self.dtype = device, AMP_DTYPES[amp]
        self.scaler = GradScaler(device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast for forward passes; not around an optimiser step, after which it has stale weights."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()
