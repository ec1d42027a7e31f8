"""A compact form of a scatter matrix: its strongest directions in eight bits, and the rest as a diagonal.

A task's scatter [D, D] of N rows has rank at most N, and what distinguishes tasks is in its strongest directions. It is
kept as `factor` [R, D] int8, `exponent` [D] int8 and `diagonal` [D] float32, meaning

    scatter[i, j] = sum_r factor[r, i] factor[r, j] 2^(exponent[i] + exponent[j]) + (i == j) diagonal[i]

which is positive semi-definite by construction. `slm_fast.ops.sum_scatters` sums these exactly, with the same bits on
all machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast.ops.sum_scatters import EXPONENTS, RANK

SPARE = 32  # extra directions in PASSES iterations that find the strongest ones (Halko et al. 2011)
PASSES = 4


def compress(scatter: Tensor, rows: int, seed: int) -> dict[str, Tensor]:
    """`factor`, `exponent` and `diagonal` of a scatter [D, D] float64 of `rows` rows. Its diagonal does not change."""
    factor = _strongest(scatter, min(rows, RANK, len(scatter)), seed)
    largest = factor.abs().amax(0).clamp(min=2.0 ** EXPONENTS[0])
    exponent = (largest / 127).log2().ceil().clamp(*EXPONENTS)
    factor = (factor / exponent.exp2()).round().clamp(-127, 127)
    kept = (factor * exponent.exp2()).square().sum(0)
    diagonal = (scatter.diagonal() - kept).clamp(min=0)
    return {"factor": factor.to(torch.int8), "exponent": exponent.to(torch.int8), "diagonal": diagonal.float()}


class Compact(NamedTuple):
    """A scatter's compact form: factor [R, D], exponent [D], diagonal [D]."""

    factor: Tensor
    exponent: Tensor
    diagonal: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the upper triangle, row by row."""
        width = len(self.diagonal)
        return torch.Size([width * (width + 1) // 2])


def scatter_of(part: Mapping[str, Tensor]) -> Tensor | Compact:
    """A task's scatter, from its part of the router: its upper triangle, row by row, or the compact form of it."""
    return Compact(*(part[name] for name in Compact._fields)) if "factor" in part else part["scatter"]


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
