"""The gaussian router over random features of the query: near tasks differ in what no linear score sees.

What it keeps of a task is small (`slm_fast.scatter`), and says how far a query is from all that the router knows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from slm_fast.covariance import PERCENTILES, covariance, factorised, moments, percentiles, unpack
from slm_fast.layers import use_onednn
from slm_fast.ops import Route
from slm_fast.router import GaussianRouter, Part, check_finite
from slm_fast.scatter import compress
from slm_fast.sketch import Pooled

SHRINKAGE = 4.0  # times the oracle-approximating amount, which takes queries for Gaussian: their tails are heavier
MOST_SHRINKAGE = 0.9
KEPT, PRIOR_ROWS = 0.6, 2.0  # of n rows' distance from their task's mean a label keeps KEPT n / (n + PRIOR_ROWS)
LABEL_TEMPERATURE = 24.0  # of labels' scores, which are of thousands of numbers that are not independent
BEFORE = (1.0, 0.0, 64.0)  # these three, in files of before they were written
MANY_MEANS = 1024  # beyond so many only those that are asked for are scored, for fewer it takes longer to find them
SAMPLE = 96  # training queries kept of a task, which say how far its own rows are
ROUNDING = 1e-3  # of a distance, at the most
LEAST_LEFT = 0.05  # of a row's share in a covariance that is taken away, for what compression made of it


@dataclass
class RandomFeatureRouter(GaussianRouter):
    """`GaussianRouter` over (q, relu(W q)), W a fixed random matrix (as RanPAC, McDonnell et al. 2023).

    matrix: W, which reads the query's first `in_features` numbers (`feature_matrix`).

    A task's part: `count`, `mean`, `mean_slot` as there, `mean_label` [M], the number of the label whose mean it is (-1
    without labels), the scatter as `slm_fast.scatter` keeps it, `constants` [3] (KEPT, PRIOR_ROWS and
    LABEL_TEMPERATURE as they were when it was learned), and `sample` [m, Q] with `sample_mean` [m], queries of at most
    96 of its training rows and which of its means is theirs.

    Keys are made of means that are drawn towards the mean of their task's rows (as James & Stein 1961): of what sets a
    label of n rows apart in its task the share KEPT n / (n + PRIOR_ROWS) is left. What few rows say of so many numbers
    is mostly chance, and counts against their label; and that a row is like one label of a task says less of the task
    than that it is like its rows.

    Distance is the share of the task's own rows that are not so far as a query, the larger of two: how little nearer it
    is to the task's nearest mean than to the centre of all means (Ren et al. 2021; the negative of its highest score),
    which finds what resembles the tasks and belongs to none; and half of its squared distance from that mean (Lee et
    al. 2018), which finds what resembles nothing known. Both are taken in the covariance of many tasks and change with
    them; so the rows of the sample are measured anew, each as if it had not been among those that mean and covariance
    are made of. (A row of a task that the covariance is not of is in the mean alone.)
    """

    matrix: nn.Linear = field(default_factory=lambda: feature_matrix(1, 1, torch.device("cpu")))

    def __post_init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def expand(self, query: Tensor) -> Tensor:
        """Queries [B, Q] and their random features: [B, D] float32."""
        if self._last is not None and self._last[0] is query:
            return self._last[1]
        matrix = self.matrix
        if matrix.weight.device != query.device:  # queries are fitted on the CPU
            matrix = copy.deepcopy(matrix).to(query.device)
        expanded = torch.cat([query, matrix(query[:, : matrix.in_features]).relu_()], 1)
        self._last = query, expanded  # label_scores asks for what route has just asked for
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
            "constants": torch.tensor([KEPT, PRIOR_ROWS, LABEL_TEMPERATURE]),
            **compress(found.scatter, len(query), seed),
            "sample": query[sample],
            "sample_mean": found.assignment[sample].float(),
        }

    def means(self, part: Part) -> Tensor:
        return drawn_means(part)

    def _follow(self, before: GaussianRouter) -> None:
        super()._follow(before)
        if self.sketch is before.sketch and isinstance(before, RandomFeatureRouter):
            there = set(self.names)
            self.left_out = {name: found for name, found in dict(before.left_out).items() if name in there}

    @property
    def pooled(self) -> Pooled:
        """Kept only for those who ask for distances: it is as large as a covariance."""
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
        """Of each mean: the place of its task, and the number of its label there (-1 for none), [M] int64 each."""
        task = [torch.full((len(part["mean_label"]),), i) for i, part in enumerate(self.parts)]
        label = [part["mean_label"].long() for part in self.parts]
        return torch.cat(task).to(self.device), torch.cat(label).to(self.device)

    @cached_property
    def label_temperature(self) -> Tensor:
        """Of each mean [M]."""
        each = [torch.full((len(part["count"]),), constants(part)[2]) for part in self.parts]
        return torch.cat(each).to(self.device)

    def route(self, query: Tensor, mask: Tensor | None = None, *, check: bool = True) -> Route:
        if check:
            check_finite(query)
        if mask is None and len(self.task_of_slot) == 1:  # every row's route is the lone slot, which needs no keys
            ids = torch.full((len(query), self.k), -1, device=query.device)
            ids[:, 0].zero_()
            return Route(ids, (ids == 0).float())
        return super().route(self.expand(query), mask, check=False)

    def label_scores(self, query: Tensor, slot_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        keys, bias, temperature, (task, label) = self.keys, self.bias, self.label_temperature, self.label_of_mean
        if slot_ids is not None and len(keys) > MANY_MEANS:
            asked = torch.zeros(len(self.parts), dtype=torch.bool, device=keys.device)
            asked[torch.tensor(self.task_of_slot, device=keys.device)[slot_ids.clamp(min=0)]] = True
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
        return torch.zeros(len(query))  # of shares of at most 96 rows nothing is so small

    def _percentiles(self, task: int) -> Tensor:
        if not len(self.parts[task]["sample"]):
            return torch.full((PERCENTILES,), torch.inf)  # there is nothing to compare with
        return percentiles(self._share(*self._left_out(task), task))

    def _share(self, relative: Tensor, absolute: Tensor, task: int) -> Tensor:
        """The share [N] of the sample that is nearer than these two distances [N] say, more than 1 beyond all of it."""
        known = self._left_out(task)
        if not len(known[0]):
            return torch.zeros(len(relative))
        own = len(self.parts[task]["count"])
        halved = absolute if own == 1 else absolute / 2  # without labels the relative one says little
        shares = [_share(distance, sample) for distance, sample in zip((relative, halved), known, strict=True)]
        return shares[1] if own == len(self.keys) == 1 else torch.maximum(*shares)  # a mean that is its own centre

    def _own_discriminant(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """Centre [D], and keys [own, D] and bias [own] of a task's means, float64."""
        own = slice(self.first_mean[task], self.first_mean[task] + len(self.parts[task]["count"]))
        centre, keys, bias = self.centre, self.keys[own], self.bias[own]
        return centre.double().cpu(), keys.double().cpu(), bias.double().cpu()

    def _white(self, rows: Tensor) -> Tensor:
        """Rows [N, D] where the covariance is the identity, [D, N]."""
        return torch.linalg.solve_triangular(self.pooled.lower, rows.T, upper=False)

    @cached_property
    def left_out(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`_left_out` of the tasks that were asked for."""
        return {}

    def _left_out(self, task: int) -> tuple[Tensor, Tensor]:
        """The two distances [m] of the rows of a task's sample, each row taken out of its mean and, where the task is
        one of those that it is of, out of the covariance: what Sherman & Morrison's formula makes of them."""
        if (known := self.left_out.get(self.names[task])) is not None:
            return known
        part, (centre, keys, bias) = self.parts[task], self._own_discriminant(task)
        row, mean = torch.arange(len(part["sample"])), part["sample_mean"].long()
        query = self.expand(part["sample"]).double()
        apart, count = query - part["mean"].double()[mean], part["count"].double()[mean]
        own = drawn_means(part, query, mean)
        # r = S^-1/2 (q - m), and so on; S less w (q - m) (q - m)' has the products x'y + w (x'r) (y'r) / (1 - w r'r).
        r, q, m, left = self._white(torch.cat([apart, query - centre, own - centre, query - own])).chunk(4, 1)
        of_a_row = self.pooled.of_a_row if self.names[task] in self.sketch.parts else 0.0
        weight = of_a_row * count / (count - 1)
        weight = weight / (1 - weight * r.square().sum(0)).clamp(min=LEAST_LEFT)

        def product(x: Tensor, y: Tensor) -> Tensor:
            return (x * y).sum(0) + weight * (x * r).sum(0) * (y * r).sum(0)

        toward = apart @ keys.T  # r' of all means
        scores = (query - centre) @ keys.T + (weight * (q * r).sum(0))[:, None] * toward
        scores += bias - weight[:, None] * toward.square() / 2
        scores[row, mean] = product(q, m) - product(m, m) / 2
        far = product(left, left)
        found = self.left_out[self.names[task]] = -scores.amax(1), far
        return found


def constants(part: Part) -> tuple[float, float, float]:
    """KEPT, PRIOR_ROWS and LABEL_TEMPERATURE as they were when a task was learned."""
    kept, prior, temperature = part["constants"].tolist() if "constants" in part else BEFORE
    return kept, prior, temperature


def drawn_means(part: Part, query: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
    """A task's means [M, D] float64, drawn towards the mean of all its rows. With some of these rows, `query` [m, D]
    and which `mean` is theirs [m]: that mean as it would be without the row, [m, D]."""
    plain, count = part["mean"].double(), part["count"].double()
    kept, prior, _ = constants(part)
    rows, whole = count.sum(), (count / count.sum()) @ plain
    if query is not None and mean is not None:
        whole = whole + (whole - query) / (rows - 1)
        plain = plain[mean] + (plain[mean] - query) / (count[mean] - 1)[:, None]
        count = count[mean] - 1
    share = torch.where(count > 0, 1 - kept * count / (count + prior), 0.0)  # the mean of a slot without rows stays
    return plain + share[:, None] * (whole - plain)


def _share(distance: Tensor, sample: Tensor) -> Tensor:
    """Where distances [N] lie among those of a sample [m], from 0 to 1; beyond them 1 and what they are farther by, in
    units of the sample's upper half. What rounding may make of a distance is not farther."""
    sample = sample.sort().values
    middle, last = float(sample[len(sample) // 2]), float(sample[-1])
    rounding = ROUNDING * (1 + float(sample.abs().max()))
    among = torch.from_numpy(np.interp(distance.numpy(), sample.numpy(), np.linspace(0, 1, len(sample))))
    return among + (distance - last - rounding).clamp(min=0) / (last - middle + rounding)


def _spread(assignment: Tensor, count: Tensor) -> Tensor:
    """At most SAMPLE of rows [N], evenly over the means they belong to, of those that are not a mean by themselves."""
    rows = assignment.argsort(stable=True)
    rows = rows[count[assignment[rows]] > 1]
    return rows[torch.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().long()]


def feature_matrix(leading: int, features: int, device: torch.device) -> nn.Linear:
    """W [features, leading], +-1/sqrt(leading) drawn once and for all."""
    # numpy's legacy generator is frozen for good, so these bits never change.
    signs = torch.from_numpy(np.random.RandomState(1).randint(0, 2, (features, leading), dtype=np.int8))
    linear = nn.utils.skip_init(nn.Linear, leading, features, bias=False, device=device)  # draws no numbers
    linear.requires_grad_(False)
    linear.weight.copy_((signs.float() * 2 - 1) / leading**0.5)
    use_onednn(linear)
    return linear
