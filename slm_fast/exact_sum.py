"""Exact sums of tasks' scatters, from which a task can be taken away without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_fast.errors import InputError, WorkError
from slm_fast.ops.sum_scatters import COARSE, FINE, in_units, sum_scatters
from slm_fast.scatter import Compact

NUMBERS_AT_ONCE = 1 << 15
COMPACT_AT_ONCE = 32
LARGEST_TERM, LARGEST_PLANE = 2.0**52, 2**62
Term = Tensor | Compact


@dataclass(frozen=True)
class ExactSum:
    """A sum of float32 tensors without a history: its bits depend only on which terms it contains.

    Floating-point sums depend on their order, and subtracting a term leaves its rounding errors behind. Here each term
    is rounded once, on its own, to a multiple of 2^-56 (exact for numbers of 2^-33 and above, with their 24 bits), and
    the sum is one of integers: its order does not matter, and `minus` undoes `plus` to the last bit, so that no trace
    of a forgotten task is left.

    A term is a tensor, or a scatter's compact form, which stands for its upper triangle, row by row.

    Attributes:
        coarse, fine: int64, in units of 2^-10 and 2^-56. A term v adds round(v 2^10) to coarse and the remainder, at
            most 2^45 units, to fine. So at least 2^17 terms fit, with totals up to 2^52 (a LLaMA's largest squared
            activations are about 2^23, which leaves room for 2^29 such rows).
    """

    coarse: Tensor
    fine: Tensor

    @classmethod
    def of(cls, terms: Iterable[Term], start: ExactSum | None = None) -> ExactSum:
        """Sum these terms, and add `start` if given.

        Raises:
            WorkError: a term is not finite or has another shape, or the sum is too large.
        """
        total = start and start._copy()
        for some in _batches(terms):
            if total is not None:
                total._move(some, 1)
            elif isinstance(some, Tensor):
                total = cls(*torch.zeros(2, *some.shape, dtype=torch.int64))
                total._move(some, 1)
            else:
                total = cls(*_summed(some))
        return total or cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))

    def minus(self, *terms: Term) -> ExactSum:
        """Subtract terms that the sum contains."""
        total = self._copy()
        total.take(terms)
        return total

    def take(self, terms: Iterable[Term]) -> None:
        """Subtract terms in place, without memory for another sum."""
        for some in _batches(terms):
            self._move(some, -1)

    def total(self) -> Tensor:
        """The sum in float64, within a few units in the last place."""
        return self.coarse.double() / COARSE + self.fine.double() / FINE

    def _copy(self) -> ExactSum:
        return ExactSum(self.coarse.clone(), self.fine.clone())

    def _move(self, some: Tensor | list[Compact], sign: int) -> None:
        """Add a tensor or compact scatters in place, or subtract them."""
        shape = some.shape if isinstance(some, Tensor) else some[0].shape
        if shape != self.coarse.shape:
            raise WorkError(f"scatter: expected {list(self.coarse.shape)} as other tasks have, got {list(shape)}")
        if isinstance(some, Tensor):
            whole = [plane.flatten().split(NUMBERS_AT_ONCE) for plane in (self.coarse, self.fine)]
            for coarse, fine, part in zip(*whole, some.flatten().split(NUMBERS_AT_ONCE), strict=True):  # fit the caches
                if len(part):
                    _check(part)
                    _add((coarse, fine), in_units(part), sign)
        else:
            _add((self.coarse, self.fine), _summed(some), sign)


def _batches(terms: Iterable[Term]) -> Iterator[Tensor | list[Compact]]:
    """Tensors as they come, and compact scatters several at a time."""
    some: list[Compact] = []
    for term in terms:
        if some and (isinstance(term, Tensor) or term.shape != some[0].shape or len(some) == COMPACT_AT_ONCE):
            yield some
            some = []
        if isinstance(term, Tensor):
            yield term
        else:
            some.append(term)
    if some:
        yield some


def _summed(scatters: list[Compact]) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([len(own.factor) for own in scatters])
    factor = torch.cat([own.factor for own in scatters])
    try:
        return sum_scatters(factor, rows, *(torch.stack(part) for part in list(zip(*scatters, strict=True))[1:]))
    except InputError as error:
        raise WorkError(f"scatter: {error}") from None


def _check(part: Tensor) -> None:
    lowest, highest = part.aminmax()
    if not (lowest > -LARGEST_TERM and highest < LARGEST_TERM):  # NaN fails this, too
        raise WorkError(f"scatter: expected finite numbers below 2^52, got {float(lowest)}..{float(highest)}")


def _add(planes: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor], sign: int) -> None:
    for plane, own in zip(planes, more, strict=True):
        plane.add_(own, alpha=sign)  # no overflow: both are at most 2^62
        if plane.numel() and max(map(abs, map(int, plane.aminmax()))) > LARGEST_PLANE:
            raise WorkError("scatter: expected a sum over all tasks below 2^52, got a larger one")
