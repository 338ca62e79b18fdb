"""Lengths of moves per image; images are (N, C, H, W)."""

import torch
from torch import Tensor

from fastdynat.errors import unknown_name
from fastdynat.ops.attack_logit_grad import inverse_power_of_two

LENGTHS = ("linf", "l2", "l1")
FAINT_SLOPE = 1e-3  # in logits per pixel unit; gradients of usual networks have larger entries
SQUARES = (1e-15, 1e18)  # norms whose squares float32 holds accurately


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """`values` (N,) in a shape that broadcasts against images."""
    return values.view(-1, *[1] * (x.dim() - 1))


def length(moved: Tensor, norm: str) -> Tensor:
    """The norm of each image of `moved` (N, ...): (N,)."""
    if norm not in LENGTHS:
        raise unknown_name("norm", norm, LENGTHS)
    # Over dimensions, because flattening channels-last images copies them. On the CPU, vector_norm is fast
    # for L2 only.
    dims = tuple(range(1, moved.dim()))
    if norm == "l2":
        return _length_l2(moved, dims)
    return moved.abs().amax(dims) if norm == "linf" else moved.abs().sum(dims)


def bounded_gradient(grad: Tensor) -> Tensor:
    """`grad` with NaN as 0 and infinite entries as a small number, for attacks that use lengths of gradients.

    Beside infinity or the largest number, every other entry would be lost, and squares would overflow. As a
    small number it keeps its direction, so that an image whose gradient is infinite everywhere moves on too.
    """
    return torch.nan_to_num(grad, nan=0.0, posinf=FAINT_SLOPE, neginf=-FAINT_SLOPE)


def unit_l2(moved: Tensor) -> Tensor:
    """`moved` (N, ...) divided by the L2 norm of each image; an image of zeros stays zero.

    Each image is scaled by a power of two first, so that squares of tiny and huge entries stay in range.
    """
    dims = tuple(range(1, moved.dim()))
    scaled = moved * inverse_power_of_two(moved.abs().amax(dims, keepdim=True))
    size = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True)
    return scaled / torch.where(size > 0, size, 1.0)


def _length_l2(moved: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The L2 norm, in float64 where squares leave float32, as gradients of tiny or huge logits do."""
    # On the CPU float64 takes eight times as long.
    if moved.device.type == "cpu" and not torch.compiler.is_compiling():
        found = torch.linalg.vector_norm(moved, dim=dims)
        if moved.dtype == torch.float64 or bool(((found > SQUARES[0]) & (found < SQUARES[1])).all()):
            return found
    return torch.linalg.vector_norm(moved, dim=dims, dtype=torch.float64).to(moved.dtype)
