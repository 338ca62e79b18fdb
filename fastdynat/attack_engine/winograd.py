"""Convolutions of the attacked network by Winograd's algorithm: in float32 on the CPU, where arithmetic is
the limit.

Transforming the weights takes as long as many passes, so a layer is computed so only where that repays it
(`fastdynat.tuning.Convolution`), and its weights are transformed when it first is after they have changed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.network_comparison import answer
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.machine import vector_bits
from fastdynat.ops import available_backends, winograd_conv3x3, winograd_weights
from fastdynat.tuning import Convolution, Costs

# oneDNN's time over Winograd's on one AVX2 core is 1.2 with 48 channels, 0.9 with 32, 0.4 with 3.
MIN_CHANNELS = 64
# Names the rule of `WinogradConv2d` in records of runs: another rule rounds otherwise, so another needs
# another name.
RULE = "per layer, where it repays its weights"


class Filters:
    """The transformed weights of one layer. An object of its own, so that shallow copies of a layer share its
    state.

    Attributes:
        transformed: (36, C, K) and (36, K, C); None until they are first needed.
        source: the weight that they were made of, where weights are compared.
        current: they are those of the weight of now.
        kept: every refresh makes them so.
    """

    def __init__(self) -> None:
        self.transformed: tuple[Tensor, Tensor] | None = None
        self.source: Tensor | None = None
        self.current = self.kept = False


class Outlook:
    """What the layers of a replica know in common.

    Attributes:
        passes: pairs of forward and backward passes that the weights of now have served or are about to
            serve; infinite until weights are first taken over.
        static: calls may be compiled or captured, so that a layer cannot transform its weights when it is
            called.
        compares: whether taking over weights looks if they have changed.
        seen: where it is a list, layers note in it what they are called with, and compute directly.
    """

    def __init__(self, *, static: bool, compares: bool) -> None:
        self.passes, self.static, self.compares = math.inf, static, compares
        self.costs = Costs.with_vectors(vector_bits())
        self.seen: list[tuple[WinogradConv2d, Convolution]] | None = None


class WinogradConv2d(nn.Conv2d):
    """What `use_winograd` makes of a convolution. Weight and bias are still its own: others may read them."""

    filters: Filters
    outlook: Outlook

    def forward(self, x: Tensor) -> Tensor:
        """``nn.Conv2d.forward``, which itself takes what it is better at."""
        if not (self._possible(x) and self._taken(x)):
            return super().forward(x)
        assert self.filters.transformed is not None
        out = winograd_conv3x3(x, *self.filters.transformed, self.bias, backend="cpp")
        # As nn.Conv2d answers: contiguous ones may be viewed otherwise afterwards.
        return out if self._channels_last(x) else out.contiguous()

    def _possible(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.numel() == 0 or x.dtype != torch.float32 or x.device.type != "cpu":
            return False
        return not (torch.is_autocast_enabled("cpu") or self.weight.requires_grad)

    def _taken(self, x: Tensor) -> bool:
        filters, outlook = self.filters, self.outlook
        (n, c, height, width), k = x.shape, self.out_channels
        work = Convolution(n, c, k, height, width, self._channels_last(x))
        if outlook.seen is not None:
            outlook.seen.append((self, work))
            return False
        if outlook.static or torch.compiler.is_compiling():
            return filters.kept and work.gain(outlook.costs) > 0
        if not filters.current and work.repays(outlook.costs, outlook.passes):
            self.transform()
        return filters.current and work.gain(outlook.costs) > 0

    def _channels_last(self, x: Tensor) -> bool:
        last = torch.channels_last
        return x.is_contiguous(memory_format=last) or self.weight.is_contiguous(memory_format=last)

    def transform(self) -> None:
        """Take over the weight of now; in place but for the first time."""
        filters = self.filters
        with torch.inference_mode(False), torch.no_grad():
            filters.transformed = winograd_weights(self.weight, out=filters.transformed, backend="cpp")
            if self.outlook.compares:
                filters.source = _copied(self.weight, filters.source)
        filters.current = True


class WinogradLayers:
    """The convolutions of `network` that may be computed by Winograd's algorithm; changes them in place.

    The layers themselves are changed, so that whoever calls them by whatever name finds them so. They need a
    `refresh` after every change of their weights, and a `prepare` before an attack.
    """

    def __init__(self, network: nn.Module, *, static: bool = False, compares: bool = False) -> None:
        """
        Args:
            static, compares: as in `Outlook`.
        """
        self._outlook = Outlook(static=static, compares=compares)
        self._network = network
        self.layers = use_winograd(network, self._outlook)
        self._works: dict[Any, list[tuple[WinogradConv2d, Convolution]]] = {}
        self._witness = self._copy_of_least() if compares and self.layers else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights of now. Where they are not compared they count as changed."""
        if not self.layers:
            return
        compares = self._outlook.compares
        if self._witness is None or not torch.equal(self._witness, self._least().weight):
            self._outlook.passes = 0.0
            self._witness = self._copy_of_least() if compares else None
        for layer in self.layers:
            filters = layer.filters
            filters.current = filters.current and compares and torch.equal(filters.source, layer.weight)  # type: ignore[arg-type]
            if filters.kept and not filters.current:
                layer.transform()

    def prepare(self, x: Tensor, passes: float) -> None:
        """Images `x` (N, C, H, W), laid out as the network takes them, are about to pass forward and backward
        so often.
        """
        if not self.layers:
            return
        self._outlook.passes += passes
        if self._outlook.static:
            self._keep(x)

    def _keep(self, x: Tensor) -> None:
        """Transform, from now on at every refresh, what pays at images like `x`: code that is compiled may
        read it.
        """
        key = (x.shape, x.stride(), x.dtype)
        if key not in self._works:
            self._works[key] = self._watch(x)
        for layer, work in self._works[key]:
            if not layer.filters.kept and work.repays(self._outlook.costs, self._outlook.passes):
                layer.filters.kept = True
                if not layer.filters.current:
                    layer.transform()

    def _watch(self, x: Tensor) -> list[tuple[WinogradConv2d, Convolution]]:
        """What the layers are called with in a forward pass of `x`, which moves no statistics."""
        seen: list[tuple[WinogradConv2d, Convolution]] = []
        self._outlook.seen = seen
        try:
            with attack_mode(self._network, "eval"):
                answer(self._network, x)
        finally:
            self._outlook.seen = None
        return seen

    def _least(self) -> WinogradConv2d:
        return min(self.layers, key=lambda layer: layer.weight.numel())

    def _copy_of_least(self) -> Tensor:
        return _copied(self._least().weight, None)


def use_winograd(network: nn.Module, outlook: Outlook) -> Sequence[WinogradConv2d]:
    """Change the convolutions of `network` that may become `WinogradConv2d`, in place; none without the
    extension.
    """
    if available_backends()["cpp"] is not None:
        return ()
    changed: list[Any] = [module for module in network.modules() if _may(module)]
    for module in changed:
        module.__class__ = WinogradConv2d
        module.filters, module.outlook = Filters(), outlook
    return changed


def _may(module: nn.Module) -> bool:
    layer: Any = module
    return (
        type(module) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.dilation, layer.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and (layer.padding, layer.padding_mode) in (((1, 1), "zeros"), ("same", "zeros"))
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and not layer.weight.requires_grad
        and min(layer.in_channels, layer.out_channels) >= MIN_CHANNELS
        # Hooks would still run, but what computes weights in them or calls something else is not ours to
        # know.
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    )


def _copied(weight: Tensor, out: Tensor | None) -> Tensor:
    return weight.detach().clone() if out is None else out.copy_(weight.detach())
