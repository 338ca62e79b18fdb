"""The normalisation layers of PyTorch, and of timm, whose classes are theirs."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # batch and instance norm are _NormBase
