"""Which tasks the covariance and the centre of a gaussian router are of, and what is computed of these together."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from slm_fast.covariance import ExactSum
from slm_fast.errors import WorkError
from slm_fast.scatter import scatter_of

Parts = Mapping[str, Mapping[str, Tensor]]  # what tasks' files hold for their router, by name
SAMPLED = 512  # tasks; so many say what rows around their means are like as well as all do
ALL = 2048  # up to so many all are sampled: to compute all their keys together takes less time than each by itself


def sampled(names: Iterable[str]) -> list[str]:
    """The tasks that covariance and centre are of, in the order of their names: the SAMPLED whose names have the lowest
    SHA-256, but all of them up to ALL.

    A bottom-k sketch (Cohen & Kaplan 2007): as good as drawn at random, and yet it follows from the names that there
    are, whatever came and went before. A task that comes or goes changes at most one that is in it for another; and if
    it is not in it, it changes no other task's keys, so that its cost does not grow with their number.
    """
    names = list(names)
    if len(names) <= ALL:
        return sorted(names)
    return sorted(heapq.nsmallest(SAMPLED, names, key=lambda name: hashlib.sha256(name.encode()).digest()))


class Pooled(NamedTuple):
    """lower: the Cholesky factor [D, D] float64 of the sampled tasks' shrunk covariance. of_a_row: how much of d d' is
    in that covariance for a row of one of them that is d from its mean."""

    lower: Tensor
    of_a_row: float


class Sketch:
    """The parts of the sampled tasks, by name. Routers that have the same share one, and what was computed of it.

    centre: [D] float64, of their means. inverse: [D, D] float64, of their covariance. It and `pooled` take 8 D^2 bytes
    and are kept by who may need them again: the inverse where a task was learned beside the sample, and the next one
    may be; `pooled` where distances are asked for.
    """

    def __init__(
        self,
        parts: Parts,
        others: Parts | None = None,
        summed: Callable[[], tuple[AbstractSet[str], ExactSum] | None] | None = None,
    ) -> None:
        """summed: `Kept.summed`, which may lack some and have some of `others`."""
        self.parts, self._others, self._summed = dict(parts), dict(others or {}), summed
        self.centre: Tensor | None = None
        self.inverse: Tensor | None = None
        self.pooled: Pooled | None = None

    @cached_property
    def scatter(self) -> ExactSum:
        """The sum of their scatters. Raises as `ExactSum.of`."""
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
        """That of these parts, at the cost of those that are new in it or gone. Raises as `ExactSum.of`."""
        if parts.keys() == self.parts.keys() and all(parts[name] is part for name, part in self.parts.items()):
            return self
        after = Sketch(parts)
        after.scatter = _moved(self.scatter, self.parts, parts)
        return after

    def let_go(self, name: str) -> None:
        """Hold no part of a task that is not in it and is gone."""
        self._others.pop(name, None)


def _moved(start: ExactSum | None, before: Parts, after: Parts) -> ExactSum:
    """The sum of the scatters `after`, from that `before`."""
    gone = [part for name, part in before.items() if after.get(name) is not part]
    came = [part for name, part in after.items() if before.get(name) is not part]
    if start is not None and before and len(gone) + len(came) <= len(after):
        total = ExactSum.of(map(scatter_of, came), start)
        try:
            for part in gone:
                total.take(scatter_of(part))
            return total
        except WorkError:  # its file was damaged since: what it added is known from what the others did
            pass
    return ExactSum.of(map(scatter_of, after.values()))
