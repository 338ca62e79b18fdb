"""Choice of the convolutions that run fused with their ReLU in cuDNN: verified and measured faster."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat import verification as verified
from fastdynat.attack_engine.epilogue_fusion import ConvReLU2d
from fastdynat.execution.float32 import tf32_convolutions
from fastdynat.ops.conv_relu import conv_relu_check_name, runs_right

FUSED, SEPARATE = "cudnn", "apart"  # names in the stored timings
# (name of the check, device, size, calls by name) -> name of the fastest call, as `verification.fastest`.
Choose = Callable[[str, torch.device, str, dict[str, Callable[[], object]]], str]


def fuse_where_verified(layers: Sequence[ConvReLU2d], device: torch.device) -> None:
    """Fuse `layers` where the operator is verified on `device` for their dtype, at its first use there."""
    right = {dtype: runs_right(dtype, device) for dtype in {layer.weight.dtype for layer in layers}}
    for layer in layers:
        layer.fused = right[layer.weight.dtype]


def fuse_where_faster(
    network: Callable[[Tensor], Tensor],
    layers: Sequence[ConvReLU2d],
    x: Tensor,
    *,
    compiled: bool,
    choose: Choose = verified.fastest,
) -> None:
    """Time each fused layer on its input of `x` in `network`, and unfuse those that are clearly slower fused.

    Some cuDNN engines for the fused form have been much slower (pytorch#68506). Timings are stored per
    device, so another process, as one that resumes a run, chooses the same.

    compiled: an unfused layer then is a convolution and one pass over its result, in which the compiler joins
        bias, residual and ReLU; else each of them is a pass.
    """

    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        handles.pop(layer).remove()  # the timed calls must not run it
        _choose_fusion(layer, args, compiled, choose)

    handles: dict[nn.Module, Any] = {
        layer: layer.register_forward_pre_hook(hook) for layer in layers if layer.fused
    }
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles.values():
            handle.remove()


def _choose_fusion(layer: Any, args: tuple[Tensor, ...], compiled: bool, choose: Choose) -> None:
    """Keep `layer` fused if it is faster so on `args`: its input, and the residual if it adds one."""
    dtype = layer.weight.dtype
    layer_input, *residuals = (arg.detach().to(dtype) for arg in args)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def joined_by_compiler() -> Tensor:
        # The one pass reads and writes what its kernel does; the arithmetic in it is free.
        out = nn.functional.conv2d(layer_input, layer.weight, None, *geometry)
        return torch.add(out, residuals[0], out=out) if residuals else out.relu_()

    calls = {
        FUSED: lambda: layer(layer_input, *residuals),
        SEPARATE: joined_by_compiler if compiled else lambda: layer.apart(layer_input, *residuals),
    }
    size = f"{_size(layer, layer_input, residuals)} {'compiled' if compiled else 'eager'}"
    with torch.no_grad():
        fastest = choose(conv_relu_check_name(dtype), layer_input.device, size, calls)
    layer.fused = fastest == FUSED


def _size(layer: ConvReLU2d, layer_input: Tensor, residuals: Sequence[Tensor]) -> str:
    """Everything that a layer's timing depends on: shapes, memory formats, geometry, what it adds."""
    tensors = ["x".join(map(str, t.shape)) + _layout(t) for t in (layer_input, layer.weight, *residuals)]
    geometry = (
        f"stride {layer.stride} padding {layer.padding} dilation {layer.dilation} groups {layer.groups}"
    )
    tf32 = layer_input.dtype == torch.float32 and tf32_convolutions(layer_input.device)
    return " ".join([*tensors, geometry, *["bias"] * (layer.bias is not None), *["TF32"] * tf32])


def _layout(t: Tensor) -> str:
    return (
        ""
        if t.is_contiguous()
        else " last"
        if t.is_contiguous(memory_format=torch.channels_last)
        else f" {t.stride()}"
    )
