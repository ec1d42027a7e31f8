"""Routers: from a query to a route. All are one `ops.retrieve` call over what the tasks' files hold.

A router's part of a task depends on that task's queries alone, and parts are combined in the order of the tasks' names.
So tasks may be learned in any order, or one taken away, and every bit of the result is as if that had been the history.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from slm_fast import ops
from slm_fast.covariance import (
    NOTHING,
    ExactSum,
    Kept,
    mahalanobis,
    moments,
    pack,
    percentiles,
    share_below,
    unpack,
    whitener,
)
from slm_fast.errors import InputError, WorkError, some_of
from slm_fast.ops import Route
from slm_fast.ops.retrieve import PreparedKeys
from slm_fast.scatter import scatter_of

Part = Mapping[str, Tensor]  # what one task's file holds for its router
WHITENER_BYTES = 256 << 20  # what the covariances kept for distances may take


class NotFinite(WorkError):
    """A query that is not a number, `row` of those given, counted from 0."""

    def __init__(self, row: int) -> None:
        super().__init__(f"query: row {row} holds a number that is not finite")
        self.row = row


def check_finite(query: Tensor) -> None:
    bad = (~query.isfinite().all(1)).nonzero()
    if len(bad):
        raise NotFinite(int(bad[0]))


AnyRouter = TypeVar("AnyRouter", bound="Router")


@dataclass
class Router(ABC):
    """Routes among the slots of tasks whose parts it holds, in the order of their names; slot ids follow that order.

    Once loaded a router does not change. `with_part` and `without` return another one, at the cost of that one task's
    part (and of lists as long as there are tasks). What concerns all slots is computed for the first route asked for.
    """

    k: int

    @abstractmethod
    def fit(self, query: Tensor, slots: int, seed: int, labels: Tensor | None = None) -> dict[str, Tensor]:
        """A task's part from its training queries [N, D] and, where it has them, the numbers of their labels [N]."""

    @abstractmethod
    def slots(self, part: Part) -> int:
        """How many slots a task has."""

    @abstractmethod
    def route(self, query: Tensor, mask: Tensor | None = None, *, check: bool = True) -> Route:
        """query [B, D], mask [B, P] or [P] of slots allowed -> Route. check: look whether all queries are finite, for
        which a GPU is waited for; where one is not its route may be any."""

    def label_scores(self, query: Tensor, slot_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Log-odds [B, M] of labels for queries [B, D], and [M] the place of each one's task and its number there (-1:
        no label); of the tasks of some slots, or all. None where nothing is known of labels."""
        return None

    @abstractmethod
    def _distance(self, query: Tensor, task: int) -> Tensor:
        """How far queries [N, D] are from a task: [N]."""

    def _percentiles(self, task: int) -> Tensor:
        """How far the task's training queries are from it: percentiles 0, 1, ..., 100 [101]."""
        return self.parts[task]["distance"]

    @abstractmethod
    def _sensitivity(self, query: Tensor, task: int) -> Tensor:
        """How much that distance may change with a small change of the query, as a share of its size: [N]."""

    def load(self, parts: Sequence[Part] | Mapping[str, Part], device: torch.device, kept: Kept = NOTHING) -> None:
        """Route among these tasks, given by name or as a list in order, whose names are then 000000, 000001, ...

        kept: what is known of them together. Raises WorkError for a part that cannot be used.
        """
        named = parts if isinstance(parts, Mapping) else {f"{i:06d}": part for i, part in enumerate(parts)}
        names = sorted(named)
        self._hold(names, [named[name] for name in names], device)

    def with_part(self: AnyRouter, name: str, part: Part) -> AnyRouter:
        """A router that knows one more task.

        Raises InputError for a name that is taken, WorkError for a part that cannot be used.
        """
        if name in self.names:
            raise InputError(f"task {name!r}: the router has it already")
        router, names, parts, i = replace(self), self.names, self.parts, bisect(self.names, name)
        router._hold([*names[:i], name, *names[i:]], [*parts[:i], part, *parts[i:]], self.device)
        return router

    def without(self: AnyRouter, name: str) -> AnyRouter:
        """A router that knows one task less. Raises InputError for a name that is not there."""
        router, i = replace(self), self._place(name)
        router._hold(self.names[:i] + self.names[i + 1 :], self.parts[:i] + self.parts[i + 1 :], self.device)
        return router

    def _hold(self, names: list[str], parts: list[Part], device: torch.device) -> None:
        for kind in type(self).__mro__:  # what is computed of all tasks is computed anew
            for attribute in [name for name, value in vars(kind).items() if isinstance(value, cached_property)]:
                vars(self).pop(attribute, None)
        self.names, self.parts, self.device = names, parts, device

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise InputError(f"task {name!r}: the router does not have it; tasks: {some_of(self.names)}")
        return self.names.index(name)

    @abstractmethod
    def prepare(self) -> None:
        """Compute what concerns all slots now, rather than when the first route is asked for.

        Raises WorkError where that cannot be done.
        """

    @cached_property
    def task_of_slot(self) -> list[int]:
        """Which task (its place in `names`) each slot belongs to."""
        return [i for i, part in enumerate(self.parts) for _ in range(self.slots(part))]

    def distance(self, query: Tensor, slot_ids: Tensor, rounding: float = 0.0) -> Tensor:
        """How far each query [B, D] is from the task of its slot [B]: the share of that task's training rows that are
        nearer [B] float32, more than 1 beyond all of them.

        As much of a query as `rounding` is not its own: what the other rows of its batch make of its last bits. A task
        whose distances cannot be computed (its part is damaged) is infinitely far from everything.
        """
        task_B, query = torch.tensor(self.task_of_slot)[slot_ids.cpu()], query.cpu()
        found = torch.full((len(query),), torch.inf)
        for task in task_B.unique().tolist():
            rows = task_B == task
            try:
                distance = self._distance(query[rows], task) - rounding * self._sensitivity(query[rows], task)
                found[rows] = share_below(distance.float(), self._percentiles(task)).float()
            except WorkError:
                pass
        return found


