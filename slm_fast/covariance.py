"""Counts, means and scatter of queries: a task's statistics for the gaussian router."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast.errors import InputError, NotFinite, WorkError
from slm_fast.exact_sum import ExactSum

PERCENTILES = 101
ALIKE = 2.0**-18  # relative difference that rounding may cause between two float32 queries of one text
ROWS_AT_ONCE = 4096


def check_finite(query: Tensor) -> None:
    """Raise NotFinite if a row of the queries [B, D] has numbers that are not finite."""
    if bad := (~query.isfinite().all(1)).nonzero()[:, 0].tolist():
        raise NotFinite(bad, len(query))


Discriminant = tuple[Tensor, Tensor, Tensor]  # a gaussian router's centre [D], keys [M, D] and bias [M]


class KnownKeys(NamedTuple):
    """Keys computed before. rows: by task name, the rows of its keys and biases in `discriminant`."""

    rows: Mapping[str, slice]
    discriminant: Discriminant

    def runs(self, names: Sequence[str], first: Sequence[int]) -> list[tuple[int, int, int]]:
        """Which known rows to copy for tasks wanted in the order of `names`, as few runs (begin, end, place): rows
        begin to end - 1 of the result are those from `place` on. first: where each task's rows begin, and the end."""
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
        """Whether these are exactly the keys of all `names`, in that order."""
        return self.rows.keys() == set(names) and self.runs(names, first) == [(0, len(self.discriminant[1]), 0)]


class Kept(NamedTuple):
    """Known results for several tasks, which a router then need not compute.

    Attributes:
        summed: returns names of tasks and the sum of their scatters, read on demand.
        keys: keys of some or all tasks, by the covariance of the tasks that are sampled now.
    """

    summed: Callable[[], tuple[AbstractSet[str], ExactSum] | None] | None = None
    keys: KnownKeys | None = None


NOTHING = Kept()


class Moments(NamedTuple):
    """Statistics of queries [N, D], with one mean for each label in each slot.

    Attributes:
        rows: [M], number of queries of each mean.
        mean: [M, D].
        slot: [M], slot of each mean, ascending.
        label: [M], label of each mean; -1 without labels and for an empty slot.
        scatter: [D, D], within means.
        assignment: [N], mean of each query.
    """

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
    """Compute the moments of queries, with sums in float64.

    Args:
        query: [N, Q]. Slots are clusters of these.
        slots: number of slots.
        seed: random seed of the clustering.
        labels: [N], label numbers. Without them each slot has one mean.
        expand: [n, Q] -> [n, D], applied to a few queries at a time before taking the moments.
    """
    if slots == 1:
        assignment, centre = torch.zeros(len(query), dtype=torch.int64), query[:1]
    else:
        from sklearn.cluster import KMeans  # a slow import, needed only for several slots

        if len(query) < slots:
            raise InputError(f"slots: {slots} slots need at least as many rows, got {len(query)}")
        means = KMeans(slots, n_init=4, random_state=seed % 2**32).fit(query.numpy())
        assignment, centre = torch.from_numpy(means.labels_).long(), torch.from_numpy(means.cluster_centers_)
    slot, label = torch.arange(slots), torch.full((slots,), -1)
    if labels is not None:
        # Existing (slot, label) pairs. Slots left empty, by fewer distinct rows than slots, are kept.
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
    """Symmetric [D, D] -> upper triangle, row by row [D (D + 1) / 2]."""
    return symmetric[_upper(len(symmetric))]


def unpack(packed: Tensor) -> Tensor:
    """Upper triangle, row by row [D (D + 1) / 2] -> symmetric [D, D]."""
    width = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    full = torch.zeros(width, width, dtype=packed.dtype).masked_scatter_(_upper(width), packed)
    return full + full.triu(1).T


def _upper(width: int) -> Tensor:
    """Mask [D, D] bool of the upper triangle, several times as fast as indices."""
    return torch.ones(width, width, dtype=torch.bool).triu()


class Covariance(NamedTuple):
    """matrix: [D, D]. shrinkage: weight of the multiple of the identity in it. freedom: degrees of freedom."""

    matrix: Tensor
    shrinkage: float
    freedom: float


