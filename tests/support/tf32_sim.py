"""TF32 on the CPU: float32 convolutions and matrix products round their factors as Ampere GPUs do.

Each honours the flag that cuDNN or cuBLAS would: `torch.backends.cudnn.conv.fp32_precision`, which allows
TF32 by default, and `torch.backends.cuda.matmul.fp32_precision`, which does not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
CONVOLUTIONS = {ATEN.convolution.default: (0, 1), ATEN.convolution_backward.default: (0, 1, 2)}
PRODUCTS = {ATEN.mm.default: (0, 1), ATEN.bmm.default: (0, 1), ATEN.addmm.default: (1, 2)}


def rounded(x: Tensor) -> Tensor:
    """float32 with a 10-bit fraction, to nearest, ties to even (NVIDIA's `cvt.rna` differs on ties only)."""
    bits = x.detach().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class SimulatedTF32(TorchDispatchMode):
    """Attributes: `rounded`, how many operators were computed in TF32; `full`, how many in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = self.full = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = {**CONVOLUTIONS, **PRODUCTS}.get(func)
        if factors is None or args[factors[0]].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        flags: Any = torch.backends.cudnn.conv if func in CONVOLUTIONS else torch.backends.cuda.matmul
        if flags.fp32_precision != "tf32":
            self.full += 1
            return func(*args, **(kwargs or {}))
        self.rounded += 1
        return func(*(rounded(a) if i in factors else a for i, a in enumerate(args)), **(kwargs or {}))
