"""The sampled tasks, whose rows define the covariance and centre of a gaussian router, and results computed from
them."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from slm_fast.errors import WorkError
from slm_fast.exact_sum import ExactSum
from slm_fast.scatter import scatter_of

Parts = Mapping[str, Mapping[str, Tensor]]  # parts of the router in tasks' files, by name
SAMPLED = 512  # sample size: as good as all tasks for the distribution of rows around their means
ALL = 2048  # up to this number all are sampled: computing all keys together is then faster than each by itself


def sampled(names: Iterable[str]) -> list[str]:
    """Names of the tasks that covariance and centre are computed from, sorted: those SAMPLED whose names have the
    lowest SHA-256, or all if there are at most ALL.

    This is a bottom-k sketch (Cohen & Kaplan 2007): as good as a random sample, but determined by the present names
    alone, whatever came and went before. Adding or removing a task replaces at most one sampled task by another. If it
    is not sampled itself, it changes no other task's keys, so its cost does not grow with their number.
    """
    names = list(names)
    if len(names) <= ALL:
        return sorted(names)
    return sorted(heapq.nsmallest(SAMPLED, names, key=lambda name: hashlib.sha256(name.encode()).digest()))


class Pooled(NamedTuple):
    """The shrunk covariance of the sampled tasks.

    Attributes:
        lower: its Cholesky factor [D, D] float64.
        of_a_row: weight in it of d d', for a row of these tasks that is d from its mean.
    """

    lower: Tensor
    of_a_row: float


class Sketch:
    """The parts of the sampled tasks, by name. Routers with the same ones share a sketch, and what was computed from
    it.

    Attributes:
        centre: [D] float64, of their means.
        inverse: [D, D] float64, of their covariance. It and `pooled` take 8 D^2 bytes each and are kept only where they
            may be needed again: the inverse once a task outside of the sample is learned, as the next may be, too.
        pooled: kept if distances are requested.
    """

    def __init__(
        self,
        parts: Parts,
        others: Parts | None = None,
        summed: Callable[[], tuple[AbstractSet[str], ExactSum] | None] | None = None,
    ) -> None:
        """summed: `Kept.summed`. It may lack some of these tasks and include some of `others`."""
        self.parts, self._others, self._summed = dict(parts), dict(others or {}), summed
        self.centre: Tensor | None = None
        self.inverse: Tensor | None = None
        self.pooled: Pooled | None = None

    @cached_property
    def scatter(self) -> ExactSum:
        """The sum of their scatters. Raises as `ExactSum.of` does."""
        known, start = (self._summed() if self._summed else None) or (frozenset[str](), None)
        there = self._others | self.parts
        if not known <= there.keys():
            known, start = frozenset(), None
        total = _moved(start, {name: there[name] for name in known}, self.parts)
        self._others, self._summed = {}, None
        return total

    @property
    def is_summed(self) -> bool:
        return "scatter" in vars(self)

    def changed(self, parts: Parts) -> Sketch:
        """The sketch of these parts, at the cost of those that are new or gone. Raises as `ExactSum.of` does."""
        if parts.keys() == self.parts.keys() and all(parts[name] is part for name, part in self.parts.items()):
            return self
        after = Sketch(parts)
        after.scatter = _moved(self.scatter, self.parts, parts)
        return after

    def let_go(self, name: str) -> None:
        """Release the part of a removed task that is not sampled."""
        self._others.pop(name, None)


def _moved(start: ExactSum | None, before: Parts, after: Parts) -> ExactSum:
    """The sum of the scatters `after`, starting from that of `before`."""
    gone = [part for name, part in before.items() if after.get(name) is not part]
    came = [part for name, part in after.items() if before.get(name) is not part]
    if start is not None and before and len(gone) + len(came) <= len(after):
        total = ExactSum.of(map(scatter_of, came), start)
        try:
            total.take(map(scatter_of, gone))
            return total
        except WorkError:  # its file is damaged by now: sum the remaining tasks instead
            pass
    return ExactSum.of(map(scatter_of, after.values()))
