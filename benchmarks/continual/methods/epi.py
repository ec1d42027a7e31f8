"""EPI's task identification: the nearest class mean, by Mahalanobis distance with one shared covariance.

Source: Wang et al., Rehearsal-free Continual Language Learning via Efficient Parameter Isolation, ACL 2023, with the
defaults of its released code (Dicer-Zz/EPI). Features are the mean over real tokens of the frozen encoder's last hidden
state, read without any task's prefix. Each task contributes one mean per class and the unweighted average of its
classes' sample covariances. The shared covariance S is the average of those over tasks. The distance is
(q - m)' S^+ (q - m), where S^+ is the pseudo-inverse of the float32 matrix, without shrinkage. A task is as near as its
nearest class.

Departures:

- The encoder is MiniLM, whose last layer was trained to tell sentences apart, not BERT-base, whose was not.
- 128 tokens per text are read, not 256.
- A class of one row, whose sample covariance is undefined, is left out of its task's average.
- Free text is one class.
- Prefixes are not learned, because only the task is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Epi:
    """An `Identifier`. Keeps the means of all classes and one sum of covariances."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.means: list[Tensor] = []  # per task, [C, D]
        self.covariances: Tensor | None = None  # the sum over tasks, [D, D]

    def observe(self, name: str, query: Tensor, labels: Tensor | None) -> None:
        own = torch.zeros(len(query), dtype=torch.int64) if labels is None else labels
        classes = [query[own == label] for label in own.unique()]
        covariances = [torch.cov(rows.T) for rows in classes if len(rows) > 1]
        width = query.shape[1]
        covariance = torch.stack(covariances).mean(0) if covariances else query.new_zeros(width, width)
        self.names.append(name)
        self.means.append(torch.stack([rows.mean(0) for rows in classes]))
        self.covariances = covariance if self.covariances is None else self.covariances + covariance

    def prepare(self) -> None:
        assert self.covariances is not None
        precision_DD = torch.linalg.pinv(self.covariances / len(self.names), hermitian=True)
        mean_MD = torch.cat(self.means)
        centre_D = mean_MD.mean(0)  # affects only float32 precision
        keys_MD = (mean_MD - centre_D) @ precision_DD
        self.prepared = precision_DD, centre_D, keys_MD, (keys_MD * (mean_MD - centre_D)).sum(1)

    def distances(self, query: Tensor) -> Tensor:
        """Squared Mahalanobis distances [B, T] of queries [B, D] to the nearest class of each of T tasks."""
        precision_DD, centre_D, keys_MD, own_M = self.prepared
        query_BD = query - centre_D
        squared_BM = ((query_BD @ precision_DD) * query_BD).sum(1, keepdim=True) - 2 * query_BD @ keys_MD.T + own_M
        return torch.stack([own.amin(1) for own in squared_BM.split([len(mean) for mean in self.means], 1)], 1)

    def identify(self, query: Tensor) -> Tensor:
        return self.distances(query).argmin(1)

    @property
    def nbytes(self) -> int:
        assert self.covariances is not None
        return self.covariances.nbytes + sum(mean.nbytes for mean in self.means)
