"""Parameter groups of a network: which of its parameters have weight decay."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastdynat.training.resolved_config import ResolvedOptim

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # batch and instance norm are _NormBase


def parameter_groups(module: nn.Module, config: ResolvedOptim) -> list[dict[str, Any]]:
    """The parameter groups of one network, normalisation layers apart where they have no weight decay.

    Frozen parameters are in none.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if config.decay_norms:
        return [{"params": trained}]
    norms = {
        id(p)
        for layer in module.modules()
        if isinstance(layer, NORMS)
        for p in layer.parameters(recurse=False)
    }
    decayed = [p for p in trained if id(p) not in norms]
    rest = [p for p in trained if id(p) in norms]
    return [{"params": decayed}] * bool(decayed) + [{"params": rest, "weight_decay": 0.0}] * bool(rest)
