"""The normalisation layers of PyTorch, timm and our own networks."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # batch and instance norm are _NormBase
# Modules of timm whose classes are all normalisation layers; not all of them derive from PyTorch's.
TIMM_NORMS = frozenset(
    f"timm.layers.{name}" for name in ("norm", "norm_act", "evo_norm", "filter_response_norm", "grn")
)


def is_norm(layer: nn.Module | None) -> bool:
    """True if `layer` is a normalisation layer; a class of another package is one if it derives from one."""
    if isinstance(layer, NORMS):
        return True
    return any(base.__module__ in TIMM_NORMS for base in type(layer).__mro__)  # timm is not imported
