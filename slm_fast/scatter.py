"""A compact form of a scatter matrix: its strongest directions in eight bits, and the rest as a diagonal.

A task's scatter [D, D] of N rows has rank at most N, and what distinguishes tasks is in its strongest directions. It is
kept as `factor` [R, D] int8, `exponent` [D] int8 and `diagonal` [D] float32, meaning

    scatter[i, j] = sum_r factor[r, i] factor[r, j] 2^(exponent[i] + exponent[j]) + (i == j) diagonal[i]

which is positive semi-definite by construction. Sums of products of such small integers are exact in float32 in any
order, so all machines compute the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

RANK = 256  # directions kept. 256 127^2 < 2^24: float32 is exact up to this
EXPONENTS = (-40, 12)  # range of a factor's exponents; a scatter is then below 2^46
SPARE = 32  # extra directions in PASSES iterations that find the strongest ones (Halko et al. 2011)
PASSES = 4
ROWS_AT_ONCE = 128


def compress(scatter: Tensor, rows: int, seed: int) -> dict[str, Tensor]:
    """`factor`, `exponent` and `diagonal` of a scatter [D, D] float64 of `rows` rows. Its diagonal does not change."""
    factor = _strongest(scatter, min(rows, RANK, len(scatter)), seed)
    largest = factor.abs().amax(0).clamp(min=2.0 ** EXPONENTS[0])
    exponent = (largest / 127).log2().ceil().clamp(*EXPONENTS)
    factor = (factor / exponent.exp2()).round().clamp(-127, 127)
    kept = (factor * exponent.exp2()).square().sum(0)
    diagonal = (scatter.diagonal() - kept).clamp(min=0)
    return {"factor": factor.to(torch.int8), "exponent": exponent.to(torch.int8), "diagonal": diagonal.float()}


def expand(factor: Tensor, exponent: Tensor, diagonal: Tensor) -> Tensor:
    """The scatter's upper triangle, row by row, [D (D + 1) / 2] float64, with the same bits on all machines.

    It is computed a few rows at a time, which stay in the caches. Scaling by powers of two is exact, and all products
    in a sum have the same power.
    """
    scaled, width = factor.float() * exponent.double().exp2().float(), len(diagonal)
    packed, place, begins = np.empty(width * (width + 1) // 2), 0, []
    for first in range(0, width, ROWS_AT_ONCE):
        part = (scaled[:, first : first + ROWS_AT_ONCE].T @ scaled[:, first:]).numpy()
        for i, row in enumerate(part):
            begins.append(place)
            packed[place : place + len(row) - i] = row[i:]
            place += len(row) - i
    packed[begins] += diagonal.double().numpy()
    return torch.from_numpy(packed)


def scatter_of(part: Mapping[str, Tensor]) -> Tensor:
    """The upper triangle, row by row, of a task's scatter, from its part of the router."""
    return expand(part["factor"], part["exponent"], part["diagonal"]) if "factor" in part else part["scatter"]


def _strongest(scatter: Tensor, rank: int, seed: int) -> Tensor:
    """F [R, D] with F'F the part of a scatter in its R strongest directions, by subspace iteration."""
    width = len(scatter)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, min(width, rank + SPARE), generator=generator, dtype=torch.float64)
    for _ in range(PASSES):
        basis, _ = torch.linalg.qr(scatter @ basis)
    value, vector = torch.linalg.eigh(basis.T @ scatter @ basis)
    value, vector = value[-rank:].flip(0), vector[:, -rank:].flip(1)
    return value.clamp(min=0).sqrt()[:, None] * (basis @ vector).T
