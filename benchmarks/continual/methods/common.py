"""What the rivals share: a classifier over a backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.peers import train
from slm_fast.backbone import Backbone
from slm_fast.batching import shuffled_buckets
from slm_fast.data import Row, Task
from slm_fast.options import LearnOptions
from slm_fast.progress import bar
from slm_fast.query import TrunkQuery
from slm_fast.tasks import name_seed


class Classifier(nn.Module):
    """Mean last hidden state over real tokens, then one linear head over `labels`."""

    def __init__(self, backbone: Backbone, labels: Sequence[str], max_length: int, seed: int) -> None:
        super().__init__()
        self.backbone, self.labels, self.max_length = backbone, list(labels), max_length
        self.encoder = backbone.model
        self.head = nn.Linear(backbone.width, len(self.labels))
        nn.init.normal_(self.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Logits [B, labels] of B texts."""
        encoded = self.backbone.tokenization.encode(texts, self.max_length)
        hidden = self.encoder(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
        logits: Tensor = self.head(TrunkQuery.pool(hidden, encoded.attention_mask))
        return logits

    def fit(self, task: Task, options: LearnOptions, progress: bool | None = None) -> None:
        """Train every parameter that requires a gradient on one task, the head's at the rate of heads."""
        rows, generator = task.rows, torch.Generator().manual_seed(name_seed(task.name, options.seed))
        tokens, _ = self.backbone.tokenization.tokenize([row.prompt for row in rows], self.max_length)
        lengths = torch.tensor([len(row) for row in tokens])

        def loss_of(chosen: list[int]) -> Tensor:
            answers = torch.tensor([self.labels.index(rows[i].target or "") for i in chosen])
            return cross_entropy(self([rows[i].prompt for i in chosen]), answers.to(self.backbone.device))

        with bar(f"{task.name}: learning", options.epochs_for(len(rows)) * len(rows), progress) as advance:
            train(
                [p for p in self.encoder.parameters() if p.requires_grad],
                loss_of,
                len(rows),
                options,
                lambda: shuffled_buckets(lengths, options.batch_size, generator),
                lambda done, loss: advance(done, note=f"loss {loss.item():.3f}"),
                list(self.head.parameters()),
            )

    @torch.inference_mode()
    def answers(self, rows: Sequence[Row], batch_size: int = 32) -> list[str]:
        """Each row's label, the choice being among all `labels`."""
        found = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, best in zip(batch, self([rows[i].prompt for i in batch]).argmax(1).tolist(), strict=True):
                found[i] = self.labels[best]
        return found

    def accuracy(self, rows: Sequence[Row]) -> float:
        """Share of rows answered with their label."""
        return sum(a == row.target for a, row in zip(self.answers(rows), rows, strict=True)) / len(rows)
