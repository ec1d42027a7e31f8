"""Counts, means and scatter of queries: what the gaussian router computes of a task, and how tasks' scatters add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast.errors import InputError, WorkError

PERCENTILES = 101
ALIKE = 2.0**-18  # how far apart, of their size, rounding may leave two float32 queries of one text
COARSE, FINE = 2.0**10, 2.0**56  # one over the units of the two planes
ROWS_AT_ONCE, NUMBERS_AT_ONCE = 4096, 1 << 15
BLOCK = 256
LARGEST_TERM, LARGEST_PLANE = 2.0**52, 2**62


@dataclass(frozen=True)
class ExactSum:
    """A sum of float32 tensors that keeps no trace of its history: its bits follow from which terms are in it alone.

    Floating-point sums depend on their order, and subtracting a term leaves what rounding made of it. Here a term is
    rounded once, by itself, to a multiple of 2^-56 (the 24 bits of any number from 2^-33 up fit), and integers are
    summed: in any order, and `minus` undoes `plus` to the last bit, so that a forgotten task is gone.

    coarse, fine: int64, in units of 2^-10 and 2^-56. A term v goes in as round(v 2^10), and what that leaves of it, at
    most 2^45 fine units. So 2^17 terms fit whatever they are, and totals to 2^52 (a LLaMA's largest activations squared
    are about 2^23: room for 2^29 such rows).
    """

    coarse: Tensor
    fine: Tensor

    @classmethod
    def of(cls, terms: Iterable[Tensor], start: ExactSum | None = None) -> ExactSum:
        """The sum of these, and of what is in `start`, if given.

        Raises WorkError for a term that is not finite or of another shape, or a sum that is too large.
        """
        total = start and cls(start.coarse.clone(), start.fine.clone())
        for term in terms:
            total = total or cls(*torch.zeros(2, *term.shape, dtype=torch.int64))
            total._add(term)
        return total or cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))

    def plus(self, term: Tensor) -> ExactSum:
        """Raises as `of`."""
        total = ExactSum(self.coarse.clone(), self.fine.clone())
        total._add(term)
        return total

    def minus(self, term: Tensor) -> ExactSum:
        """Without a term that is in the sum."""
        total = ExactSum(self.coarse.clone(), self.fine.clone())
        total.take(term)
        return total

    def take(self, term: Tensor) -> None:
        """Take a term out where the sum lies, which needs no memory for another."""
        self._add(term, -1)

    def _add(self, term: Tensor, sign: int = 1) -> None:
        """Add a term to the planes where they lie, as many of its numbers at once as the caches hold."""
        if term.shape != self.coarse.shape:
            raise WorkError(f"scatter: expected {list(self.coarse.shape)} as other tasks have, got {list(term.shape)}")
        whole = [plane.flatten().split(NUMBERS_AT_ONCE) for plane in (self.coarse, self.fine)]
        for coarse, fine, part in zip(*whole, term.flatten().split(NUMBERS_AT_ONCE), strict=True):
            if not len(part):
                continue
            lowest, highest = part.aminmax()
            if not (lowest > -LARGEST_TERM and highest < LARGEST_TERM):  # not a number fails this too
                raise WorkError(f"scatter: expected finite numbers below 2^52, got {float(lowest)}..{float(highest)}")
            scaled = part.double() * COARSE
            units = scaled.round()
            rest = (scaled - units).mul_(FINE / COARSE).round_()
            for plane, more in ((coarse, units), (fine, rest)):
                plane.add_(more.long(), alpha=sign)  # less than 2^63, as both are at most 2^62
                if max(map(abs, map(int, plane.aminmax()))) > LARGEST_PLANE:
                    raise WorkError("scatter: expected a sum over all tasks below 2^52, got a larger one")

    def total(self) -> Tensor:
        """float64, within a few units in the last place."""
        return self.coarse.double() / COARSE + self.fine.double() / FINE


Discriminant = tuple[Tensor, Tensor, Tensor]  # centre [D], keys [M, D] and bias [M] of a gaussian router


class KnownKeys(NamedTuple):
    """Keys that were computed. rows: task name -> where its means' keys and biases lie."""

    rows: Mapping[str, slice]
    discriminant: Discriminant

    def runs(self, names: Sequence[str], first: Sequence[int]) -> list[tuple[int, int, int]]:
        """Of rows that are wanted in this order, each name's from `first` on: from where to where those go that lie one
        after another here, and where they lie."""
        found: list[tuple[int, int, int]] = []
        for name, begin, end in zip(names, first, first[1:], strict=False):
            if (own := self.rows.get(name)) is None:
                continue
            place = own.start
            if found and found[-1][1] == begin and found[-1][2] + begin - found[-1][0] == place:
                begin, _, place = found.pop()
            found.append((begin, end, place))
        return found

    def is_of(self, names: Sequence[str], first: Sequence[int]) -> bool:
        """Whether they are those of all these, as they are wanted."""
        return self.rows.keys() == set(names) and self.runs(names, first) == [(0, len(self.discriminant[1]), 0)]


