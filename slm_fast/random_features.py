"""The gaussian router over random features of the query, which can separate similar tasks that no linear score can.

What it keeps of a task is small (`slm_fast.scatter`), and also tells how far a query is from all known tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from slm_fast.covariance import PERCENTILES, check_finite, covariance, factorised, moments, percentiles, unpack
from slm_fast.layers import use_onednn
from slm_fast.ops import Route
from slm_fast.router import GaussianRouter, Part
from slm_fast.scatter import compress
from slm_fast.sketch import Pooled

SHRINKAGE = 4.0  # factor of the oracle-approximating shrinkage, which assumes Gaussian queries: their tails are heavier
MOST_SHRINKAGE = 0.9
KEPT, PRIOR_ROWS = 0.6, 2.0  # share of its deviation that a mean of n rows keeps: KEPT n / (n + PRIOR_ROWS)
LABEL_TEMPERATURE = 24.0  # of label scores, sums over thousands of dependent features
APART = 0.5  # weight of the distance from the nearest mean beside that from all means, each in its sample's width
BEFORE = (1.0, 0.0, 64.0, 0.0)  # these four, in files without them; files with three lack the last
MANY_MEANS = 1024  # above this only the means needed are scored; below, selecting them takes longer
SAMPLE = 96  # training queries kept of a task, to measure the distances of its own rows
ROUNDING = 1e-3  # maximum relative rounding error of a distance
LEAST_LEFT = 0.05  # minimum of 1 - w r'r in `_left_out`, since compression changed the covariance


@dataclass
class RandomFeatureRouter(GaussianRouter):
    """`GaussianRouter` over (q, relu(W q)), with W a fixed random matrix (as RanPAC, McDonnell et al. 2023).

    A task's part: `count`, `mean` and `mean_slot` as there; `mean_label` [M], label number of each mean (-1 without
    labels); the scatter, as `slm_fast.scatter` keeps it; `constants` [4], KEPT, PRIOR_ROWS, LABEL_TEMPERATURE and APART
    when it was learned; `sample` [m, Q], queries of at most 96 training rows, and `sample_mean` [m], their means.

    Keys are made from means that are shrunk towards the mean of their task's rows (as James & Stein 1961): of a label's
    deviation from the task, with n rows, the share KEPT n / (n + PRIOR_ROWS) is kept. What few rows say about so many
    features is mostly chance, and counts against their label; and similarity to one label of a task is weaker evidence
    for the task than similarity to its rows.

    The distance of a query is the share of the task's own rows that are less far, the larger of two. One finds what
    resembles the tasks and belongs to none: how little nearer it is to the task's nearest mean than to the centre of
    all means (Ren et al. 2021; the negative of its highest score), plus APART of its squared distance from that mean,
    each measured by how much it varies among the task's rows. The other finds what resembles nothing known: half of
    that squared distance (Lee et al. 2018; all of it if the task has only one mean). Both use the
    covariance of many tasks and change with it, so the rows of the sample are measured anew, each as if it had not been
    among those that mean and covariance are made of. (A row of a task that the covariance does not include is only in
    the mean.)

    Attributes:
        matrix: W, which reads the first `in_features` elements of the query (`feature_matrix`).
    """

    matrix: nn.Linear = field(default_factory=lambda: feature_matrix(1, 1, torch.device("cpu")))

    def __post_init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def expand(self, query: Tensor) -> Tensor:
        """Queries [B, Q] and their random features: [B, D] float32."""
        if self._last is not None and self._last[0] is query:
            return self._last[1]
        matrix = self.matrix
        if matrix.weight.device != query.device:  # queries are on the CPU in `fit`, and for distances
            matrix = _copy_on(matrix, query.device)
        expanded = torch.cat([query, matrix(query[:, : matrix.in_features]).relu_()], 1)
        self._last = query, expanded  # label_scores needs what route has just computed
        return expanded

    @torch.no_grad()
    def fit(self, query: Tensor, slots: int, seed: int, labels: Tensor | None = None) -> dict[str, Tensor]:
        check_finite(query)
        query = query.float().cpu()
        found = moments(query, slots, seed, labels, self.expand)
        self._last = None
        sample = _spread(found.assignment, found.rows)
        return {
            "count": found.rows.float(),
            "mean": found.mean.float(),
            "mean_slot": found.slot.float(),
            "mean_label": found.label.float(),
            "constants": torch.tensor([KEPT, PRIOR_ROWS, LABEL_TEMPERATURE, APART]),
            **compress(found.scatter, len(query), seed),
            "sample": query[sample],
            "sample_mean": found.assignment[sample].float(),
        }

    def means(self, part: Part) -> Tensor:
        return drawn_means(part)

    def _follow(self, before: GaussianRouter, same: AbstractSet[str]) -> None:
        super()._follow(before, same)
        if self.sketch is before.sketch and isinstance(before, RandomFeatureRouter):
            self.left_out = {name: found for name, found in dict(before.left_out).items() if name in same}

    @property
    def pooled(self) -> Pooled:
        """Kept only once distances are requested: it is as large as a covariance."""
        if self.sketch.pooled is None:
            self.sketch.pooled = self._pooled()
        return self.sketch.pooled

    @torch.inference_mode(False)
    def _pooled(self) -> Pooled:
        found = covariance(*self._moments(), unpack(self.scatter.total()), SHRINKAGE, MOST_SHRINKAGE)
        return Pooled(factorised(found.matrix), (1 - found.shrinkage) / found.freedom)

    def _lower(self) -> Tensor:
        return (self.sketch.pooled or self._pooled()).lower

    def _solved(self, lower: Tensor, rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.T, lower).T

    @cached_property
    def label_of_mean(self) -> tuple[Tensor, Tensor]:
        """For each mean, the index of its task and the number of its label there (-1 for none), [M] int64 each."""
        means = torch.tensor(self.first_mean).diff()
        task = torch.arange(len(self.parts)).repeat_interleave(means)
        label = torch.cat([part["mean_label"] for part in self.parts]).long()
        return task.to(self.device), label.to(self.device)

    @cached_property
    def label_temperature(self) -> Tensor:
        """Label temperature of each mean, [M]."""
        each = [torch.full((len(part["count"]),), constants(part)[2]) for part in self.parts]
        return torch.cat(each).to(self.device)

    def route(self, query: Tensor, mask: Tensor | None = None, *, check: bool = True) -> Route:
        if check:
            check_finite(query)
            if (only := self._without_search(mask)) is not None:
                return only
        if mask is None and len(self.task_of_slot) == 1:  # a single slot is every row's route, without keys
            ids = torch.full((len(query), self.k), -1, device=query.device)
            ids[:, 0].zero_()
            return Route(ids, (ids == 0).float())
        return super().route(self.expand(query), mask, check=False)

    def label_scores(self, query: Tensor, slot_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        keys, bias, temperature, (task, label) = self.keys, self.bias, self.label_temperature, self.label_of_mean
        if slot_ids is not None and len(keys) > MANY_MEANS:
            asked = torch.zeros(len(self.parts), dtype=torch.bool, device=keys.device)
            asked[self.slot_task[slot_ids.clamp(min=0)]] = True
            (chosen,) = asked[task].nonzero(as_tuple=True)
            keys, bias, temperature, task, label = (own[chosen] for own in (keys, bias, temperature, task, label))
        scores = (self.expand(query) - self.centre) @ keys.T + bias
        return scores / temperature, task, label

    # Distances

    def _distance(self, query: Tensor, task: int) -> Tensor:
        centre, keys, bias = self._own_discriminant(task)
        expanded = self.expand(query).double()
        score, nearest = ((expanded - centre) @ keys.T + bias).max(1)
        apart = expanded - drawn_means(self.parts[task])[nearest]
        return self._share(-score, self._white(apart).square().sum(0), task)

    def _sensitivity(self, query: Tensor, task: int) -> Tensor:
        return torch.zeros(len(query))  # negligible for shares of at most 96 rows

    def _percentiles(self, task: int) -> Tensor:
        if task not in self._known_percentiles:
            none = not len(self.parts[task]["sample"])  # nothing to compare with
            found = (
                torch.full((PERCENTILES,), torch.inf) if none else percentiles(self._share(*self._left_out(task), task))
            )
            self._known_percentiles[task] = found
        return self._known_percentiles[task]

    @cached_property
    def _known_percentiles(self) -> dict[int, Tensor]:
        return {}

    def _share(self, relative: Tensor, absolute: Tensor, task: int) -> Tensor:
        """The share [N] of the sample that is nearer than these two distances [N], or more than 1 beyond all of it."""
        near, far = self._left_out(task)
        if not len(near):
            return torch.zeros(len(relative))
        own = len(self.parts[task]["count"])
        alone = _share(absolute if own == 1 else absolute / 2, far)  # without labels the relative one says little
        if own == len(self.keys) == 1:  # the only mean is the centre
            return alone
        weight = constants(self.parts[task])[3] * _width(near) / max(_width(far), ROUNDING)
        return torch.maximum(alone, _share(relative + weight * absolute, near + weight * far))

    def _own_discriminant(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """Centre [D], and keys [own, D] and bias [own] of a task's means, float64."""
        own = slice(self.first_mean[task], self.first_mean[task] + len(self.parts[task]["count"]))
        centre, keys, bias = self.centre, self.keys[own], self.bias[own]
        return centre.double().cpu(), keys.double().cpu(), bias.double().cpu()

    def _white(self, rows: Tensor) -> Tensor:
        """Rows [N, D], whitened by the covariance: [D, N]."""
        return torch.linalg.solve_triangular(self.pooled.lower, rows.T, upper=False)

    @cached_property
    def left_out(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Results of `_left_out`, by task."""
        return {}

    def _left_out(self, task: int) -> tuple[Tensor, Tensor]:
        """The two distances [m] of the rows of a task's sample. Each row is removed from its mean and, if the
        covariance includes the task, from the covariance, by the Sherman-Morrison formula."""
        if (known := self.left_out.get(self.names[task])) is not None:
            return known
        part, (centre, keys, bias) = self.parts[task], self._own_discriminant(task)
        row, mean = torch.arange(len(part["sample"])), part["sample_mean"].long()
        query = self.expand(part["sample"]).double()
        apart, count = query - part["mean"].double()[mean], part["count"].double()[mean]
        own = drawn_means(part, query, mean)
        # r = S^-1/2 (q - m) etc.; in S - w (q - m) (q - m)' products are x'y + w (x'r) (y'r) / (1 - w r'r).
        r, q, m, left = self._white(torch.cat([apart, query - centre, own - centre, query - own])).chunk(4, 1)
        of_a_row = self.pooled.of_a_row if self.names[task] in self.sketch.parts else 0.0
        weight = of_a_row * count / (count - 1)
        weight = weight / (1 - weight * r.square().sum(0)).clamp(min=LEAST_LEFT)

        def product(x: Tensor, y: Tensor) -> Tensor:
            return (x * y).sum(0) + weight * (x * r).sum(0) * (y * r).sum(0)

        toward = apart @ keys.T  # r' times all means
        scores = (query - centre) @ keys.T + (weight * (q * r).sum(0))[:, None] * toward
        scores += bias - weight[:, None] * toward.square() / 2
        scores[row, mean] = product(q, m) - product(m, m) / 2
        far = product(left, left)
        found = self.left_out[self.names[task]] = -scores.amax(1), far
        return found


def constants(part: Part) -> tuple[float, float, float, float]:
    """KEPT, PRIOR_ROWS, LABEL_TEMPERATURE and APART when a task was learned."""
    stored = part["constants"].tolist() if "constants" in part else []
    every = [*stored, *BEFORE[len(stored) :]]
    return every[0], every[1], every[2], every[3]


def drawn_means(part: Part, query: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
    """A task's means [M, D] float64, shrunk towards the mean of all its rows. Given some of these rows, `query` [m, D],
    and their means `mean` [m]: those means as they would be without the row, [m, D]."""
    plain, count = part["mean"].double(), part["count"].double()
    kept, prior, _, _ = constants(part)
    rows, whole = count.sum(), (count / count.sum()) @ plain
    if query is not None and mean is not None:
        whole = whole + (whole - query) / (rows - 1)
        plain = plain[mean] + (plain[mean] - query) / (count[mean] - 1)[:, None]
        count = count[mean] - 1
    share = torch.where(count > 0, 1 - kept * count / (count + prior), 0.0)  # a slot without rows keeps its mean
    return plain + share[:, None] * (whole - plain)


def _width(sample: Tensor) -> float:
    """The width of the upper half of a sample [m]."""
    return float(sample.max() - sample.sort().values[len(sample) // 2])


def _share(distance: Tensor, sample: Tensor) -> Tensor:
    """Position of distances [N] in a sample [m], from 0 to 1. Beyond the sample it is 1 plus the excess in units of the
    width of the sample's upper half. Differences within rounding do not count."""
    sample = sample.sort().values
    middle, last = float(sample[len(sample) // 2]), float(sample[-1])
    rounding = ROUNDING * (1 + float(sample.abs().max()))
    among = torch.from_numpy(np.interp(distance.numpy(), sample.numpy(), np.linspace(0, 1, len(sample))))
    return among + (distance - last - rounding).clamp(min=0) / (last - middle + rounding)


def _spread(assignment: Tensor, count: Tensor) -> Tensor:
    """Indices of at most SAMPLE of rows [N], spread evenly over their means, without rows that are a mean by
    themselves."""
    rows = assignment.argsort(stable=True)
    rows = rows[count[assignment[rows]] > 1]
    return rows[torch.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().long()]


_copies: WeakKeyDictionary[nn.Linear, nn.Linear] = WeakKeyDictionary()


def _copy_on(matrix: nn.Linear, device: torch.device) -> nn.Linear:
    """A copy of a matrix on another device, which lives as long as the matrix."""
    known = _copies.get(matrix)
    if known is None or known.weight.device != device:
        known = _copies[matrix] = copy.deepcopy(matrix).to(device)
    return known


def feature_matrix(leading: int, features: int, device: torch.device) -> nn.Linear:
    """W [features, leading], a fixed random matrix of +-1/sqrt(leading)."""
    # numpy's legacy generator is frozen, so these bits never change.
    signs = torch.from_numpy(np.random.RandomState(1).randint(0, 2, (features, leading), dtype=np.int8))
    linear = nn.utils.skip_init(nn.Linear, leading, features, bias=False, device=device)  # no random draws
    linear.requires_grad_(False)
    linear.weight.copy_((signs.float() * 2 - 1) / leading**0.5)
    use_onednn(linear)
    return linear