@dataclass
class GaussianRouter(Router):
    """Linear discriminant analysis: a mean for each label of a slot, one covariance within them, shared by all.

        score[b, p] = the highest of q' S^-1 m - m' S^-1 m / 2 over the slot's means m,
        weights = softmax(score / temperature) over the top K

    Streaming LDA (Hayes & Kanan 2020). Tasks that resemble each other are told apart by their labels: what one task's
    labels differ in says nothing of which task it is. A task's part is (count, mean, whose each mean is, scatter), and
    scatters add up, so no old data is needed. The covariance is shrunk towards a multiple of the identity by the amount
    that the oracle-approximating formula of Chen, Wiesel, Eldar & Hero (2010) gives. Distance is Mahalanobis (Lee et
    al. 2018) in the task's own covariance, so that it does not change when other tasks are learned.

    A task more or less costs its scatter's D (D + 1) / 2 numbers. The next route then takes a Cholesky factor of [D, D]
    and a product [P, D] [D, D]. Scatters are summed exactly and means stand in name order, so no history shows in them.
    whiteners: task name -> the factor [D, D] of its covariance, of those whose distance was asked for last.
    """

    k: int = 2
    temperature: float = 4.0
    _kept = NOTHING  # of one that was loaded

    def fit(self, query: Tensor, slots: int, seed: int, labels: Tensor | None = None) -> dict[str, Tensor]:
        check_finite(query)
        query = query.double().cpu()
        whole = moments(query, slots, seed, labels)
        # Held-out distances: those of training rows from a fit to themselves would be too small.
        # Each label's rows are dealt out to both halves, in whatever order the labels stand.
        rows = torch.arange(len(query)) if labels is None else labels.argsort(stable=True)
        halves = (rows[0::2], rows[1::2]) if len(query) >= 4 * slots else (rows, rows)
        distances = []
        for fitted, held_out in (halves, halves[::-1]):
            own = None if labels is None else labels[fitted]
            half = moments(query[fitted], slots, seed, own)
            distances.append(mahalanobis(query[held_out], half.mean, whitener(half.rows, half.mean, half.scatter)))
        return {
            "count": whole.rows.float(),
            "mean": whole.mean.float(),
            "mean_slot": whole.slot.float(),
            "scatter": pack(whole.scatter).float(),
            "distance": percentiles(torch.cat(distances)),
        }

    def slots(self, part: Part) -> int:
        return int(self.mean_slot(part)[-1]) + 1

    @staticmethod
    def mean_slot(part: Part) -> Tensor:
        """The slot of each mean, [M] int64, in rising order. Files of before there were labels' means have one a
        slot."""
        return part["mean_slot"].long() if "mean_slot" in part else torch.arange(len(part["count"]))

    def load(self, parts: Sequence[Part] | Mapping[str, Part], device: torch.device, kept: Kept = NOTHING) -> None:
        super().load(parts, device)
        self._kept, self.whiteners = kept, dict[str, Tensor]()
        if kept.discriminant is None:
            _ = self.scatter
        else:
            centre, keys, bias = (part.to(device) for part in kept.discriminant)
            self.discriminant = centre, keys, bias

    @property
    def is_kept(self) -> bool:
        """Whether the discriminant is the one that was known when the tasks were loaded."""
        return self._kept.discriminant is not None

    @cached_property
    def scatter(self) -> ExactSum:
        """The sum of all tasks' scatters. Where keys were kept only those who learn, forget or measure distances need
        it."""
        known, start = (self._kept.summed() if self._kept.summed else None) or (frozenset(), None)
        if start is not None and not known <= set(self.names):
            known, start = frozenset(), None
        new = (part for name, part in zip(self.names, self.parts, strict=True) if name not in known)
        return ExactSum.of(map(scatter_of, new), start)

    def with_part(self, name: str, part: Part) -> GaussianRouter:
        router = super().with_part(name, part)
        term = scatter_of(part)
        router.scatter = self.scatter.plus(term) if self.parts else ExactSum.of([term])
        router.whiteners = dict(self.whiteners)
        return router

    def without(self, name: str) -> GaussianRouter:
        router = super().without(name)
        try:
            router.scatter = self.scatter.minus(scatter_of(self.parts[self._place(name)]))
        except WorkError:  # its file was damaged since: what it added is known from what the others did
            router.scatter = ExactSum.of(map(scatter_of, router.parts))
        router.whiteners = {task: lower for task, lower in dict(self.whiteners).items() if task != name}
        return router

    @cached_property
    @torch.inference_mode(False)
    def discriminant(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centre [D], and of all means keys [M, D] and bias [M]. Queries are measured from the centre of the means.
        That adds the same to all scores of a query, so no route changes, and float32 keeps more of their
        differences."""
        count = torch.cat([part["count"] for part in self.parts]).double()
        mean_PD = torch.cat([part["mean"] for part in self.parts]).double()
        inverse = torch.cholesky_inverse(whitener(count, mean_PD, unpack(self.scatter.total())))
        centre = mean_PD.mean(0)
        centred_PD = mean_PD - centre
        keys_PD = centred_PD @ inverse
        bias = -0.5 * (keys_PD * centred_PD).sum(1)
        return centre.float().to(self.device), keys_PD.float().to(self.device), bias.float().to(self.device)

    def prepare(self) -> None:
        if self.parts and not all(part.isfinite().all() for part in self.discriminant):
            raise WorkError("scatter: expected that of all tasks to have an inverse in float32, got one that has none")

    @property
    def centre(self) -> Tensor:
        return self.discriminant[0]

    @property
    def keys(self) -> Tensor:
        return self.discriminant[1]

    @property
    def bias(self) -> Tensor:
        return self.discriminant[2]

    @cached_property
    def prepared(self) -> PreparedKeys:
        """The keys and whose each of them is."""
        key_slots, first, most = [], 0, 1
        for part in self.parts:
            slot = self.mean_slot(part)
            key_slots.append(slot + first)
            first += int(slot[-1]) + 1
            most = max(most, int(slot.bincount().max()))
        return PreparedKeys(self.keys, 1, None, torch.cat(key_slots).to(self.device), most)

    def route(self, query: Tensor, mask: Tensor | None = None, *, check: bool = True) -> Route:
        if check:
            check_finite(query)
        return ops.retrieve(
            query - self.centre,
            self.prepared,
            self.k,
            bias=self.bias,
            mask=mask,
            metric="dot",
            weighting="softmax",
            temperature=self.temperature,
        )

    def _distance(self, query: Tensor, task: int) -> Tensor:
        return mahalanobis(query.double(), self.parts[task]["mean"].double(), self._whitener(task))

    def _sensitivity(self, query: Tensor, task: int) -> Tensor:
        return query.double().norm(dim=1) / self._whitener(task).diagonal().amin()

    def _whitener(self, task: int) -> Tensor:
        """The factor of a task's covariance, [D, D] float64; computed if it is not among those asked for last."""
        part, name = self.parts[task], self.names[task]
        lower = self.whiteners.pop(name, None)
        if lower is None:
            lower = whitener(part["count"].double(), part["mean"].double(), unpack(part["scatter"].double()))
        self.whiteners[name] = lower  # the last is the one used last
        while len(self.whiteners) > max(1, WHITENER_BYTES // lower.nbytes):
            self.whiteners.pop(next(iter(self.whiteners)))
        return lower
