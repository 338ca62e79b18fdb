"""Check of batch norm folding on a copy of the network with changed numbers."""

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.batch_norm_folding import fold_batch_norm, refresh_folds
from fastdynat.attack_engine.fx_tracing import NotFoldable
from fastdynat.attack_engine.network_comparison import disagreement, preserve_rng, reference_logits_and_grad
from fastdynat.attack_engine.network_modes import perturbable_twin


def check_folding(model: nn.Module, example: Tensor, *, fuse: bool = False) -> None:
    """Raise NotFoldable unless the folded network follows changes of everything that training may change.

    In a fresh network a batch norm is the identity and a zero-initialised branch is absent, so a comparison
    of its logits would miss whatever folding loses of them. Here a twin is folded first and changed
    afterwards: statistics and affine parameters of its batch norms, constant tensors, and tensors that are
    neither parameters nor buffers, whose values tracing may have frozen.

    fuse: as in `fold_batch_norm`.
    """
    why = None
    if example.dtype == torch.float32:
        with suppress(Exception):  # the network may be hard-coded to float32
            why = _disagreement(model, example.double(), fuse)
    why = _disagreement(model, example, fuse) if why is None else why
    if why:
        raise NotFoldable(f"with other numbers in it, the traced network's {why}")


def _disagreement(model: nn.Module, example: Tensor, fuse: bool) -> str:
    """`disagreement` in the dtype of `example`; float64 keeps rounding small in deep random networks."""
    twin, tensors = perturbable_twin(model, torch.float64 if example.dtype == torch.float64 else None)
    folded, folds = fold_batch_norm(twin, example, fuse=fuse)
    _change(twin, tensors, example)
    refresh_folds(folds)
    return disagreement(reference_logits_and_grad(twin, example), reference_logits_and_grad(folded, example))


@torch.no_grad()
def _change(twin: nn.Module, tensors: list[Tensor], example: Tensor) -> None:
    """Change `tensors` to other values of the same order; activations stay of order one at any depth."""
    norms = [
        m
        for m in twin.modules()
        if isinstance(m, _BatchNorm) and m.running_var is not None and not m.training
    ]
    _calibrate(twin, norms, example)
    statistics = {id(t) for norm in norms for t in (norm.running_mean, norm.running_var)}
    generator = torch.Generator().manual_seed(0)

    def between(low: float, high: float, like: Tensor) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(like)

    for norm in norms:
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        mean.add_(between(-0.5, 0.5, mean) * var.sqrt())
        var.mul_(between(0.5, 2.0, var))
    for tensor in tensors:
        if id(tensor) not in statistics and tensor.is_floating_point():
            # A zero constant switches a branch off; other constants may need their sign.
            tensor.copy_(
                between(-0.5, 0.5, tensor) if not tensor.any() else tensor * between(0.6, 1.4, tensor)
            )


def _calibrate(twin: nn.Module, norms: list[_BatchNorm], example: Tensor) -> None:
    """Set the running statistics to those of `example`."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with (
        suppress(Exception),
        preserve_rng(example.device),
    ):  # foreign code, or one value per channel: statistics stay
        twin(example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.training, norm.momentum = False, momentum
