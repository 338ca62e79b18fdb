"""Which convolutions of the replica take their ReLU in cuDNN's kernel: where it is right, and of these where it is faster."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attacks.epilogue import ConvReLU2d
from fastdynat.ops.conv_relu import runs_right

Seconds = Callable[[Callable[[], object]], float]  # of one call
CALLS = 5


def use_where_right(layers: Sequence[ConvReLU2d], device: torch.device) -> None:
    """Let `layers` use the operator where it was found right on `device` for their dtype; verified at its first use there."""
    right = {dtype: runs_right(dtype, device) for dtype in {layer.weight.dtype for layer in layers}}
    for layer in layers:
        layer.fused = right[layer.weight.dtype]


def keep_where_faster(
    network: Callable[[Tensor], Tensor], layers: Sequence[ConvReLU2d], x: Tensor, seconds: Seconds | None = None
) -> None:
    """Time each layer on what it reads of `x` in `network`, and let those go back that are slower fused.

    The other way is the convolution without bias and one pass over its result, which is what a compiler makes of the rest;
    without one it takes up to three passes. cuDNN has had engines for the fused form that were much slower (pytorch#68506).
    """
    seconds = seconds or _on_gpu

    def time(layer: Any, args: tuple[Tensor, ...]) -> None:
        read, *rest = (arg.detach() for arg in args)
        read = read.to(layer.weight.dtype)
        rest = [residual.to(layer.weight.dtype) for residual in rest]
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

        def apart() -> Tensor:
            out = nn.functional.conv2d(read, layer.weight, None, *geometry)
            return torch.add(out, rest[0], out=out) if rest else out.relu_()

        with torch.no_grad():
            layer.fused = seconds(lambda: layer(read, *rest)) <= seconds(apart)

    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        handles.pop(layer).remove()  # not at the calls that are timed
        time(layer, args)

    handles: dict[nn.Module, Any] = {layer: layer.register_forward_pre_hook(hook) for layer in layers if layer.fused}
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles.values():
            handle.remove()


def _on_gpu(call: Callable[[], object]) -> float:
    """The least of a few calls, after one that finds cuDNN's plan."""
    times = []
    for _ in range(1 + CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times[1:]) / 1000
