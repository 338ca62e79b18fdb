"""Check that a network's weights are finite numbers."""

import torch
from torch import Tensor, nn

from fastdynat.errors import UserError

STATISTICS = ("running_mean", "running_var")


def not_numbers(network: nn.Module) -> str:
    """In words, which of the network's tensors hold NaN or infinity and how many values; "" where none does.

    An infinity in a buffer counts only in running statistics: other buffers hold it on purpose, as attention
    masks do.
    """
    found: list[tuple[str, int, int]] = []
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        infinite = isinstance(tensor, nn.Parameter) or name.endswith(STATISTICS)
        count = _count(tensor, infinite=infinite)
        if count:
            found.append((name, count, tensor.numel()))
    if not found:
        return ""
    name, count, total = found[0]
    more = f", and in {len(found) - 1} more tensor(s)" if len(found) > 1 else ""
    return f"{count} of {total} values of {name} are NaN or infinite{more}"


def check_finite(network: nn.Module, origin: object) -> None:
    """Raise UserError, naming the weights' `origin`, unless all of the network's weights are finite."""
    if problem := not_numbers(network):
        raise UserError(
            f"{origin}: {problem}, so the network predicts nothing; it has diverged or is damaged: take "
            "other weights, or train again with a lower --lr or --clip-grad 1"
        )


def _count(tensor: Tensor, *, infinite: bool) -> int:
    values = tensor.detach()
    bad = ~torch.isfinite(values) if infinite else torch.isnan(values)
    return int(bad.sum())
