"""EPI's identification of tasks: the nearest mean of a class, by Mahalanobis distance in one shared covariance.

Wang et al., Rehearsal-free Continual Language Learning via Efficient Parameter Isolation, ACL 2023. As its released
code (Dicer-Zz/EPI) does by default: features are the mean over real tokens of the frozen encoder's last hidden state,
read without any task's prefix. A task brings a mean for each class and the unweighted average of its classes' sample
covariances; the shared covariance S is the average of those over tasks. Distance is (q - m)' S^+ (q - m), S^+ the
pseudo-inverse of the float32 matrix, with no shrinkage; a task is as near as the nearest of its classes.

Departures: the encoder is MiniLM, whose last layer was trained to tell sentences apart, not BERT-base, which was not;
128 tokens of a text are read, not 256; a class of one row, whose sample covariance is not defined, has no part in
its task's average; free text is one class. Prefixes are not learned here, since only the task is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Epi:
    """An `Identifier`. Keeps the means of all classes and one sum of covariances."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.means: list[Tensor] = []  # of each task, [C, D]
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
        centre_D = mean_MD.mean(0)  # nothing depends on it but how much of differences float32 keeps
        keys_MD = (mean_MD - centre_D) @ precision_DD
        self.prepared = precision_DD, centre_D, keys_MD, (keys_MD * (mean_MD - centre_D)).sum(1)

    def distances(self, query: Tensor) -> Tensor:
        """Squared Mahalanobis distances of queries [B, D] from the nearest class of each of T tasks: [B, T]."""
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
