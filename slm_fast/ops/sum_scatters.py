"""sum_scatters: the exact sum of several tasks' scatter matrices, from the compact form in which they are stored.

A task's scatter [D, D] is

    scatter[i, j] = sum_r factor[r, i] factor[r, j] 2^(exponent[i] + exponent[j]) + (i == j) diagonal[i]

The sum of its eight-bit products is exact in float32 in any order, and each element is rounded once to the units of an
exact sum (`slm_fast.exact_sum`). So every backend gives the same bits, on all machines.

Shape suffixes: T tasks, N directions of all tasks, R directions of one, D features, U = D (D + 1) / 2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.ops import dispatch

COARSE, FINE = 2.0**10, 2.0**56  # reciprocal units of the two planes
RANK = 256  # directions of a task. 256 127^2 < 2^24: float32 is exact up to this
EXPONENTS = (-40, 12)
MOST_DIAGONAL = 2.0**45
MOST_TASKS = 64  # the largest sum is then below 2^63 units
ROWS_AT_ONCE = 128


def sum_scatters(factor: Tensor, rows: Tensor, exponent: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the upper triangles of tasks' scatters, row by row.

    Args:
        factor: [N, D] int8, the directions of all tasks, one after the other.
        rows: [T] int64, number of directions of each task, at most 256 each; sums to N. At most 64 tasks.
        exponent: [T, D] int8, -40 to 12.
        diagonal: [T, D] float32, of magnitude 2^45 at most.

    Returns:
        coarse, fine [D (D + 1) / 2] int64, in units of 2^-10 and 2^-56. An element v of a task adds round(v 2^10) to
        coarse and the remainder, rounded, to fine.

    Raises:
        InputError: a shape, dtype, device or value does not fit.
    """
    for name, tensor, dtype, axes in (
        ("factor", factor, torch.int8, 2),
        ("rows", rows, torch.int64, 1),
        ("exponent", exponent, torch.int8, 2),
        ("diagonal", diagonal, torch.float32, 2),
    ):
        if tensor.dim() != axes or tensor.dtype != dtype or tensor.device != factor.device:
            raise InputError(
                f"{name}: expected {dtype} with {axes} axes on {factor.device}, got {tensor.dtype} {list(tensor.shape)}"
                f" on {tensor.device}"
            )
    for name, tensor in (("exponent", exponent), ("diagonal", diagonal)):
        if tensor.shape != (len(rows), factor.shape[1]):
            expected = [len(rows), factor.shape[1]]
            raise InputError(f"{name}: expected {expected} for rows and factor, got {list(tensor.shape)}")
    if len(rows) > MOST_TASKS or int(rows.sum()) != len(factor) or ((rows < 0) | (rows > RANK)).any():
        wanted = f"at most {MOST_TASKS} numbers from 0 to {RANK} with the sum {len(factor)}"
        raise InputError(f"rows: expected {wanted}, got {rows.tolist()}")
    low, high = EXPONENTS
    if ((exponent < low) | (exponent > high)).any():
        raise InputError(f"exponent: expected {low} to {high}, got {int(exponent.min())} to {int(exponent.max())}")
    if not (diagonal.abs() <= MOST_DIAGONAL).all():  # NaN fails this, too
        raise InputError("diagonal: expected finite numbers of at most 2^45")
    coarse, fine = dispatch.operator("sum_scatters", factor.device.type)(factor, rows, exponent, diagonal)
    return coarse, fine


def expand(factor: Tensor, exponent: Tensor, diagonal: Tensor) -> Tensor:
    """The upper triangle of one scatter, row by row, [U] float64, from factor [R, D], exponent [D] and diagonal [D].

    It is computed a few rows at a time, which stay in the caches. Scaling by powers of two is exact, and all products
    in a sum have the same power.
    """
    scaled_RD, width = factor.float() * exponent.double().exp2().float(), len(diagonal)
    packed_U, place, begins = np.empty(width * (width + 1) // 2), 0, []
    for first in range(0, width, ROWS_AT_ONCE):
        part = (scaled_RD[:, first : first + ROWS_AT_ONCE].T @ scaled_RD[:, first:]).numpy()
        for i, row in enumerate(part):
            begins.append(place)
            packed_U[place : place + len(row) - i] = row[i:]
            place += len(row) - i
    packed_U[begins] += diagonal.double().numpy()
    return torch.from_numpy(packed_U)


def in_units(term: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in units of the coarse plane and what remains of them in units of the fine one, both int64."""
    scaled = term.double() * COARSE
    units = scaled.round()
    return units.long(), (scaled - units).mul_(FINE / COARSE).round_().long()


# The specification. Every other backend gives the same bits.


@dispatch.without_autocast
def reference_sum_scatters(
    factor_ND: Tensor, rows_T: Tensor, exponent_TD: Tensor, diagonal_TD: Tensor
) -> tuple[Tensor, Tensor]:
    coarse_U, fine_U = fake_sum_scatters(factor_ND, rows_T, exponent_TD, diagonal_TD)
    coarse_U.zero_(), fine_U.zero_()
    for factor_RD, exponent_D, diagonal_D in zip(
        factor_ND.cpu().split(rows_T.tolist()), exponent_TD.cpu(), diagonal_TD.cpu(), strict=True
    ):
        units_U, rest_U = in_units(expand(factor_RD, exponent_D, diagonal_D))
        coarse_U += units_U.to(coarse_U.device)
        fine_U += rest_U.to(fine_U.device)
    return coarse_U, fine_U


def fake_sum_scatters(factor: Tensor, rows: Tensor, exponent: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    width = factor.shape[1]
    coarse = factor.new_empty(width * (width + 1) // 2, dtype=torch.int64)
    return coarse, torch.empty_like(coarse)
