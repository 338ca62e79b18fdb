"""Running statistics of a weight average, recomputed by a pass over the training images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.network_modes import stays_in_eval_mode
from fastdynat.data import Batch
from fastdynat.distributed import replicated_batch, world
from fastdynat.distributed.synchronized_batch_norm import plain_batch_norm, synchronize_batch_norm
from fastdynat.evaluation import Stopped


def statistics_layers(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms of `module` with running statistics that training moves: none of a frozen one."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and not stays_in_eval_mode(layer)
    ]


@torch.no_grad()
def recompute_statistics(
    module: nn.Module, batches: Iterable[Batch], should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Replace the running statistics of `module` by their means over `batches`, images as they are loaded.

    As torch.optim.swa_utils.update_bn, and the release of IDBH, without attack. Only batch norm is in train
    mode, so nothing is drawn; over several processes its statistics are those of the whole batches.

    Raises:
        Stopped: `should_stop` returned True; the statistics are those from before.
    """
    layers = statistics_layers(module)
    before = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    try:
        with _cumulative(module, layers):
            for batch in batches:
                if should_stop():
                    raise Stopped
                with replicated_batch() if batch.share.replicated else nullcontext():
                    module(batch.x)
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            for buffer, old in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(old)
        raise


@contextmanager
def _cumulative(module: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Context in which `layers` begin anew, and average the statistics of each pass of `module` equally."""
    modes = [(part, part.training) for part in module.modules()]
    momenta = [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.training = True
    if not world().alone:
        synchronize_batch_norm(module)
    try:
        yield
    finally:
        if not world().alone:
            plain_batch_norm(module)
        for part, training in modes:
            part.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
