"""Small networks that several test modules attack and train."""

import torch
from torch import nn


def tiny_cnn(
    seed: int = 0, *, classes: int = 10, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Conv-BN-ReLU-(dropout)-pool-linear for RGB images from 4x4, with non-initial running statistics."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    ).to(dtype)
    net.train()(torch.rand(32, 3, 8, 8, dtype=dtype))
    return net
