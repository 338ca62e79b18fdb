"""The timed workload: forward passes and input gradients of a network's most expensive convolutions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.machine import vector_bits
from fastdynat.ops import winograd_conv3x3, winograd_usable, winograd_weights
from fastdynat.tuning.convolution_costs import Convolution, Costs

TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Multiply-adds of a timed forward pass, milliseconds in float32, and images: with fewer, reading the weights
# decides, which it does no longer with four. A batch of any size is timed so; how settings compare changes
# little from there on (but `scale`).
ENOUGH, LEAST_IMAGES = 1.5e8, 4
MOST_LAYERS = 6
WINOGRAD_CHANNELS = 64


@dataclass(frozen=True)
class Layer:
    """A convolution with square filters, which a network has `count` times.

    Attributes:
        height, width: of its input.
    """

    channels_in: int
    channels_out: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1
    count: int = 1

    @property
    def products(self) -> float:
        """Multiply-adds for an image, of all that are alike."""
        outputs = (self.height // self.stride) * (self.width // self.stride) * self.channels_out
        return float(self.count * outputs * self.kernel**2 * (self.channels_in // self.groups))

    def timed_images(self, batch: int) -> int:
        """The number of images that are timed in place of `batch`."""
        return min(batch, max(LEAST_IMAGES, round(ENOUGH * self.count / max(self.products, 1.0))))

    def repays(self, batch: int, passes: float, channels_last: bool) -> bool:
        """True if `attack_engine.winograd_layers`, where allowed, uses Winograd's algorithm for it."""
        shape = (self.kernel, self.stride, self.padding, self.groups)
        if shape != (3, 1, 1, 1) or min(self.channels_in, self.channels_out) < WINOGRAD_CHANNELS:
            return False
        return self._at(batch, channels_last).repays(Costs.with_vectors(vector_bits()), passes)

    def scale(self, batch: int, channels_last: bool) -> float:
        """The factor from Winograd's time on `timed_images` to that on `batch`, relative to a direct one's.

        Its weights are four times as many, so that a few images are not representative of a batch.
        """
        costs = Costs.with_vectors(vector_bits())
        few, all_ = (self._at(n, channels_last) for n in (self.timed_images(batch), batch))
        gains = [work.direct(costs) / work.winograd(costs) for work in (few, all_)]
        return round(gains[0] / gains[1], 1)

    def _at(self, images: int, channels_last: bool) -> Convolution:
        return Convolution(
            images, self.channels_in, self.channels_out, self.height, self.width, channels_last
        )


@dataclass(frozen=True)
class Workload:
    """The layers that take most of a network's time, at a batch of so many images.

    Attributes:
        passes: pairs of passes between two changes of the weights; infinite where nothing is trained.
    """

    layers: tuple[Layer, ...]
    batch: int = LEAST_IMAGES
    passes: float = float("inf")

    @classmethod
    def of(cls, layers: Iterable[Layer], batch: int, passes: float) -> "Workload":
        """The `MOST_LAYERS` largest of a network's; those of `ANY` where it has none."""
        counted: dict[Layer, int] = {}
        for layer in layers:
            counted[replace(layer, count=1)] = counted.get(replace(layer, count=1), 0) + layer.count
        found = sorted(
            (replace(layer, count=n) for layer, n in counted.items()), key=lambda layer: -layer.products
        )
        return cls(tuple(found[:MOST_LAYERS]) or ANY.layers, batch, passes)


# A ResNet-18's stages on 32x32 images: the widest one, whose weights are many and maps small, has the other
# memory format's preferences. The strided one is where oneDNN's input gradient depends most on it.
ANY = Workload(
    (
        Layer(64, 64, 32, 32, count=4),
        Layer(128, 128, 16, 16, count=3),
        Layer(256, 256, 8, 8, count=3),
        Layer(512, 512, 4, 4, count=3),
        Layer(64, 128, 32, 32, stride=2),
    ),
    batch=128,
)
# For a type without instructions, where the layers above take minutes: a 300th of their arithmetic.
TINY = Workload((Layer(64, 64, 12, 12),), batch=1)


@dataclass(frozen=True)
class ConvolutionSetting:
    """Precision, memory format and algorithm of convolutions.

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
        """The name in tables and stored measurements."""
        words = [
            "float32" if self.amp == "off" else self.amp,
            "channels-last" if self.channels_last else "contiguous",
        ]
        return ", ".join(words + ["Winograd"] * self.winograd)

    @property
    def direct(self) -> "ConvolutionSetting":
        """The same setting without Winograd's algorithm."""
        return replace(self, winograd=False)


def convolution_settings(types: Sequence[str]) -> list[ConvolutionSetting]:
    """All settings on the CPU: in float32, then in `types`, then with Winograd's algorithm if it may run."""
    found = [ConvolutionSetting(amp, last) for amp in ("off", *types) for last in (False, True)]
    if winograd_usable(torch.device("cpu")):
        found += [ConvolutionSetting("off", last, winograd=True) for last in (False, True)]
    return found


def passes(
    setting: ConvolutionSetting, layer: Layer = ANY.layers[0], images: int = LEAST_IMAGES
) -> Callable[[], object]:
    """A call of `layer`'s forward pass and input gradient under `setting`. Uses no global generator."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    c, k = layer.channels_in // layer.groups, layer.channels_out
    weight = torch.randn(k, c, layer.kernel, layer.kernel, generator=generator) / (layer.kernel * c**0.5)
    step = _step(setting, layer, weight)
    x = torch.randn(images, layer.channels_in, layer.height, layer.width, generator=generator)
    x = x.to(TYPES[setting.amp]).contiguous(memory_format=layout)

    def call() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            leaf = x.detach().requires_grad_()
            y = step(leaf)
            return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    return call


def update_call(setting: ConvolutionSetting, layer: Layer, images: int) -> Callable[[], object]:
    """As `passes`, with the gradient of the weights, which are trained in float32."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    shape = (layer.channels_out, layer.channels_in // layer.groups, layer.kernel, layer.kernel)
    weight = torch.randn(shape, generator=generator).contiguous(memory_format=layout)
    x = torch.randn(images, layer.channels_in, layer.height, layer.width, generator=generator).contiguous(
        memory_format=layout
    )
    half = setting.amp != "off"

    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            with torch.autocast("cpu", dtype=TYPES[setting.amp] if half else torch.bfloat16, enabled=half):
                y = F.conv2d(*leaves, stride=layer.stride, padding=layer.padding, groups=layer.groups).relu()
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return call


def _step(setting: ConvolutionSetting, layer: Layer, weight: Tensor) -> Callable[[Tensor], Tensor]:
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    if setting.winograd:
        transformed = winograd_weights(weight, backend="cpp")
        return lambda x: (
            winograd_conv3x3(x, *transformed, backend="cpp").contiguous(memory_format=layout).relu()
        )
    weight = weight.to(TYPES[setting.amp]).contiguous(memory_format=layout)
    stride, padding, groups = layer.stride, layer.padding, layer.groups
    return lambda x: F.conv2d(x, weight, stride=stride, padding=padding, groups=groups).relu()
