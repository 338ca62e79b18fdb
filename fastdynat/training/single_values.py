"""Check before the first step: batch norm cannot train on one value per channel."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.errors import UserError


def check_single_values(
    network: nn.Module, image_shape: tuple[int, int, int], device: torch.device, batch_size: int
) -> None:
    """Refuse batches of one image where a batch norm of `network` would see a single value per channel."""
    if batch_size > 1:
        return
    starved: list[str] = []

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.dim() > 1 and x.numel() == x.shape[0] * x.shape[1]:
            starved.append(name)

    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: look(name, x)) for name, module in norms
    ]
    try:
        with torch.no_grad(), attack_mode(network, "eval"):
            network(torch.zeros(1, *image_shape, device=device, dtype=next(network.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if starved:
        raise UserError(
            f"batch size {batch_size}: the batch norm {starved[0]} would get one value per channel (a map of "
            "1x1 pixels of one image) and cannot train on it; use --batch-size 2 or more, larger images, or "
            "a network with group norm (-gn)"
        )
