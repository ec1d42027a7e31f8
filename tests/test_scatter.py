"""Compressed scatter matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from slm_fast.covariance import unpack
from slm_fast.ops.sum_scatters import RANK, expand
from slm_fast.scatter import compress


def scatter_of(rows: int, width: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Scatter [width, width] float64 of rows whose variance falls across directions, as that of hidden states does."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, width, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    data = scale * torch.randn(rows, width, generator=generator, dtype=torch.float64) * spread @ mix
    return data.T @ data


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 7), (5, 40), (40, 5), (90, 64)])
def test_a_scatter_of_few_rows_comes_back_but_for_eight_bits(rows: int, width: int, scale: float) -> None:
    scatter = scatter_of(rows, width, scale=scale)
    found = unpack(expand(**compress(scatter, rows, 0)))
    error = (found - scatter).abs() / scatter.diagonal().outer(scatter.diagonal()).sqrt()
    assert float(error.max()) < 0.03


def test_of_many_rows_the_strongest_directions_are_kept() -> None:
    scatter = scatter_of(900, 400)
    kept = compress(scatter, 900, 0)
    assert kept["factor"].shape == (RANK, 400)
    value, vector = torch.linalg.eigh(scatter)
    best = (vector[:, -RANK:] * value[-RANK:]) @ vector[:, -RANK:].T
    best.diagonal().copy_(scatter.diagonal())
    found = unpack(expand(**kept))
    assert float((found - scatter).norm()) < 1.1 * float((best - scatter).norm()) + 0.02 * float(scatter.norm())
    torch.testing.assert_close(found.diagonal(), scatter.diagonal(), rtol=0.02, atol=0)


def test_what_comes_back_is_exact_whatever_the_order_of_sums() -> None:
    generator = torch.Generator().manual_seed(3)
    factor = torch.randint(-127, 128, (RANK, 33), generator=generator).to(torch.int8)
    factor[:, :2] = 127  # the largest possible sums
    exponent = torch.randint(-40, 13, (33,), generator=generator).to(torch.int8)
    found = unpack(expand(factor, exponent, torch.zeros(33)))
    whole = factor.numpy().astype(np.int64)
    unit = np.exp2(exponent.numpy().astype(np.float64))
    np.testing.assert_array_equal(found.numpy(), (whole.T @ whole) * unit * unit[:, None])


@pytest.mark.parametrize("rows", [3, 300])
def test_it_is_positive_semi_definite_as_it_stands(rows: int) -> None:
    found = unpack(expand(**compress(scatter_of(rows, 70), rows, 0)))
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-9 * float(found.trace())


def test_the_same_scatter_gives_the_same_bytes() -> None:
    one, other = (compress(scatter_of(300, 290), 300, 5) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_that_are_all_alike_have_none() -> None:
    found = unpack(expand(**compress(torch.zeros(6, 6, dtype=torch.float64), 4, 0)))
    assert torch.equal(found, torch.zeros(6, 6, dtype=torch.float64))
