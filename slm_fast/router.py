"""Routers: from a query to a route. Both are one `ops.retrieve` call over what the tasks' files hold.

A router's part of a task depends on that task's queries alone, and parts are combined in the order of the tasks' names.
So tasks may be learned in any order, or one taken away, and every bit of the result is as if that had been the history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slm_fast import ops
from slm_fast.errors import InputError, WorkError
from slm_fast.ops import Route

Part = Mapping[str, Tensor]  # what one task's file holds for its router
PERCENTILES = 101


class Router(Protocol):
    def fit(self, query: Tensor, slots: int, seed: int) -> dict[str, Tensor]:
        """A task's part from its training queries [N, D]."""

    def load(self, parts: Sequence[Part], device: torch.device) -> None:
        """Route among these tasks' slots from now on; slot ids follow the order of `parts`."""

    def route(self, query: Tensor, mask: Tensor | None = None) -> Route:
        """query [B, D], mask [B, P] or [P] of slots allowed -> Route."""

    def distance(self, query: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
        """How far each query [B, D] is from the task of its slot [B], and how far that task's training queries were:
        distance [B] and percentiles [B, 101]."""


class NotFinite(WorkError):
    """A query that is not a number, `row` of those given, counted from 0."""

    def __init__(self, row: int) -> None:
        super().__init__(f"query: row {row} holds a number that is not finite")
        self.row = row


def check_finite(query: Tensor) -> None:
    bad = (~query.isfinite().all(1)).nonzero()
    if len(bad):
        raise NotFinite(int(bad[0]))


@dataclass
class DtkrRouter:
    """Dynamic Task-related Knowledge Retrieval (the paper's Section 3.2): grouped cosine, learned keys, ratio weights.

    The recipe of key preparation is that of the paper's Section 4.2 and released code: AdamW, the rate a tenth of
    itself in the last third. A small task gets as many epochs as make `steps` steps, or its keys would hardly move.
    """

    k: int = 4
    groups: int = 6
    aggregate: str = "mean"
    mask_prob: float = 0.2
    epochs: int = 3
    steps: int = 150
    learning_rate: float = 1e-3
    batch_size: int = 32

    def fit(self, query: Tensor, slots: int, seed: int) -> dict[str, Tensor]:
        check_finite(query)
        if query.shape[1] % self.groups:
            raise InputError(f"groups: expected a divisor of the query width {query.shape[1]}, got {self.groups}")
        generator = torch.Generator().manual_seed(seed)
        query = query.cpu()
        keys = orthogonal_keys(slots, query.shape[1], self.groups, generator).requires_grad_(True)
        optimizer = torch.optim.AdamW([keys], lr=self.learning_rate, weight_decay=0.01)
        epochs = max(self.epochs, math.ceil(self.steps / math.ceil(len(query) / self.batch_size)))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=math.ceil(2 * epochs / 3), gamma=0.1)
        step = 0
        for _ in range(epochs):
            for rows in torch.randperm(len(query), generator=generator).split(self.batch_size):
                loss = ops.key_loss(
                    query[rows], keys, self.k, groups=self.groups, mask_prob=self.mask_prob, seed=seed + step
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([keys], 0.1)
                optimizer.step()
                step += 1
            scheduler.step()
        keys = keys.detach()
        return {"keys": keys, "distance": percentiles(self._nearest(query, keys))}

    def _nearest(self, query: Tensor, keys: Tensor) -> Tensor:
        """1 - the mean-over-groups cosine to the nearest key, [N]."""

        def normalised(rows: Tensor) -> Tensor:
            grouped = rows.view(len(rows), self.groups, -1)
            return torch.nn.functional.normalize(grouped, dim=-1).flatten(1) / self.groups**0.5

        return 1 - (normalised(query) @ normalised(keys).T).amax(1)

    def load(self, parts: Sequence[Part], device: torch.device) -> None:
        self.parts = parts
        self.keys = ops.prepare_keys(torch.cat([part["keys"] for part in parts]).to(device), groups=self.groups)
        self.task_of_slot = [i for i, part in enumerate(parts) for _ in part["keys"]]

    def route(self, query: Tensor, mask: Tensor | None = None) -> Route:
        check_finite(query)
        return ops.retrieve(query, self.keys, self.k, groups=self.groups, aggregate=self.aggregate, mask=mask)

    def distance(self, query: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
        return _by_task(
            self.parts, self.task_of_slot, query, slot_ids, lambda q, part, _: self._nearest(q, part["keys"])
        )


@dataclass
class GaussianRouter:
    """Linear discriminant analysis over slots: a mean for each slot, one covariance shared by all.

        score[b, p] = q' S^-1 m_p - m_p' S^-1 m_p / 2,    weights = softmax(score / temperature) over the top K

    Streaming LDA (Hayes & Kanan 2020). A task's part is (count, mean, scatter), and scatters add up, so no old data is
    needed. The covariance is shrunk towards a multiple of the identity by the amount that the oracle-approximating
    formula of Chen, Wiesel, Eldar & Hero (2010) gives. Distance is Mahalanobis (Lee et al. 2018) in the task's own
    covariance, so that it does not change when other tasks are learned.
    """

    k: int = 2
    temperature: float = 4.0

    def fit(self, query: Tensor, slots: int, seed: int) -> dict[str, Tensor]:
        check_finite(query)
        query = query.double().cpu()
        count, mean, scatter = _moments(query, slots, seed)
        # Held-out distances: those of training rows from a fit to themselves would be too small.
        halves = (query[0::2], query[1::2]) if len(query) >= 4 * slots else (query, query)
        distances = []
        for fitted, held_out in (halves, halves[::-1]):
            half_count, half_mean, half_scatter = _moments(fitted, slots, seed)
            distances.append(_mahalanobis(held_out, half_mean, _whitener(half_count, half_scatter)))
        upper = torch.triu_indices(*scatter.shape)
        return {
            "count": count.float(),
            "mean": mean.float(),
            "scatter": scatter[upper[0], upper[1]].float(),
            "distance": percentiles(torch.cat(distances)),
        }

    def load(self, parts: Sequence[Part], device: torch.device) -> None:
        self.parts = parts
        self.task_of_slot = [i for i, part in enumerate(parts) for _ in part["count"]]
        self.whiteners: dict[int, Tensor] = {}
        count = torch.cat([part["count"] for part in parts]).double()
        mean_PD = torch.cat([part["mean"] for part in parts]).double()
        packed = torch.zeros(len(parts[0]["scatter"]), dtype=torch.float64)
        for part in parts:
            packed += part["scatter"].double()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_covariance(count, _unpack(packed))))
        # Every query is measured from the centre of the means. That adds the same to all its scores, so no route
        # changes, and float32 keeps more of their differences.
        centre = mean_PD.mean(0)
        centred_PD = mean_PD - centre
        keys_PD = centred_PD @ inverse
        self.centre = centre.float().to(device)
        self.keys = keys_PD.float().to(device)
        self.bias = (-0.5 * (keys_PD * centred_PD).sum(1)).float().to(device)

    def route(self, query: Tensor, mask: Tensor | None = None) -> Route:
        check_finite(query)
        return ops.retrieve(
            query - self.centre,
            self.keys,
            self.k,
            bias=self.bias,
            mask=mask,
            metric="dot",
            weighting="softmax",
            temperature=self.temperature,
        )

    def distance(self, query: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
        def from_task(query: Tensor, part: Part, task: int) -> Tensor:
            if task not in self.whiteners:
                self.whiteners[task] = _whitener(part["count"].double(), _unpack(part["scatter"].double()))
            return _mahalanobis(query.double(), part["mean"].double(), self.whiteners[task])

        return _by_task(self.parts, self.task_of_slot, query, slot_ids, from_task)


def _by_task(parts, task_of_slot, query, slot_ids, distance):  # type: ignore[no-untyped-def]
    """Apply `distance` to the queries of each task in turn: distance [B], percentiles [B, 101]."""
    task_B = torch.tensor(task_of_slot)[slot_ids.cpu()]
    distance_B, percentiles_B = torch.zeros(len(query)), torch.zeros(len(query), PERCENTILES)
    for task in task_B.unique().tolist():
        rows = task_B == task
        distance_B[rows] = distance(query.cpu()[rows], parts[task], task).float()
        percentiles_B[rows] = parts[task]["distance"]
    return distance_B, percentiles_B


def _moments(query: Tensor, slots: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count [S], mean [S, D] and the scatter within slots [D, D] of queries [N, D] float64."""
    if slots == 1:
        assignment, centre = torch.zeros(len(query), dtype=torch.int64), torch.zeros(1, query.shape[1]).double()
    else:
        from sklearn.cluster import KMeans  # a slow import that only several slots a task need

        if len(query) < slots:
            raise InputError(f"slots: {slots} slots need at least as many rows, got {len(query)}")
        means = KMeans(slots, n_init=4, random_state=seed % 2**32).fit(query.numpy())
        assignment, centre = torch.from_numpy(means.labels_).long(), torch.from_numpy(means.cluster_centers_)
    count = torch.bincount(assignment, minlength=slots).double()
    mean = torch.zeros(slots, query.shape[1], dtype=torch.float64).index_add_(0, assignment, query) / count[:, None]
    mean = torch.where(count[:, None] > 0, mean, centre)  # fewer distinct rows than slots leave slots empty
    centred = query - mean[assignment]
    return count, mean, centred.T @ centred


def _unpack(packed: Tensor) -> Tensor:
    """The upper triangle, row by row [D (D + 1) / 2] -> symmetric [D, D]."""
    width = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    upper = torch.triu_indices(width, width)
    full = torch.zeros(width, width, dtype=packed.dtype)
    full[upper[0], upper[1]] = packed
    return full + full.triu(1).T


def _covariance(count: Tensor, scatter: Tensor) -> Tensor:
    """The pooled covariance [D, D], shrunk (oracle-approximating shrinkage, Chen et al. 2010, Eq. 23)."""
    width = scatter.shape[0]
    freedom = float((count.sum() - len(count)).clamp(min=1))
    sample = scatter / freedom
    scale = float(sample.trace()) / width
    identity = torch.eye(width, dtype=sample.dtype)
    if scale <= 0:  # all rows alike
        return identity
    squared = float((sample**2).mean())
    numerator = squared + scale**2
    denominator = (freedom + 1) * (squared - scale**2 / width)
    shrinkage = 1.0 if denominator <= 0 else min(numerator / denominator, 1.0)
    return (1 - shrinkage) * sample + shrinkage * scale * identity


def _whitener(count: Tensor, scatter: Tensor) -> Tensor:
    """Lower-triangular L with L L' = covariance."""
    lower: Tensor = torch.linalg.cholesky(_covariance(count, scatter))
    return lower


def _mahalanobis(query: Tensor, mean: Tensor, lower: Tensor) -> Tensor:
    """Distance [N] of queries [N, D] from the nearest of the means [S, D]."""
    white_query = torch.linalg.solve_triangular(lower, query.T, upper=False).T
    white_mean = torch.linalg.solve_triangular(lower, mean.T, upper=False).T
    return torch.cdist(white_query, white_mean).amin(1)


def percentiles(distance: Tensor) -> Tensor:
    """[N] -> [101] float32: percentiles 0, 1, ..., 100."""
    return torch.quantile(distance.double(), torch.linspace(0, 1, PERCENTILES, dtype=torch.float64)).float()


def orthogonal_keys(slots: int, width: int, groups: int, generator: torch.Generator) -> Tensor:
    """Keys [S, D], (semi-)orthogonal in each group (Saxe et al. 2013, as the paper begins)."""
    keys = torch.empty(slots, groups, width // groups)
    for group in range(groups):
        torch.nn.init.orthogonal_(keys[:, group], generator=generator)
    return keys.view(slots, width)