def covariance(count: Tensor, mean: Tensor, scatter: Tensor, strength: float = 1.0, most: float = 1.0) -> Covariance:
    """Pooled covariance, with oracle-approximating shrinkage (Chen et al. 2010, Eq. 23) times `strength`, at most
    `most`.

    If rows differ from their means [S, D] only by rounding, it is the identity.
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
    """Lower-triangular L [D, D] with L L' = covariance. Raises as `factorised` does."""
    return factorised(covariance(count, mean, scatter).matrix)


def factorised(full: Tensor) -> Tensor:
    """Lower-triangular L [D, D] with L L' = `full`, a shrunk covariance, which is overwritten.

    With more rows than a float32 scatter can resolve, rounding may leave a shrunk covariance not positive definite.
    Then the smallest fraction of its mean variance that helps is added to the diagonal.

    Raises:
        WorkError: there is no such L.
    """
    variance = full.diagonal().mean()
    for ridge in (0.0, 1e-6, 1e-4, 1e-2):
        if ridge:
            full.diagonal().add_(ridge * variance)
        lower, failed = torch.linalg.cholesky_ex(full)
        if not failed:
            return lower
    raise WorkError("scatter: expected a positive definite covariance, got one that is not")


def is_scatter(scatter: Tensor) -> bool:
    """Whether [D, D] float32 is positive semi-definite, up to rounding of its numbers."""
    ridge = 1e-6 * float(scatter.trace()) + torch.finfo(torch.float32).tiny
    for dtype in (torch.float32, torch.float64):  # float32 suffices for most that are, in half the time
        full = scatter.to(dtype, copy=True)
        full.diagonal().add_(ridge)
        if not torch.linalg.cholesky_ex(full).info:
            return True
    return False


def mahalanobis(query: Tensor, mean: Tensor, lower: Tensor) -> Tensor:
    """Mahalanobis distance [N] of queries [N, D] from the nearest of the means [S, D]."""
    white_query = torch.linalg.solve_triangular(lower, query.T, upper=False).T
    white_mean = torch.linalg.solve_triangular(lower, mean.T, upper=False).T
    return torch.cdist(white_query, white_mean).amin(1)


def held_out_distances(query: Tensor, slots: int, seed: int, labels: Tensor | None) -> Tensor:
    """Distances of training queries [N, D] from a fit to the other half of them, in no particular order: from a fit to
    themselves they would be too small. Both halves have rows of each label, however the rows are ordered. With fewer
    than four rows per slot, two fits to all rows give each distance twice."""
    rows = torch.arange(len(query)) if labels is None else labels.argsort(stable=True)
    halves = (rows[0::2], rows[1::2]) if len(query) >= 4 * slots else (rows, rows)
    found = []
    for fitted, held_out in (halves, halves[::-1]):
        half = moments(query[fitted], slots, seed, None if labels is None else labels[fitted])
        found.append(mahalanobis(query[held_out], half.mean, whitener(half.rows, half.mean, half.scatter)))
    return torch.cat(found)


def percentiles(distance: Tensor) -> Tensor:
    """Percentiles 0, 1, ..., 100 of distances: [N] -> [101] float32."""
    return torch.quantile(distance.double(), torch.linspace(0, 1, PERCENTILES, dtype=torch.float64)).float()


def share_below(distance: Tensor, percentiles: Tensor) -> Tensor:
    """Position of distances [N] among percentiles 0, 1, ..., 100 [101], from 0 to 1. Beyond the last it is 1 plus the
    excess in units of the upper half's width. A distance equal to a percentile is not beyond it."""
    distance, percentiles, last = distance.double(), percentiles.double(), len(percentiles) - 1
    above = torch.searchsorted(percentiles, distance)  # number of smaller percentiles
    lower = percentiles[(above - 1).clamp(min=0)]
    step = (percentiles[above.clamp(max=last)] - lower).clamp(min=1e-30)
    among = (above - 1 + (distance - lower) / step) / last
    half = (percentiles[last] - percentiles[last // 2]).clamp(min=1e-6 * percentiles[last].abs() + 1e-30)
    beyond = 1 + (distance - percentiles[last]) / half
    return torch.where(above > last, beyond, among.where(above > 0, torch.zeros_like(among)))
