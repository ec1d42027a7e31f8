"""slm_fast's router, behind the interface of task identifiers."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from slm_fast.backbone import Backbone
from slm_fast.model import AdaptedModel
from slm_fast.options import ModelConfig


@lru_cache(maxsize=1)
def configured(features: int) -> AdaptedModel:
    """MiniLM with a router of this many random features, cached for the folds of one variant."""
    return AdaptedModel(Backbone.load("minilm"), ModelConfig(max_length=128, features=features))


class SlmRouter:
    """An `Identifier`: slm_fast's router with one slot per task.

    Args:
        features: random features of the query's means, 0 for none.
        labels: one mean per label, else one per task.
        drawn: with features, shrink label means towards their task's mean (`random_features.drawn_means`).
    """

    def __init__(self, features: int, *, labels: bool = True, drawn: bool = True) -> None:
        self.router, self.labels, self.drawn = configured(features).new_router(), labels, drawn
        self.parts: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self.parts)

    def observe(self, name: str, query: Tensor, labels: Tensor | None) -> None:
        part = self.router.fit(query, 1, 0, labels if self.labels else None)
        self.parts[name] = part if self.drawn else {key: part[key] for key in part if key != "constants"}

    def prepare(self) -> None:
        self.router.load(self.parts, torch.device("cpu"))
        self.router.prepare()

    def identify(self, query: Tensor) -> Tensor:
        return self.router.route(query).slot_ids[:, 0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts.values() for tensor in part.values())
