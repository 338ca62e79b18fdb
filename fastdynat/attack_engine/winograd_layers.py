"""Winograd's algorithm for convolutions of the attacked network: float32 on the CPU, limited by arithmetic.

Transforming the weights takes as long as many passes, so a layer uses the algorithm only where that repays
(`fastdynat.tuning.Convolution`), and transforms its weights at the first such use after they changed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastdynat.attack_engine.epilogue_fusion import fuse_epilogues
from fastdynat.attack_engine.fx_tracing import result_shapes, settle
from fastdynat.attack_engine.network_comparison import reference_logits
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.machine import vector_bits
from fastdynat.ops import permits, winograd_conv3x3, winograd_usable, winograd_weights
from fastdynat.tuning import Convolution, Costs

# With fewer channels the transforms take longer than the products that they save.
MIN_CHANNELS = 32
# Name of the rule of `WinogradConv2d` in run records; another rule rounds differently and needs a new name.
RULE = "per layer from 32 channels, where it repays its weights; gradients at images by `image_conv`"


class TransformedWeights:
    """The transformed weights of one layer; shared by shallow copies of the layer.

    Attributes:
        weights: (36, C, K) and (36, K, C); None until first needed.
        source: the weight that they were made of, where weights are compared.
        current: they belong to the layer's present weight.
        kept: every refresh transforms them again.
    """

    def __init__(self) -> None:
        self.weights: tuple[Tensor, Tensor] | None = None
        self.source: Tensor | None = None
        self.current = self.kept = False


class WinogradPolicy:
    """State that all Winograd layers of a replica share.

    Attributes:
        passes: pairs of forward and backward passes that the present weights have served or are about to
            serve; infinite until the first refresh.
        static: calls may be compiled or captured, so layers cannot transform their weights during a call.
        compares: a refresh compares weights to see if they have changed.
        recorded: a list where layers append their calls, while they compute directly; None records nothing.
    """

    def __init__(self, *, static: bool, compares: bool) -> None:
        self.passes = math.inf
        self.static = static
        self.compares = compares
        self.costs = Costs.with_vectors(vector_bits())
        self.recorded: list[tuple[WinogradConv2d, Convolution]] | None = None


class WinogradConv2d(nn.Conv2d):
    """A convolution that may use Winograd's algorithm. Its weight and bias stay, for others to read."""

    transformed: TransformedWeights
    policy: WinogradPolicy

    def forward(self, x: Tensor) -> Tensor:
        """``nn.Conv2d.forward`` for the shapes that Winograd's algorithm does not speed up."""
        if not (self._supports(x) and self._uses_winograd(x)):
            return super().forward(x)
        return self._computed(x)

    def _computed(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """By Winograd's algorithm, with what follows."""
        assert self.transformed.weights is not None
        more: Any = {"residual": residual, "relu": relu}
        out = winograd_conv3x3(x, *self.transformed.weights, self.bias, **more, backend="cpp")
        # nn.Conv2d returns a contiguous result here, which later views may need.
        return out if self._channels_last(x) else out.contiguous()

    def _supports(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.numel() == 0 or x.dtype != torch.float32 or x.device.type != "cpu":
            return False
        return permits("cpp") and not (torch.is_autocast_enabled("cpu") or self.weight.requires_grad)

    def _uses_winograd(self, x: Tensor) -> bool:
        transformed, policy = self.transformed, self.policy
        (n, c, height, width), k = x.shape, self.out_channels
        work = Convolution(n, c, k, height, width, self._channels_last(x))
        if policy.recorded is not None:
            policy.recorded.append((self, work))
            return False
        if policy.static or torch.compiler.is_compiling():
            return transformed.kept and work.gain(policy.costs) > 0
        if not transformed.current and work.repays(policy.costs, policy.passes):
            self.transform()
        return transformed.current and work.gain(policy.costs) > 0

    def _channels_last(self, x: Tensor) -> bool:
        last = torch.channels_last
        return x.is_contiguous(memory_format=last) or self.weight.is_contiguous(memory_format=last)

    def transform(self) -> None:
        """Transform the present weight, in place after the first time."""
        transformed = self.transformed
        with torch.inference_mode(False), torch.no_grad():
            transformed.weights = winograd_weights(self.weight, out=transformed.weights, backend="cpp")
            if self.policy.compares:
                transformed.source = _copy_of(self.weight, transformed.source)
        transformed.current = True


class WinogradConvReLU2d(WinogradConv2d):
    """One with the optional residual sum and the ReLU that follow it in the network."""

    rectified = True

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(convolution + residual)."""
        if self._supports(x) and self._uses_winograd(x) and self._fits(x, residual):
            return self._computed(x, residual, relu=True)
        out = nn.Conv2d.forward(self, x)
        return (out if residual is None else out + residual).relu_()

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        """True if the sum is neither broadcast nor in another dtype."""
        if residual is None:
            return True
        return residual.shape == (len(x), self.out_channels, *x.shape[2:]) and residual.dtype == x.dtype


class WinogradLayers:
    """The convolutions of `network` that may use Winograd's algorithm.

    They become `WinogradConv2d` in place, so that every reference to them sees the change. Call `refresh`
    after every change of their weights and `prepare` before an attack.
    """

    def __init__(self, network: nn.Module, *, static: bool = False, compares: bool = False) -> None:
        """
        Args:
            static: calls may be compiled or captured (`WinogradPolicy`).
            compares: compare weights at a refresh; otherwise all count as changed.
        """
        self._policy = WinogradPolicy(static=static, compares=compares)
        self._network = network
        self.layers = use_winograd(network, self._policy)
        self._calls_of: dict[Any, list[tuple[WinogradConv2d, Convolution]]] = {}
        self._first_filters = [layer.weight.detach()[:1].clone() for layer in self.layers] if compares else []

    @torch.no_grad()
    def refresh(self) -> None:
        """Update to the present weights. Unless weights are compared, all of them count as changed."""
        if not self.layers:
            return
        changed = self._changed() if self._policy.compares else list(self.layers)
        if changed:
            self._policy.passes = 0.0
        for layer in changed:
            layer.transformed.current = False
        for layer in self.layers:
            if layer.transformed.kept and not layer.transformed.current:
                layer.transform()

    def _changed(self) -> list[WinogradConv2d]:
        """The layers whose weights have changed since the last refresh.

        One without transformed weights, which nothing depends on, is judged by its first filter.
        """
        changed = []
        for layer, first in zip(self.layers, self._first_filters, strict=True):
            transformed, filters = layer.transformed, layer.weight[:1]
            same = _same(transformed.source, layer.weight) if transformed.current else _same(first, filters)
            first.copy_(filters)
            if not same:
                changed.append(layer)
        return changed

    def prepare(self, x: Tensor, passes: float) -> None:
        """Prepare for `passes` pairs of passes on `x` (N, C, H, W), in the network's memory format."""
        if not self.layers:
            return
        self._policy.passes += passes
        if self._policy.static:
            self._keep(x)

    def take_epilogues(self, traced: fx.GraphModule, example: Tensor) -> None:
        """Give the layers of `traced`, a network in eval mode, the residual sums and ReLUs that follow them.

        example: images, for one forward pass.
        """
        self._policy.recorded = []
        try:
            with torch.no_grad():
                shapes = result_shapes(traced, example)
        finally:
            self._policy.recorded = None
        owned = {id(module) for module in traced.modules()}
        fuse_epilogues(traced, owned, shapes, layers=WinogradConv2d, into=WinogradConvReLU2d)
        settle(traced)

    def _keep(self, x: Tensor) -> None:
        """Make every refresh transform the layers that pay at images like `x`, for compiled code to read."""
        key = (x.shape, x.stride(), x.dtype)
        if key not in self._calls_of:
            self._calls_of[key] = self._record_calls(x)
        for layer, work in self._calls_of[key]:
            if not layer.transformed.kept and work.repays(self._policy.costs, self._policy.passes):
                layer.transformed.kept = True
                if not layer.transformed.current:
                    layer.transform()

    def _record_calls(self, x: Tensor) -> list[tuple[WinogradConv2d, Convolution]]:
        """The layers' calls in a forward pass of `x`, which updates no statistics."""
        calls: list[tuple[WinogradConv2d, Convolution]] = []
        self._policy.recorded = calls
        try:
            with attack_mode(self._network, "eval"):
                reference_logits(self._network, x)
        finally:
            self._policy.recorded = None
        return calls


def use_winograd(network: nn.Module, policy: WinogradPolicy) -> Sequence[WinogradConv2d]:
    """Turn suitable convolutions of `network` into `WinogradConv2d`, in place.

    None unless the compiled operators may run (`winograd_usable`).
    """
    changed: list[Any] = [module for module in network.modules() if _is_candidate(module)]
    if not (changed and winograd_usable(torch.device("cpu"))):
        return ()
    for module in changed:
        module.__class__ = WinogradConv2d
        module.transformed = TransformedWeights()
        module.policy = policy
    return changed


def _is_candidate(module: nn.Module) -> bool:
    layer: Any = module
    return (
        type(module) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.dilation, layer.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and (layer.padding, layer.padding_mode) in (((1, 1), "zeros"), ("same", "zeros"))
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and not layer.weight.requires_grad
        and min(layer.in_channels, layer.out_channels) >= MIN_CHANNELS
        # Hooks would still run, but they may compute weights or call something else.
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    )


def _copy_of(weight: Tensor, out: Tensor | None) -> Tensor:
    return weight.detach().clone() if out is None else out.copy_(weight.detach())


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and torch.equal(one, other)
