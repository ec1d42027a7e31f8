"""The paper's procedure, as in its released code.

Four slots per task on the attention outputs of all layers, queries from a sentence encoder (MiniLM) recomputed in every
epoch, increments as matrices, shuffled batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import shuffled, train
from benchmarks.speed.backbones import Load
from benchmarks.speed.layers import released
from benchmarks.speed.training.rows import Learn, Rows
from slm_fast import Task
from slm_fast.backbone import Backbone
from slm_fast.dtkr import DtkrRouter
from slm_fast.ops import Route
from slm_fast.options import LearnOptions
from slm_fast.query import SentenceQuery
from slm_fast.tasks import name_seed

SLOTS, K, GROUPS = 4, 4, 6


@dataclass
class Passing:
    """The route [B, K] of the current batch."""

    route: Route | None = None


class DenseLinear(nn.Module):
    """Replaces a linear layer: its output, plus each sample's increment as a matrix [I, O]."""

    def __init__(self, base: Any, rank: int, passing: Passing) -> None:
        super().__init__()
        self.base, self.passing = base, passing
        features_out, features_in = base.weight.shape
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(SLOTS, rank, features_in, device=device))
        self.lora_b = nn.Parameter(torch.empty(SLOTS, rank, features_out, device=device))

    @torch.no_grad()
    def reset(self) -> None:
        """New values: lora_b is zero, so that the increments start at zero."""
        bound = self.lora_a.shape[2] ** -0.5
        self.lora_a.uniform_(-bound, bound)
        self.lora_b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        assert self.passing.route is not None
        return released(self.base, x, self.lora_a, self.lora_b, self.passing.route)


def paper(load: Load, task: Task, options: LearnOptions) -> Learn:
    backbone, passing = Backbone(*load(), ""), Passing()
    lm, device = backbone.model, backbone.device
    layers = {
        name: DenseLinear(lm.get_submodule(name), options.rank, passing) for name in backbone.find_linears(["out"], 0)
    }
    for name, layer in layers.items():
        lm.set_submodule(name, layer)
    head = nn.Linear(backbone.width, len(task.labels or ()), device=device)
    query = SentenceQuery("minilm", device)
    texts = [row.text for row in task.rows]

    def queries(chosen: list[str]) -> Tensor:
        with torch.no_grad():
            vectors: Tensor = query.encoder.encode(
                chosen, batch_size=32, convert_to_tensor=True, show_progress_bar=False
            )
        return vectors.float().clone()  # no longer an inference tensor, so usable in autograd

    def learn() -> None:
        seed = name_seed(task.name, 0)
        torch.manual_seed(seed)
        rows, router = Rows(backbone, task), DtkrRouter(k=K, groups=GROUPS)
        router.load([router.fit(queries(texts), SLOTS, seed)], device)
        head.reset_parameters()
        for layer in layers.values():
            layer.reset()
        parameters: list[Tensor] = [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]
        if backbone.kind == "encoder":
            parameters += head.parameters()

        def loss_of(chosen: list[int]) -> Tensor:
            passing.route = router.route(queries([texts[i] for i in chosen]))
            return rows.loss(lm, head, chosen)

        generator = torch.Generator().manual_seed(seed)
        train(parameters, loss_of, len(rows), options, lambda: shuffled(len(rows), options.batch_size, generator))

    return learn
