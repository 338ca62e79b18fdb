"""Winograd's 3x3 convolution F(4x4, 3x3) on the CPU, with a quarter of the multiplications; input gradient.

Y = A^T [sum_c (G w G^T) * (B^T d B)] A for tiles of 4x4 outputs, each from a 6x6 window d of inputs: 36
multiplications per channel instead of 144. Source: Lavin & Gray 2015 (arXiv 1509.09308), also of the
matrices."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._select import select, usable

CONV, WEIGHTS = "winograd_conv3x3", "winograd_weights"
TILE, POINTS = 4, 36
B_T = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
G = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
A_T = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)


def _eager_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The reference.

    gate: the result of a ReLU whose gradient `x` is to pass first: it becomes 0 where the result is 0.
    """
    (n, c, height, width), k = x.shape, weight.shape[2]
    x = x if gate is None else torch.where(gate <= 0, 0.0, x)
    down, across = -(-height // TILE), -(-width // TILE)
    padded = F.pad(x, (1, TILE * across - width + 1, 1, TILE * down - height + 1))
    windows = padded.unfold(2, TILE + 2, TILE).unfold(3, TILE + 2, TILE)  # (N, C, down, across, 6, 6)
    b_t, a_t = x.new_tensor(B_T), x.new_tensor(A_T)
    v = torch.einsum("pi,nctsij,qj->pqntsc", b_t, windows, b_t).reshape(POINTS, n * down * across, c)
    m = torch.bmm(v, weight).view(TILE + 2, TILE + 2, n, down, across, k)
    y = torch.einsum("ip,pqntsk,jq->ntisjk", a_t, m, a_t).reshape(n, TILE * down, TILE * across, k)
    y = y[:, :height, :width]
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual.permute(0, 2, 3, 1)
    return (y.relu() if relu else y).contiguous().permute(0, 3, 1, 2)


def _fake_conv(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[2], *x.shape[2:])
    return y.contiguous(memory_format=torch.channels_last)


def _eager_weights(weight: Tensor, forward: Tensor, backward: Tensor) -> None:
    """The reference."""
    g = weight.new_tensor(G, dtype=torch.float64)
    w = weight.double()
    forward.copy_(torch.einsum("pi,kcij,qj->pqck", g, w, g).reshape(forward.shape))
    backward.copy_(torch.einsum("pi,kcij,qj->pqkc", g, w.flip(2, 3), g).reshape(backward.shape))


def _fake_weights(**_: Any) -> None:
    return None


# For the CPU only: on a GPU cuDNN has Winograd kernels of its own, and tensor cores are faster still.
CONV_IMPLEMENTATIONS = register_operator(CONV, eager=_eager_conv, fake=_fake_conv, gpu=False)
WEIGHTS_IMPLEMENTATIONS = register_operator(
    WEIGHTS, eager=_eager_weights, fake=_fake_weights, gpu=False, mutates=("forward", "backward")
)


class _Conv(torch.autograd.Function):
    """The convolution with a separate setup_context, which torch.func needs."""

    @staticmethod
    def forward(x: Tensor, forward: Tensor, backward: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return _owned(_run(x, forward, bias, backend=backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, forward, backward, _, ctx.backend = inputs
        ctx.save_for_backward(forward, backward)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        forward, backward = ctx.saved_tensors
        return _Conv.apply(grad, backward, forward, None, ctx.backend), *(None,) * 4


class _ConvReLU(torch.autograd.Function):
    """The ReLU of convolution and residual; without a residual, masks the gradient where it is read."""

    @staticmethod
    def forward(
        x: Tensor,
        forward: Tensor,
        backward: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        backend: str,
    ) -> Tensor:
        return _owned(_run(x, forward, bias, residual, relu=True, backend=backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, forward, backward, _, residual, ctx.backend = inputs
        ctx.has_residual = residual is not None
        ctx.save_for_backward(forward, backward, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        forward, backward, output = ctx.saved_tensors
        if not (ctx.has_residual or torch.is_grad_enabled()):
            return _run(grad, backward, None, gate=output, backend=ctx.backend), *(None,) * 5
        # The masked gradient is the residual's, or is to be differentiated again.
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
        found = _Conv.apply(grad, backward, forward, None, ctx.backend) if ctx.needs_input_grad[0] else None
        return found, None, None, None, grad if ctx.has_residual else None, None


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    relu: bool = False,
    backend: str,
) -> Tensor:
    found: Tensor = select(CONV, CONV_IMPLEMENTATIONS, backend, x)(x, weight, bias, residual, gate, relu)
    return found


def _owned(y: Tensor) -> Tensor:
    """Return the permuted view `y` as a tensor that is no view, over the same memory.

    Autograd refuses to overwrite a view that a custom function made, and networks do overwrite the result of
    a convolution: ReLU in place, ``x += shortcut``. Nothing of it is saved for the backward pass, so that is
    safe; a ReLU's result is saved, and autograd notices. A compiler makes its operations functional and needs
    no help.
    """
    return y if torch.compiler.is_compiling() else y.new_empty(0).set_(y)  # type: ignore[call-overload]


def winograd_conv3x3(
    x: Tensor,
    forward: Tensor,
    backward: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``conv2d(x, weight, bias, padding=1)`` for the 3x3 `weight` that `winograd_weights` transformed.

    With `relu`, ``relu(conv2d(...) + residual)`` in the same passes over memory: bit for bit what separate
    passes give.

    Differentiable in `x` and `residual`, to any order, by autograd and torch.func: the gradient of a
    convolution is the convolution with the filters turned by 180 degrees and channels exchanged, which
    `backward` holds.

    Rounding errors in float32 are about five times those of a direct convolution, as the transforms multiply
    by up to 8 and subtract again: 7e-6 of the largest output instead of 1.5e-6. Where a direct convolution
    gives NaN or infinity, the other outputs of the same 4x4 tile may be NaN, too, and infinities become NaN;
    other tiles and images are not affected.

    Args:
        x: (N, C, H, W), float32, any size from 0 and any layout; channels-last is read as it lies.
        forward, backward: from `winograd_weights`, (36, C, K) and (36, K, C).
        bias: (K,) or None; no gradient.
        residual: (N, K, H, W), float32, any layout; with `relu` only.
        relu: take the ReLU; without a residual, its mask is applied where the gradient is read.
        backend: "auto", "cpp" (CPU tensors) or "eager". Other devices run "eager", slowly.

    Returns:
        (N, K, H, W), float32, channels-last.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient is wanted of the weights or the bias.
        RuntimeError: the backend asked for cannot run here.
    """
    _check_conv(x, forward, backward, bias)
    if residual is not None:
        if not relu:
            raise ValueError(f"{CONV}: a residual is for relu=True; add it to the result otherwise")
        n, _, height, width = x.shape
        _check_shape(CONV, "residual", residual, (n, forward.shape[2], height, width), x)
    if relu:
        return _ConvReLU.apply(x, forward, backward, bias, residual, backend)
    return _Conv.apply(x, forward, backward, bias, backend)


def winograd_weights(
    weight: Tensor, *, out: tuple[Tensor, Tensor] | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The transformed filters G w G^T for `winograd_conv3x3`, computed in float64 and rounded once.

    Args:
        weight: (K, C, 3, 3), float32, as a convolution's; any layout. No gradient flows.
        out: what an earlier call returned for a weight of this shape: written to, and returned.
        backend: as in `winograd_conv3x3`.

    Returns:
        For the convolution (36, C, K), and for its input gradient (36, K, C): together eight times the
        weight's memory.

    Raises:
        ValueError: `weight` or `out` does not fit.
        RuntimeError: the backend asked for cannot run here.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"{WEIGHTS}: weight has shape {tuple(weight.shape)}, expected (K, C, 3, 3)")
    _check_float(WEIGHTS, "weight", weight)
    k, c = weight.shape[:2]
    forward, backward = out or (weight.new_empty(POINTS, c, k), weight.new_empty(POINTS, k, c))
    for name, tensor, shape in (("out[0]", forward, (POINTS, c, k)), ("out[1]", backward, (POINTS, k, c))):
        _check_shape(WEIGHTS, name, tensor, shape, weight)
        if not tensor.is_contiguous():
            raise ValueError(f"{WEIGHTS}: {name} must be contiguous, as an earlier call returned it")
    select(WEIGHTS, WEIGHTS_IMPLEMENTATIONS, backend, weight)(weight.detach(), forward, backward)
    return forward, backward


def winograd_usable(device: torch.device) -> bool:
    """True if the compiled convolution and filter transform may both run on `device` (`usable`)."""
    return usable(CONV, "cpp", device) and usable(WEIGHTS, "cpp", device)


def _check_conv(x: Tensor, forward: Tensor, backward: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"{CONV}: x has shape {tuple(x.shape)}, expected (N, C, H, W)")
    _check_float(CONV, "x", x)
    if forward.dim() != 3:
        raise ValueError(
            f"{CONV}: forward has shape {tuple(forward.shape)}, expected (36, C, K) from {WEIGHTS}"
        )
    c, k = x.shape[1], forward.shape[2]
    given = [("forward", forward, (POINTS, c, k)), ("backward", backward, (POINTS, k, c))]
    for name, tensor, shape in [*given, ("bias", bias, (k,))]:
        if tensor is None:
            continue
        _check_shape(CONV, name, tensor, shape, x)
        if tensor.requires_grad:
            raise ValueError(
                f"{CONV}: no gradient of {name} is computed; use {name}.detach(), or conv2d to train it"
            )


def _check_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise ValueError(f"{op}: {name} must be float32, got {tensor.dtype}; use conv2d for others")


def _check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], beside: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    _check_float(op, name, tensor)
    if tensor.device != beside.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {beside.device}")
