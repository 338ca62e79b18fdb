"""Synchronised batch norm: in train mode the statistics are computed over the global batch.

``torch.nn.SyncBatchNorm`` needs CUDA tensors and is not a BatchNorm2d, the type that networks, folding and
tracing look for. Here only the class of a layer changes, in place and reversibly; parameters, buffers, hooks
and state_dict keys are untouched. In eval mode, and for a batch that every rank has whole, the layer computes
the same as its original class.

A layer communicates once in its forward pass, 2 C + 1 numbers per rank, and once in its backward pass, 2 C
numbers. Means and squared deviations of the shards are combined as by Chan, Golub and LeVeque (1979), without
differences of large sums. Weight and bias get this rank's part of their gradient, like all parameters.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fastdynat.distributed.batch_norm_gradients import differentiable_gradients
from fastdynat.distributed.collectives import gather_over_ranks, sum_over_ranks
from fastdynat.distributed.world import batch_world
from fastdynat.errors import UserError


class SynchronizedStatistics(_BatchNorm):
    """A batch norm layer after `synchronize_batch_norm`.

    Attributes:
        plain: its original class.
        plain_forward: its forward pass without communication.
    """

    plain: type[_BatchNorm]
    plain_forward: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        # Compiled code serves split and replicated batches: its operators check batch_world when they run.
        if not self.training or (not torch.compiler.is_compiling() and batch_world().alone):
            return self.plain_forward(input)
        return self._synchronized_forward(input)

    def _synchronized_forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        mean, variance = None, None
        momentum: float | Tensor | None = self.momentum
        if self.track_running_stats:
            mean, variance = self.running_mean, self.running_var
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if momentum is None:  # on the device: no wait, and no constant in a captured graph
                    momentum = 1.0 / self.num_batches_tracked.double()
        return _batch_norm(input, mean, variance, self.weight, self.bias, momentum, self.eps)


class SynchronizedOwnForward(SynchronizedStatistics):
    """A batch norm with a forward pass of its own (timm's BatchNormAct2d), which calls F.batch_norm."""

    def _synchronized_forward(self, input: Tensor) -> Tensor:
        calls: list[Callable[..., Tensor]] = []
        with _Interception(calls):
            result = self.plain_forward(input)
        if not calls:
            raise UserError(
                f"the batch norm {self.plain.__name__} does not call torch.nn.functional.batch_norm, so it "
                "cannot be synchronised between processes; use --sync-bn off"
            )
        return result


class _Interception(TorchFunctionMode):
    """Replaces F.batch_norm by `_batch_norm` in train mode, and records each call in `calls`."""

    def __init__(self, calls: list[Callable[..., Tensor]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            self._calls.append(func)
            return _as_functional(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _as_functional(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm, synchronised where it is in train mode."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _batch_norm(input, running_mean, running_var, weight, bias, momentum, eps)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor | None,
    eps: float,
) -> Tensor:
    """Batch norm over the global batch, of which `x` (N, C, ...) is a shard; moves the running statistics."""
    mean, squares, count = _statistics_over_ranks(x)
    if momentum is not None:
        _move(running_mean, mean, momentum)
        _move(running_var, squares / (count - 1), momentum)
    return _Normalize.apply(x, weight, bias, mean, squares / count, count, eps)


@torch.no_grad()
def _statistics_over_ranks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared deviations from it, and number of values per channel, over all ranks.

    In float32, or float64 where `x` is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    channels, local = x.shape[1], x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    every = gather_over_ranks(torch.cat([mean, variance * local, mean.new_full((1,), local)]))
    means, squares, counts = every.split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0), count


@torch.no_grad()
def _move(running: Tensor | None, new: Tensor, momentum: float | Tensor) -> None:
    if running is not None:
        momentum = momentum.to(new.dtype) if isinstance(momentum, Tensor) else momentum
        running.copy_(torch.lerp(running.to(new.dtype), new, momentum))


class _Normalize(torch.autograd.Function):
    """Normalisation of a shard by the statistics of the whole batch, which depend on the shard.

    Nothing is cast on the way out: from a cast that changes nothing, torch 2.11 compiles a gradient of zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, _in(mean, weight), _in(mean, bias), eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: for a gradient of this gradient
            x, weight, bias, *_ = ctx.saved_tensors
            return *differentiable_gradients(dy, x, weight, bias, ctx.eps), None, None, None, None
        return _Normalize.gradients(ctx, dy)

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        fixed = (x, scale, mean, variance, None, None, False, ctx.eps)
        _, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(dy, *fixed, [False, True, True])
        dx = None
        if ctx.needs_input_grad[0]:
            inverse = torch.rsqrt(variance + ctx.eps)
            by_bias_mean, by_weight_mean = sum_over_ranks(torch.cat([by_bias, by_weight])).div(count).chunk(2)
            scale = scale * inverse
            slope = -scale * inverse * by_weight_mean
            offset = -scale * by_bias_mean - slope * mean
            dx = torch.addcmul(_per_channel(offset, x), x, _per_channel(slope, x))
            dx = torch.addcmul(dx, dy, _per_channel(scale, x))
            dx = dx if dx.dtype == x.dtype else dx.to(x.dtype)
        d_weight = by_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = by_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return dx, d_weight, d_bias, None, None, None, None


def _in(like: Tensor, values: Tensor | None) -> Tensor | None:
    return values if values is None or values.dtype == like.dtype else values.to(like.dtype)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def synchronize_batch_norm(network: nn.Module) -> int:
    """Let every batch norm of `network` synchronise its statistics in train mode; returns their number.

    The classes of the layers change, nothing else. torch.nn.SyncBatchNorm layers synchronise in this way too,
    on every device.

    Raises:
        UserError: a layer has a forward pass, or a process group, of its own instance.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in layers:
        if "forward" in vars(layer):
            raise UserError(
                f"the forward pass of the batch norm {name} was replaced on the layer itself, so it cannot "
                "be synchronised between processes; use --sync-bn off"
            )
        if getattr(layer, "process_group", None) is not None:
            raise UserError(
                f"the SyncBatchNorm {name} has a process group of its own; leave process_group out, so that "
                "it synchronises all processes of the run"
            )
    for _, layer in layers:
        if not isinstance(layer, SynchronizedStatistics):
            layer.__class__ = _synchronized(type(layer))  # type: ignore[arg-type]
    return len(layers)


def plain_batch_norm(network: nn.Module) -> nn.Module:
    """Undo `synchronize_batch_norm` in `network`, which is returned."""
    for layer in network.modules():
        if isinstance(layer, SynchronizedStatistics):
            layer.__class__ = layer.plain  # type: ignore[assignment]
    return network


@cache
def _synchronized(plain: type[_BatchNorm]) -> type[SynchronizedStatistics]:
    # SyncBatchNorm's own would communicate where every rank has the whole batch, and refuse the CPU.
    own = _BatchNorm.forward if plain.forward is nn.SyncBatchNorm.forward else plain.forward
    kind = SynchronizedStatistics if own is _BatchNorm.forward else SynchronizedOwnForward
    members = {"plain": plain, "plain_forward": own, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(f"Synchronized{plain.__name__}", (kind, plain), members)