class Kept(NamedTuple):
    """What is known of tasks together, so that a router need not compute it.

    summed: names of tasks and the sum of their scatters, read when it is asked for. keys: of all tasks or of some, in
    the covariance of those that are sampled now.
    """

    summed: Callable[[], tuple[AbstractSet[str], ExactSum] | None] | None = None
    keys: KnownKeys | None = None


NOTHING = Kept()


class Moments(NamedTuple):
    """Of queries [N, D]: rows [M] and mean [M, D] of each label in each slot, the slot [M] of each in rising order, its
    label [M] (-1 without labels), the scatter within [D, D], and which mean is that of each query [N]."""

    rows: Tensor
    mean: Tensor
    slot: Tensor
    label: Tensor
    scatter: Tensor
    assignment: Tensor


def moments(
    query: Tensor,
    slots: int,
    seed: int,
    labels: Tensor | None = None,
    expand: Callable[[Tensor], Tensor] = lambda query: query,
) -> Moments:
    """Of queries [N, Q], expanded to [N, D] a few at a time, and the numbers of their labels [N]; sums are in float64.
    Without labels there is one mean a slot. Slots are clusters of the queries as they come."""
    if slots == 1:
        assignment, centre = torch.zeros(len(query), dtype=torch.int64), query[:1]
    else:
        from sklearn.cluster import KMeans  # a slow import that only several slots a task need

        if len(query) < slots:
            raise InputError(f"slots: {slots} slots need at least as many rows, got {len(query)}")
        means = KMeans(slots, n_init=4, random_state=seed % 2**32).fit(query.numpy())
        assignment, centre = torch.from_numpy(means.labels_).long(), torch.from_numpy(means.cluster_centers_)
    slot, label = torch.arange(slots), torch.full((slots,), -1)
    if labels is not None:
        # Pairs of a slot and a label that there are; fewer distinct rows than slots leave slots empty, which stay.
        many = int(labels.max()) + 1
        pairs = assignment * many + labels
        empty = slot[torch.bincount(assignment, minlength=slots) == 0] * many
        known = torch.cat([pairs, empty]).unique()
        assignment, slot, label = torch.searchsorted(known, pairs), known // many, known % many
    count = torch.bincount(assignment, minlength=len(slot)).double()
    label = label.where(count > 0, -1)
    middle = expand(centre.to(query.dtype)).double()
    mean = torch.zeros(len(slot), middle.shape[1], dtype=torch.float64)
    scatter = torch.zeros(middle.shape[1], middle.shape[1], dtype=torch.float64)
    for own, part in zip(assignment.split(ROWS_AT_ONCE), query.split(ROWS_AT_ONCE), strict=True):
        mean.index_add_(0, own, expand(part).double())
    mean = torch.where(count[:, None] > 0, mean / count[:, None], middle[slot])
    for own, part in zip(assignment.split(ROWS_AT_ONCE), query.split(ROWS_AT_ONCE), strict=True):
        centred = expand(part).double() - mean[own]
        scatter += centred.T @ centred
    return Moments(count, mean, slot, label, scatter, assignment)


def pack(symmetric: Tensor) -> Tensor:
    """[D, D] -> the upper triangle, row by row [D (D + 1) / 2]."""
    return symmetric[_upper(len(symmetric))]


def unpack(packed: Tensor) -> Tensor:
    """The upper triangle, row by row [D (D + 1) / 2] -> symmetric [D, D]."""
    width = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    full = torch.zeros(width, width, dtype=packed.dtype).masked_scatter_(_upper(width), packed)
    return full + full.triu(1).T


def _upper(width: int) -> Tensor:
    """[D, D] bool: the upper triangle. A mask is several times as fast as indices."""
    return torch.ones(width, width, dtype=torch.bool).triu()


class Covariance(NamedTuple):
    """matrix: [D, D]. shrinkage: the share of it that is a multiple of the identity. freedom: of the rows it is of."""

    matrix: Tensor
    shrinkage: float
    freedom: float


def covariance(count: Tensor, mean: Tensor, scatter: Tensor, strength: float = 1.0, most: float = 1.0) -> Covariance:
    """The pooled covariance, shrunk `strength` times as much as the oracle-approximating formula says (Chen et al.
    2010, Eq. 23), and at `most` so much.

    Rows that differ from their means [S, D] by rounding alone have no covariance, and get the identity.
    """
    width = scatter.shape[0]
    freedom = float((count.sum() - len(count)).clamp(min=1))
    sample = scatter / freedom
    scale = float(sample.trace()) / width
    identity = torch.eye(width, dtype=sample.dtype)
    if scale <= (ALIKE**2) * float((mean**2).mean()):
        return Covariance(identity, 1.0, freedom)
    squared = float((sample**2).mean())
    numerator = squared + scale**2
    denominator = (freedom + 1) * (squared - scale**2 / width)
    shrinkage = min(1.0 if denominator <= 0 else strength * min(numerator / denominator, 1.0), most)
    return Covariance((1 - shrinkage) * sample + shrinkage * scale * identity, shrinkage, freedom)


