"""Switches of the attack engine: each a way to compute the same attack faster."""

from dataclasses import dataclass
from typing import Any

import torch

from fastdynat.tuning.devices import AMP_DTYPES, pick_channels_last, winograd_pays


@dataclass(frozen=True, kw_only=True)
class AttackSwitches:
    """Optimisations that the engine may use. They change numbers by rounding only, never the algorithm.

    Attributes:
        dtype: half-precision type of the attacked network (`Ascent.dtype`); None keeps the model's own.
        channels_last: run the network in channels-last memory format.
        fold: fold eval-mode batch norm into the layer before it.
        fused_conv: compute each convolution of the folded network with its bias, residual and ReLU as one
            cuDNN kernel, where the device has it and it is verified (`fastdynat.ops.conv_relu`).
        fused_where_faster: only the layers that do not measure slower so (`fuse_where_faster`), else all.
        winograd: use Winograd's algorithm for 3x3 convolutions where it is faster: float32 on the CPU.
        closed_form: compute the loss gradient at the logits from its formula (`Ascent.closed_form`).
        compile: torch.compile mode of the gradient, "auto" (compiled where measured to be faster), or "off".
        graphs: capture the whole attack as a CUDA graph, one per batch shape.
    """

    dtype: torch.dtype | None = None
    channels_last: bool = False
    fold: bool = True
    fused_conv: bool = False
    fused_where_faster: bool = True
    winograd: bool = True
    closed_form: bool = True
    compile: str = "off"
    graphs: bool = False

    @classmethod
    def fastest(
        cls, device: torch.device, dtype: torch.dtype | None = None, **others: Any
    ) -> "AttackSwitches":
        """The memory format and convolutions that are fastest on `device`.

        Args:
            dtype: half-precision type of the network; None is float32.
            others: values of further fields; a `channels_last` of None is chosen, and `winograd` is used only
                where it pays.
        """
        amp = next((name for name, half in AMP_DTYPES.items() if half is dtype), "off")
        last = others.pop("channels_last", None)
        if last is None:
            last = pick_channels_last(amp, device, winograd=others.get("winograd", True))
        winograd = others.pop("winograd", True) and winograd_pays(device, amp, channels_last=last)
        others.setdefault("fused_conv", device.type == "cuda")
        return cls(dtype=dtype, channels_last=last, winograd=winograd, **others)
