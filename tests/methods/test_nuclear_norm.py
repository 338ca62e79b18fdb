"""The polar factor against singular value decompositions in float64."""

import pytest
import torch
from torch import Tensor

from fastdynat.methods.nuclear_norm import SCALINGS, polar_factor

SPECTRA = {
    "random": lambda n: torch.linspace(0.3, 1.0, n),
    "equal": lambda n: torch.ones(n),
    "six decades": lambda n: torch.logspace(0, -6, n),
    "half of them zero": lambda n: torch.cat([torch.ones(n - n // 2), torch.zeros(n // 2)]),
    "one": lambda n: torch.cat([torch.ones(1), torch.zeros(n - 1)]),
    "tiny": lambda n: 1e-30 * torch.linspace(0.3, 1.0, n),
    "huge": lambda n: 1e30 * torch.linspace(0.3, 1.0, n),
}


def matrix(spectrum: str, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, its singular values, and U V^T over those that are not zero."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    values = SPECTRA[spectrum](min(rows, columns)).double()
    return u @ torch.diag(values) @ v, values, u[:, values > 0] @ v[values > 0]


@pytest.mark.parametrize(("rows", "columns"), [(128, 10), (128, 100), (64, 200), (8, 4), (3, 10), (1, 5)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_norm_and_its_gradient_are_those_of_the_decomposition(
    spectrum: str, rows: int, columns: int
) -> None:
    a, values, polar = matrix(spectrum, rows, columns)
    factor = polar_factor(a)
    below = float(values.sum() - (a * factor).sum())
    assert -1e-8 * float(a.norm()) <= below <= 3e-8 * min(rows, columns) * float(a.norm())
    # Rounding of a gradient in directions of singular values that are 0 or nearly.
    torch.testing.assert_close(factor, polar, rtol=0, atol=1e-10 if float(values.min()) > 0.1 else 5e-3)


def test_well_conditioned_gradients_are_exact_in_float64() -> None:
    for rows, columns in ((128, 10), (9, 9), (12, 40)):
        a, _, polar = matrix("random", rows, columns)
        torch.testing.assert_close(polar_factor(a), polar, rtol=0, atol=1e-11)


def test_equal_logits_have_no_gradient() -> None:
    """An attack that has not moved anything: the norm has a kink there."""
    assert torch.equal(polar_factor(torch.zeros(7, 4)), torch.zeros(7, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float64(dtype: torch.dtype) -> None:
    a = matrix("random", 32, 10)[0].to(dtype)
    factor = polar_factor(a)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, polar_factor(a.double()).float(), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(polar_factor(a), factor)


def test_a_number_that_is_none_is_not_hidden() -> None:
    a = torch.randn(8, 4)
    a[3, 2] = torch.nan
    assert bool(polar_factor(a).isnan().any())


def test_the_iterations_are_few() -> None:
    assert len(SCALINGS) < 25
