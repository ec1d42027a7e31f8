"""Routers: from a query to a route, by one `ops.retrieve` call over what the tasks' files contain.

A router's part of a task depends on that task's queries alone, and parts are combined in the order of the tasks' names.
So tasks may be learned in any order and removed again, and no bit of the result depends on that history.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from slm_fast import ops
from slm_fast.covariance import (
    NOTHING,
    Discriminant,
    Kept,
    KnownKeys,
    check_finite,
    held_out_distances,
    mahalanobis,
    moments,
    pack,
    percentiles,
    share_below,
    unpack,
    whitener,
)
from slm_fast.errors import InputError, WorkError, some_of
from slm_fast.exact_sum import ExactSum
from slm_fast.ops import Route
from slm_fast.ops.invariant_linear import invariant_linear
from slm_fast.ops.retrieve import PreparedKeys, route_to_only_slots
from slm_fast.sketch import Sketch, sampled

Part = Mapping[str, Tensor]  # a task's part of the router
TASKS_AT_ONCE = 64  # tasks whose keys are computed at once, with the bits that each has alone
MEANS_AT_ONCE = 4096  # means whose keys are computed together
FEW = 256  # number of rows that are routed before keys are prepared: for fewer, it does not pay
WHITENER_BYTES = 256 << 20  # maximum bytes of covariances kept for distances


AnyRouter = TypeVar("AnyRouter", bound="Router")
AnyGaussian = TypeVar("AnyGaussian", bound="GaussianRouter")


@dataclass
class Router(ABC):
    """Routes among the slots of the tasks whose parts it has. Slot ids follow the order of the tasks' names.

    Once loaded, a router does not change. `changed` returns another one, at the cost of the parts that differ (and of
    lists with an entry for each task). What concerns all slots is computed for the first route.
    """

    k: int

    @abstractmethod
    def fit(self, query: Tensor, slots: int, seed: int, labels: Tensor | None = None) -> dict[str, Tensor]:
        """A task's part, from its training queries [N, D] and their label numbers [N], if any."""

    @abstractmethod
    def slots(self, part: Part) -> int:
        """Number of slots of a task."""

    @abstractmethod
    def route(self, query: Tensor, mask: Tensor | None = None, *, check: bool = True) -> Route:
        """The route of queries [B, D] among the slots allowed by `mask` [B, P] or [P]. check: whether to check that all
        queries are finite, which waits for a GPU; without it, the route of one that is not is arbitrary."""

    def label_scores(self, query: Tensor, slot_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Log-odds [B, M] of labels for queries [B, D], and for each, [M], the index of its task and its number there
        (-1: no label); of the tasks of some slots, or all. None if nothing is known about labels."""
        return None

    @abstractmethod
    def _distance(self, query: Tensor, task: int) -> Tensor:
        """Distances of queries [N, D] from a task: [N]."""

    def _percentiles(self, task: int) -> Tensor:
        """Distances of the task's training queries: percentiles 0, 1, ..., 100 [101]."""
        return self.parts[task]["distance"]

    @abstractmethod
    def _sensitivity(self, query: Tensor, task: int) -> Tensor:
        """How much these distances may change per small relative change of the query: [N]."""

    def load(self, parts: Sequence[Part] | Mapping[str, Part], device: torch.device, kept: Kept = NOTHING) -> None:
        """Route among these tasks, given by name or as a list in order, then named 000000, 000001, ...

        kept: known results for all of them. Raises WorkError if a part cannot be used.
        """
        named = parts if isinstance(parts, Mapping) else {f"{i:06d}": part for i, part in enumerate(parts)}
        self._hold(sorted(named), [named[name] for name in sorted(named)], device)

    def changed(self: AnyRouter, add: Mapping[str, Part], remove: Sequence[str] = ()) -> AnyRouter:
        """A router without the tasks in `remove` and with those in `add`, which may replace them.

        Raises:
            InputError: a name to remove is not there, or one to add is.
            WorkError: a part is unusable.
        """
        there = dict(zip(self.names, self.parts, strict=True))
        for name in remove:
            if there.pop(name, None) is None:
                raise InputError(f"task {name!r}: the router does not have it; tasks: {some_of(there)}")
        if taken := sorted(there.keys() & add.keys()):
            raise InputError(f"task {taken[0]!r}: the router has it already")
        router, there = replace(self), there | dict(add)
        names = sorted(there)
        router._hold(names, [there[name] for name in names], self.device)
        return router

    def _hold(self, names: list[str], parts: list[Part], device: torch.device) -> None:
        for kind in type(self).__mro__:  # discard what was computed from all tasks
            for attribute in [name for name, value in vars(kind).items() if isinstance(value, cached_property)]:
                vars(self).pop(attribute, None)
        self.names, self.parts, self.device = names, parts, device

    @abstractmethod
    def prepare(self, *, for_many: bool = False) -> None:
        """Compute what concerns all slots now, rather than for the first route. for_many: also what pays only for many
        rows. Raises WorkError if that is impossible.
        """

    @cached_property
    def task_of_slot(self) -> list[int]:
        """Index in `names` of each slot's task."""
        return [i for i, part in enumerate(self.parts) for _ in range(self.slots(part))]

    @cached_property
    def slot_task(self) -> Tensor:
        """The same on the device, [P] int64."""
        return torch.tensor(self.task_of_slot, dtype=torch.int64, device=self.device)

    def distance(self, query: Tensor, slot_ids: Tensor, rounding: float = 0.0) -> Tensor:
        """Distance of each query [B, D] from the task of its slot [B]: the share of that task's training rows that are
        nearer, [B] float32; more than 1 beyond all of them.

        rounding: relative error of the queries, since the other rows of a batch affect a query's last bits. A task
        whose distances cannot be computed (its part is damaged) is infinitely far from everything.
        """
        task_B, query = self.slot_task[slot_ids.to(self.device)].cpu(), query.cpu()
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
    """Linear discriminant analysis: a mean for each label of a slot, and one shared covariance within means.

        score[b, p] = the highest of q' S^-1 m - m' S^-1 m / 2 over the slot's means m,
        weights = softmax(score / temperature) over the top K

    Streaming LDA (Hayes & Kanan 2020). Similar tasks are told apart by their labels: what differs between the labels of
    one task says nothing about which task it is. A task's part is (count, mean, slot of each mean, scatter), and
    scatters add up, so no old data is needed. The covariance is shrunk towards a multiple of the identity, by the
    oracle-approximating amount of Chen, Wiesel, Eldar & Hero (2010). Distance is Mahalanobis (Lee et al. 2018) in the
    task's own covariance, so that it does not depend on other tasks.

    Covariance and centre are of all tasks up to 2,048, beyond that of 512 chosen by their names (`slm_fast.sketch`).
    One of these costs its scatter's D (D + 1) / 2 numbers and, at the next route, a Cholesky factor [D, D] and a
    product [P, D] [D, D]. Any other task costs its own keys, an `invariant_linear` [M, D] [D, D]: their bits depend
    on its means and those 512 alone. Scatters are summed exactly and means are in name order: history does not count.
    whiteners: task name -> factor [D, D] of its covariance, for tasks whose distance was last requested.
    """

    k: int = 2
    temperature: float = 4.0
    is_kept = False  # whether the discriminant was known when the tasks were loaded
    _routed = 0  # number of rows routed among all slots
    _follows = False  # whether it was derived from another router
    _known: KnownKeys | None = field(default=None, init=False, repr=False, compare=False)  # keys computed before

    def fit(self, query: Tensor, slots: int, seed: int, labels: Tensor | None = None) -> dict[str, Tensor]:
        check_finite(query)
        query = query.double().cpu()
        whole = moments(query, slots, seed, labels)
        return {
            "count": whole.rows.float(),
            "mean": whole.mean.float(),
            "mean_slot": whole.slot.float(),
            "scatter": pack(whole.scatter).float(),
            "distance": percentiles(held_out_distances(query, slots, seed, labels)),
        }

    def slots(self, part: Part) -> int:
        return int(self.mean_slot(part)[-1]) + 1

    @staticmethod
    def mean_slot(part: Part) -> Tensor:
        """The slot of each mean, [M] int64, ascending. Older files, without means for labels, have one per slot."""
        return part["mean_slot"].long() if "mean_slot" in part else torch.arange(len(part["count"]))

    def means(self, part: Part) -> Tensor:
        """The means [M, D] float64 from which a task's keys are computed."""
        return part["mean"].double()

    def load(self, parts: Sequence[Part] | Mapping[str, Part], device: torch.device, kept: Kept = NOTHING) -> None:
        super().load(parts, device)
        self.whiteners = dict[str, Tensor]()
        there = dict(zip(self.names, self.parts, strict=True))
        self.sketch = Sketch({name: there[name] for name in sampled(there)}, there, kept.summed)
        self._follows, self._known = False, kept.keys
        self.is_kept = kept.keys is not None and kept.keys.is_of(self.names, self.first_mean)
        if kept.keys is None:
            _ = self.scatter
        elif self.is_kept:
            centre, keys, bias = (part.to(device) for part in kept.keys.discriminant)
            self.discriminant = centre, keys, bias

    @property
    def scatter(self) -> ExactSum:
        """The sum of the sampled tasks' scatters, for new keys and for distances."""
        return self.sketch.scatter

    def changed(self: AnyGaussian, add: Mapping[str, Part], remove: Sequence[str] = ()) -> AnyGaussian:
        router = super().changed(add, remove)
        before = dict(zip(self.names, self.parts, strict=True))
        same = {name for name, part in zip(router.names, router.parts, strict=True) if before.get(name) is part}
        router._follow(self, same)
        for name in remove:
            router.sketch.let_go(name)
        return router

    def _follow(self, before: GaussianRouter, same: AbstractSet[str]) -> None:
        """Take over results of the tasks `same` from the router before a change. Raises as `ExactSum.of` does."""
        there = dict(zip(self.names, self.parts, strict=True))
        self.sketch = before.sketch.changed({name: there[name] for name in sampled(there)})
        self.whiteners = {name: lower for name, lower in dict(before.whiteners).items() if name in same}
        if self.sketch is before.sketch and before._has_others and (known := before.known_keys) is not None:
            rows = {name: place for name, place in known.rows.items() if name in same}
            self._known = KnownKeys(rows, known.discriminant)
        self._follows = True

    @property
    def known_keys(self) -> KnownKeys | None:
        """Keys computed so far, of all tasks or of some."""
        if "discriminant" not in vars(self):
            return self._known
        rows = {name: slice(*own) for name, own in zip(self.names, pairwise(self.first_mean), strict=True)}
        return KnownKeys(rows, self.discriminant)

    @cached_property
    def first_mean(self) -> list[int]:
        """Index of each task's first mean, and the number of all means."""
        return list(accumulate((len(part["count"]) for part in self.parts), initial=0))

    @cached_property
    @torch.inference_mode(False)
    def discriminant(self) -> Discriminant:
        """Centre [D], keys [M, D] and bias [M] of all means. Queries are taken relative to the centre of the means,
        which adds the same to all scores of a query: no route changes, and float32 resolves their differences
        better."""
        first, known = self.first_mean, self._known if self._has_others else None
        rows = {} if known is None else known.rows
        new = [i for i, name in enumerate(self.names) if name not in rows]
        centre = (self._centre().float() if known is None else known.discriminant[0]).to(self.device)
        keys, bias = torch.empty(first[-1], len(centre), device=self.device), torch.empty(first[-1], device=self.device)
        if known is not None:
            for begin, end, place in known.runs(self.names, first):
                for part, old in ((keys, known.discriminant[1]), (bias, known.discriminant[2])):
                    part[begin:end] = old[place : place + end - begin]
        keep = self._follows and known is not None
        for i, own_keys, own_bias in self._computed(new, keep=keep) if self._has_others else self._together():
            keys[first[i] : first[i + 1]], bias[first[i] : first[i + 1]] = own_keys, own_bias
        self._known = None  # so that nothing is held twice
        return centre, keys, bias

    def _computed(self, tasks: Sequence[int], *, keep: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield some tasks, each with keys [M, D] and biases [M] of its means. keep: keep the inverse, with the
        sample."""
        inverse = self._inverse(keep=keep) if tasks else torch.empty(0)
        for begin in range(0, len(tasks), TASKS_AT_ONCE):
            some = tasks[begin : begin + TASKS_AT_ONCE]
            centred = [self.means(self.parts[i]) - self._centre() for i in some]
            found = invariant_linear(torch.cat(centred), inverse).split([len(apart) for apart in centred])
            for i, apart, keys in zip(some, centred, found, strict=True):
                yield i, keys.float(), (-0.5 * (keys * apart).sum(1)).float()

    @property
    def _has_others(self) -> bool:
        """Whether there are tasks that are not sampled."""
        return len(self.names) > len(self.sketch.parts)

    def _together(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Like `_computed`, for all tasks. If all are sampled, a change affects all keys, and this is faster."""
        apart, lower = torch.cat([self.means(part) for part in self.parts]) - self._centre(), self._lower()
        keys = torch.cat([self._solved(lower, rows) for rows in apart.split(MEANS_AT_ONCE)])
        bias = -0.5 * (keys * apart).sum(1)
        for i, (begin, end) in enumerate(pairwise(self.first_mean)):
            yield i, keys[begin:end].float(), bias[begin:end].float()

    def _solved(self, lower: Tensor, rows: Tensor) -> Tensor:
        """Rows [M, D] times the inverse of the covariance with factor `lower`."""
        return rows @ torch.cholesky_inverse(lower)

    def _centre(self) -> Tensor:
        """The mean [D] float64 of the sampled tasks' means."""
        if self.sketch.centre is None:
            self.sketch.centre = torch.cat([self.means(part) for part in self.sketch.parts.values()]).mean(0)
        return self.sketch.centre

    def _inverse(self, *, keep: bool) -> Tensor:
        """Inverse [D, D] float64 of the sampled tasks' covariance. keep: keep it, with the sample."""
        found = self.sketch.inverse
        if found is None:
            found = torch.cholesky_inverse(self._lower()).T  # the same matrix (symmetric), with contiguous rows
            self.sketch.inverse = found if keep else None
        return found

    def _lower(self) -> Tensor:
        """The Cholesky factor [D, D] float64 of the sampled tasks' covariance."""
        return whitener(*self._moments(), unpack(self.scatter.total()))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Counts [M] and means [M, D] of the sampled tasks, float64."""
        count, mean = (torch.cat([part[key] for part in self.sketch.parts.values()]) for key in ("count", "mean"))
        return count.double(), mean.double()

    def prepare(self, *, for_many: bool = False) -> None:
        if self.parts and not all(extreme.isfinite() for part in self.discriminant for extreme in part.aminmax()):
            raise WorkError("scatter: expected that of all tasks to have an inverse in float32, got one that has none")
        _ = self.prepared if self.parts and for_many else None

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
        """The keys, prepared for many queries."""
        return ops.prepare_keys(self.keys, key_slot=self._slotted.key_slot, metric="dot")

    @cached_property
    def _slotted(self) -> PreparedKeys:
        """The keys, and the slot of each."""
        slot, first = torch.cat([self.mean_slot(part) for part in self.parts]), torch.tensor(self.first_mean)
        many = slot[first[1:] - 1] + 1  # number of slots of each task
        key_slot = slot + (many.cumsum(0) - many).repeat_interleave(first.diff())
        return PreparedKeys(self.keys, 1, None, key_slot.to(self.device), int(key_slot.bincount().max()))

    def route(self, query: Tensor, mask: Tensor | None = None, *, check: bool = True) -> Route:
        if check:
            check_finite(query)
            if (only := self._without_search(mask)) is not None:
                return only
        self._routed += len(query) if mask is None else 0  # with a mask, what is prepared is not used
        return ops.retrieve(
            query - self.centre,
            self.prepared if mask is None and self._routed > FEW else self._slotted,
            self.k,
            bias=self.bias,
            mask=mask,
            metric="dot",
            weighting="softmax",
            temperature=self.temperature,
        )

    def _without_search(self, mask: Tensor | None) -> Route | None:
        """The route if no score can change it. Not before there are keys, since a captured pass cannot make them."""
        return route_to_only_slots(mask, self.k) if "_slotted" in vars(self) else None

    def _distance(self, query: Tensor, task: int) -> Tensor:
        return mahalanobis(query.double(), self.parts[task]["mean"].double(), self._whitener(task))

    def _sensitivity(self, query: Tensor, task: int) -> Tensor:
        return query.double().norm(dim=1) / self._whitener(task).diagonal().amin()

    def _whitener(self, task: int) -> Tensor:
        """The factor of a task's covariance, [D, D] float64, computed unless it was requested recently."""
        part, name = self.parts[task], self.names[task]
        lower = self.whiteners.pop(name, None)
        if lower is None:
            lower = whitener(part["count"].double(), part["mean"].double(), unpack(part["scatter"].double()))
        self.whiteners[name] = lower  # the last one is the most recently used
        while len(self.whiteners) > max(1, WHITENER_BYTES // lower.nbytes):
            self.whiteners.pop(next(iter(self.whiteners)))
        return lower
