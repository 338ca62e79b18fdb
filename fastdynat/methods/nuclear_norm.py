"""The nuclear norm of a matrix whose rows are the images of a batch, without waiting for the device.

The norm ||A||_*, the sum of the singular values of A = U diag(s) V^T, is <A, U V^T>, and its gradient is the
polar factor U V^T. Decompositions (SVD, eigenvectors) wait for the device, which a captured step must not.
Here U V^T = A (A^T A)^(-1/2), with the inverse root by the Newton-Schulz iteration (Higham 1997,
"Stable iterations for the matrix square root"), scaled so that the smallest singular value grows by up to 2.6
per iteration (Chen & Chow 2014). Sums over images go over all processes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdynat.distributed import batch_world

# Singular values are smoothed to sqrt(s^2 + SMOOTHING ||A||_F^2).
SMOOTHING = 1e-14


def _scalings() -> tuple[float, ...]:
    """The factors of the iterations that bring singular values from [sqrt(SMOOTHING), 1] to 1."""
    factors, low = list[float](), math.sqrt(SMOOTHING / (1 + SMOOTHING))
    while low < 1 - 1e-15:
        # The cubic x (3 - x^2) / 2 of the scaled value is equal at both ends of the interval.
        factor = math.sqrt(3 / (1 + low + low * low))
        factors.append(factor)
        low = min(1.0, factor * low * (3 - (factor * low) ** 2) / 2)
    return tuple(factors)


SCALINGS = _scalings()


def polar_factor(rows: Tensor) -> Tensor:
    """The gradient of the nuclear norm of the global batch's matrix at this process's `rows` (n, K).

    Computed in float64, returned in the dtype of `rows`, at least float32, without gradient. Where singular
    values are 0, among them those of a zero matrix, it is the subgradient of smallest norm. The norm that it
    gives, ``(rows * polar_factor(rows)).sum()``, summed over the processes, is within 3e-8 K ||A||_F of
    the exact one.
    """
    with torch.no_grad():
        a = rows.double()
        wide = batch_world().alone and a.shape[0] < a.shape[1]
        a = a.mT if wide else a  # of the two Gram matrices the smaller one, which is not singular
        gram = batch_world().sum_(a.mT @ a)
        size = gram.trace().clamp_min(torch.finfo(gram.dtype).tiny)
        factor = (a / size.sqrt()) @ _inverse_root(gram / size)
        factor = factor.mT if wide else factor
    return factor if rows.dtype == torch.float64 else factor.float()


def _inverse_root(gram: Tensor) -> Tensor:
    """(G + SMOOTHING I)^(-1/2) of a positive semidefinite (K, K) with eigenvalues in [0, 1]."""
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scale = 1 + SMOOTHING
    y, z = (gram + SMOOTHING * one) / scale, one
    for factor in SCALINGS:
        step = torch.addmm(one, z, y, beta=1.5 * factor, alpha=-0.5 * factor**3)
        y, z = y @ step, step @ z
    return z / math.sqrt(scale)
