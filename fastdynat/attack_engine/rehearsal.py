"""Folding tried out on a network whose numbers tell a right fold from a wrong one."""

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.batch_norm_folding import fold_batch_norm, put_tensors
from fastdynat.attack_engine.fx_tracing import NotFoldable
from fastdynat.attack_engine.network_comparison import answer_and_gradient, disagreement, same_draws
from fastdynat.attack_engine.network_modes import loose_twin


def rehearse(model: nn.Module, example: Tensor, *, join: bool = False) -> None:
    """Raise NotFoldable unless the traced and folded network follows a change of all that training may
    change.

    On a fresh network a batch norm is the identity and a zero-initialised branch is not there, so comparing
    answers would pass whatever is lost of them. Here a twin is folded first and changed afterwards:
    statistics and affine values of its batch norms, constant tensors, and tensors that are neither parameters
    nor buffers, whose values tracing may have kept.
    """
    why = None
    if example.dtype == torch.float32:
        with suppress(Exception):  # a network that has float32 written into it
            why = _disagreement(model, example.double(), join)
    why = _disagreement(model, example, join) if why is None else why
    if why:
        raise NotFoldable(f"with other numbers in it, the traced network's {why}")


def _disagreement(model: nn.Module, example: Tensor, join: bool) -> str:
    """`disagreement` in the dtype of `example`: what rounding does with random numbers in a deep network says
    nothing.
    """
    twin, tensors = loose_twin(model, torch.float64 if example.dtype == torch.float64 else None)
    folded, folds = fold_batch_norm(twin, example, join=join)
    _change(twin, tensors, example)
    put_tensors(folds)
    return disagreement(answer_and_gradient(twin, example), answer_and_gradient(folded, example))


@torch.no_grad()
def _change(twin: nn.Module, tensors: list[Tensor], example: Tensor) -> None:
    """Give `tensors` other values of the same order; activations stay of order one, whatever the depth."""
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
            # A constant of zero switches something off; others may have to keep their sign.
            tensor.copy_(
                between(-0.5, 0.5, tensor) if not tensor.any() else tensor * between(0.6, 1.4, tensor)
            )


def _calibrate(twin: nn.Module, norms: list[_BatchNorm], example: Tensor) -> None:
    """Let the running statistics be those of `example`."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with (
        suppress(Exception),
        same_draws(example.device),
    ):  # foreign code, and perhaps one value per channel: then they stay
        twin(example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.training, norm.momentum = False, momentum