def whitener(count: Tensor, mean: Tensor, scatter: Tensor) -> Tensor:
    """Lower-triangular L [D, D] with L L' = covariance. Raises as `factorised`."""
    return factorised(covariance(count, mean, scatter).matrix)


def factorised(full: Tensor) -> Tensor:
    """Lower-triangular L [D, D] with L L' = a shrunk covariance, which is overwritten. Raises WorkError where there is
    none.

    Of more rows than a float32 scatter can tell apart, the shrunk covariance may be short of positive definite by
    rounding; then as little of its mean variance as helps is added to the diagonal.
    """
    variance = full.diagonal().mean()
    for ridge in (0.0, 1e-6, 1e-4, 1e-2):
        if ridge:
            full.diagonal().add_(ridge * variance)
        lower, failed = torch.linalg.cholesky_ex(full)
        if not failed:
            return lower
    raise WorkError("scatter: expected a positive definite covariance, got one that is not")


def products(rows: Sequence[Tensor], symmetric: Tensor) -> list[Tensor]:
    """Each of some matrices [M, D] times a symmetric one [D, D].

    Each by itself, so that its bits do not depend on what else is asked for; all with a block of the other that stays
    in the caches, which takes a third of the time.
    """
    found = [torch.empty_like(own) for own in rows]
    for begin in range(0, len(symmetric), BLOCK):
        block = symmetric[begin : begin + BLOCK].T
        for own, product in zip(rows, found, strict=True):
            product[:, begin : begin + BLOCK] = own @ block
    return found


def is_scatter(scatter: Tensor) -> bool:
    """Whether [D, D] float32 is positive semi-definite, but for what rounding made of its numbers."""
    ridge = 1e-6 * float(scatter.trace()) + torch.finfo(torch.float32).tiny
    for dtype in (torch.float32, torch.float64):  # float32 finds most of those that are, in half the time
        full = scatter.to(dtype, copy=True)
        full.diagonal().add_(ridge)
        if not torch.linalg.cholesky_ex(full).info:
            return True
    return False


def mahalanobis(query: Tensor, mean: Tensor, lower: Tensor) -> Tensor:
    """Distance [N] of queries [N, D] from the nearest of the means [S, D]."""
    white_query = torch.linalg.solve_triangular(lower, query.T, upper=False).T
    white_mean = torch.linalg.solve_triangular(lower, mean.T, upper=False).T
    return torch.cdist(white_query, white_mean).amin(1)


def held_out_distances(query: Tensor, slots: int, seed: int, labels: Tensor | None) -> Tensor:
    """How far training queries [N, D] are from what half of the others say, [N], in no order: those of rows from a fit
    to themselves would be too small. Each label's rows are dealt out to both halves, in whatever order they stand."""
    rows = torch.arange(len(query)) if labels is None else labels.argsort(stable=True)
    halves = (rows[0::2], rows[1::2]) if len(query) >= 4 * slots else (rows, rows)
    found = []
    for fitted, held_out in (halves, halves[::-1]):
        half = moments(query[fitted], slots, seed, None if labels is None else labels[fitted])
        found.append(mahalanobis(query[held_out], half.mean, whitener(half.rows, half.mean, half.scatter)))
    return torch.cat(found)


def percentiles(distance: Tensor) -> Tensor:
    """[N] -> [101] float32: percentiles 0, 1, ..., 100."""
    return torch.quantile(distance.double(), torch.linspace(0, 1, PERCENTILES, dtype=torch.float64)).float()


def share_below(distance: Tensor, percentiles: Tensor) -> Tensor:
    """Where distances [N] lie among percentiles 0, 1, ..., 100 [101], from 0 to 1; beyond them 1 and what they are
    farther by, in units of the upper half. What lies on a percentile is not beyond it."""
    distance, percentiles, last = distance.double(), percentiles.double(), len(percentiles) - 1
    above = torch.searchsorted(percentiles, distance)  # how many are less
    lower = percentiles[(above - 1).clamp(min=0)]
    step = (percentiles[above.clamp(max=last)] - lower).clamp(min=1e-30)
    among = (above - 1 + (distance - lower) / step) / last
    half = (percentiles[last] - percentiles[last // 2]).clamp(min=1e-6 * percentiles[last].abs() + 1e-30)
    beyond = 1 + (distance - percentiles[last]) / half
    return torch.where(above > last, beyond, among.where(above > 0, torch.zeros_like(among)))
