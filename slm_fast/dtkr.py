"""The paper's router: Dynamic Task-related Knowledge Retrieval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slm_fast import ops
from slm_fast.covariance import check_finite, percentiles
from slm_fast.errors import InputError
from slm_fast.ops import Route
from slm_fast.ops.retrieve import PreparedKeys
from slm_fast.router import Part, Router


@dataclass
class DtkrRouter(Router):
    """Dynamic Task-related Knowledge Retrieval (the paper's Section 3.2): grouped cosine, learned keys, ratio weights.

    Keys are trained as in the paper's Section 4.2 and released code: with AdamW, at a tenth of the learning rate in the
    last third. A small task gets enough epochs for `steps` steps, without which its keys would hardly move.
    """

    k: int = 4
    groups: int = 6
    aggregate: str = "mean"
    mask_prob: float = 0.2
    epochs: int = 3
    steps: int = 150
    learning_rate: float = 1e-3
    batch_size: int = 32

    def fit(self, query: Tensor, slots: int, seed: int, labels: Tensor | None = None) -> dict[str, Tensor]:
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
        """1 - cosine (mean over groups) to the nearest key: [N]."""

        def normalised(rows: Tensor) -> Tensor:
            grouped = rows.view(len(rows), self.groups, -1)
            return torch.nn.functional.normalize(grouped, dim=-1).flatten(1) / self.groups**0.5

        return 1 - (normalised(query) @ normalised(keys).T).amax(1)

    @cached_property
    @torch.inference_mode(False)
    def keys(self) -> PreparedKeys:
        """All tasks' keys, prepared in one pass over P D numbers."""
        return ops.prepare_keys(torch.cat([part["keys"] for part in self.parts]).to(self.device), groups=self.groups)

    def prepare(self, *, for_many: bool = False) -> None:
        if self.parts:
            _ = self.keys

    def slots(self, part: Part) -> int:
        return len(part["keys"])

    def route(self, query: Tensor, mask: Tensor | None = None, *, check: bool = True) -> Route:
        if check:
            check_finite(query)
        return ops.retrieve(query, self.keys, self.k, groups=self.groups, aggregate=self.aggregate, mask=mask)

    def _distance(self, query: Tensor, task: int) -> Tensor:
        return self._nearest(query, self.parts[task]["keys"])

    def _sensitivity(self, query: Tensor, task: int) -> Tensor:
        return torch.full((len(query),), 2.0)  # upper bound for a cosine


def orthogonal_keys(slots: int, width: int, groups: int, generator: torch.Generator) -> Tensor:
    """Keys [S, D], (semi-)orthogonal in each group (Saxe et al. 2013), the paper's initial values."""
    keys = torch.empty(slots, groups, width // groups)
    for group in range(groups):
        torch.nn.init.orthogonal_(keys[:, group], generator=generator)
    return keys.view(slots, width)
