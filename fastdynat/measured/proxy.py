"""What is timed for the choice: forward pass and input gradient of a few convolutions that stand for a network's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.ops import available_backends, winograd_conv3x3, winograd_weights

TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (channels in, channels out, stride) from 32x32 on: the first two stages of a ResNet. The strided one is where oneDNN's input
# gradient depends most on the memory format.
LAYERS = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1))
SIZE, MIN_BATCH = 32, 4
# For a type without instructions, where the layers above take minutes: a 300th of their arithmetic.
TINY_LAYERS, TINY_SIZE = ((64, 64, 1),), 12


@dataclass(frozen=True)
class Setting:
    """How convolutions are computed.

    Attributes:
        amp: "off" (float32), "bf16" or "fp16".
        channels_last: memory format of images and weights.
        winograd: the layers that Winograd's algorithm may compute are computed by it.
    """

    amp: str = "off"
    channels_last: bool = False
    winograd: bool = False

    @property
    def name(self) -> str:
        """As tables print it, and under which its time is kept."""
        words = ["float32" if self.amp == "off" else self.amp, "channels-last" if self.channels_last else "contiguous"]
        return ", ".join(words + ["Winograd"] * self.winograd)


def settings(types: Sequence[str]) -> list[Setting]:
    """All that can be asked of the CPU in `types`, float32 before them."""
    found = [Setting(amp, last) for amp in ("off", *types) for last in (False, True)]
    if available_backends()["cpp"] is None:
        found += [Setting("off", last, winograd=True) for last in (False, True)]
    return found


def passes(setting: Setting, *, tiny: bool = False) -> Callable[[], object]:
    """One forward pass and input gradient under `setting`. Draws nothing from torch's generators."""
    layers, size, batch = (TINY_LAYERS, TINY_SIZE, 1) if tiny else (LAYERS, SIZE, max(MIN_BATCH, torch.get_num_threads()))
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    dtype = TYPES[setting.amp]
    steps = [_layer(setting, torch.randn(k, c, 3, 3, generator=generator) / (3 * c**0.5), stride) for c, k, stride in layers]
    x = torch.randn(batch, layers[0][0], size, size, generator=generator).to(dtype).contiguous(memory_format=layout)

    def call() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            y = leaf = x.detach().requires_grad_()
            for step in steps:
                y = step(y)
            return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    return call


def _layer(setting: Setting, weight: Tensor, stride: int) -> Callable[[Tensor], Tensor]:
    if setting.winograd and stride == 1:
        transformed = winograd_weights(weight, backend="cpp")
        return lambda x: winograd_conv3x3(x, *transformed, backend="cpp").relu()
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    weight = weight.to(TYPES[setting.amp]).contiguous(memory_format=layout)
    return lambda x: F.conv2d(x, weight, stride=stride, padding=1).relu()
