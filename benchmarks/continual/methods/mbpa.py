"""MbPA++: an episodic memory of all rows, replayed sparsely in training; the model adapts to each row it answers.

Source: de Masson d'Autume et al., Episodic Memory in Lifelong Language Learning, NeurIPS 2019. The memory holds every
training row with its key, computed by a key network: the pretrained encoder, which never changes. In training, rows
drawn uniformly from it are replayed at a rate of 1 %. To answer a row, the K = 32 memories with the nearest keys
(Euclidean) are fetched. From the learned weights W, L = 30 gradient steps are taken on the mean of their losses plus
lambda ||W~ - W||^2, lambda = 0.001. The row is answered with W~, which is then discarded. The learning rate of these
steps is one of the two that the paper tries, 1e-3 and 5e-3.

Departures:

- One batch is replayed after every 100 batches, counted over all tasks (as in Daikon-Sun/EM-in-LLL), because these
  streams are shorter; the paper replays 100 rows after every 10,000.
- Epochs, batch size, and AdamW with its warm-up, decay and rates are those of all rivals here. The paper makes one pass
  over a task, with Adam at 3e-5. There is no dropout.
- A key is the mean of the last hidden states over real tokens, not the first token's, which MiniLM was not trained to
  use. T5's is taken from the encoder, LLaMA's below the output layer.
- The backbone need not be BERT-base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from benchmarks.continual.methods.common import BATCH
from benchmarks.continual.methods.memory import Remembering
from benchmarks.continual.methods.method import Answer, Setup, State
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.query import TrunkQuery

NEIGHBOURS = 32  # K
STEPS = 30  # L
RATE = 5e-3
PULL = 1e-3  # lambda
EVERY = 100  # batches between replays


class Mbpa(Remembering):
    """A `Method`.

    Args:
        neighbours, steps, rate, pull: K, L, the learning rate and lambda of the local adaptation.
        every: batches between replays.
        most_rows: rows that one call may answer, as each takes L steps on K rows; None means any number.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        neighbours: int = NEIGHBOURS,
        steps: int = STEPS,
        rate: float = RATE,
        pull: float = PULL,
        every: int = EVERY,
        most_rows: int | None = None,
    ) -> None:
        super().__init__(setup)
        self.neighbours, self.steps, self.rate, self.pull = neighbours, steps, rate, pull
        self.every, self.most_rows = every, most_rows
        self.key_network = Backbone.load(setup.backbone)
        self.keys = torch.empty(0, self.key_network.width, device=self.key_network.device)  # [rows of the memory, H]
        self.batches = 0  # trained so far, over all tasks

    @torch.no_grad()
    def keys_of(self, rows: Sequence[Row]) -> Tensor:
        """[rows, H] float32."""
        network = self.key_network
        model = network.model.get_encoder() if network.kind == "seq2seq" else network.model.base_model
        parts = [self.keys[:0]]
        for start in range(0, len(rows), BATCH):
            texts = [row.prompt for row in rows[start : start + BATCH]]
            encoded = network.tokenization.encode(texts, self.setup.max_length)
            hidden = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
            parts.append(TrunkQuery.pool(hidden, encoded.attention_mask))
        return torch.cat(parts)

    def nearest(self, rows: Sequence[Row]) -> list[list[int]]:
        """For each row, the indices of the memories with the nearest keys, nearest first."""
        found: list[list[int]] = []
        for queries in self.keys_of(rows).split(BATCH):
            distances = torch.cdist(
                queries, self.keys, compute_mode="donot_use_mm_for_euclid_dist"
            )  # [BATCH, memories]
            found += distances.topk(min(self.neighbours, len(self.keys)), largest=False).indices.tolist()
        return found

    def learn(self, task: Task, progress: bool | None = None) -> None:
        earlier, size = self.memory.rows, self.options.batch_size

        def arrange(batches: list[Tensor], generator: Generator) -> list[Tensor]:
            """Replay rows of earlier tasks and the rows of this one seen so far."""
            seen = torch.zeros(len(task.rows) + len(earlier), dtype=torch.bool)
            seen[len(task.rows) :] = True
            found = []
            for batch in batches:
                found.append(batch)
                seen[batch] = True
                self.batches += 1
                if self.batches % self.every == 0:
                    known = seen.nonzero()[:, 0]
                    found.append(known[torch.randperm(len(known), generator=generator)[:size]])
            return found

        self.model.fit(task.name, task.rows, self.options, progress, kept=earlier, arrange=arrange)
        self.memory.keep(task.name, task.rows)
        self.keys = torch.cat([self.keys, self.keys_of(task.rows)])

    def adapt(self, rows: Sequence[Row], base: Sequence[Tensor]) -> None:
        """Take L gradient steps from the weights `base` on the mean loss of rows + pull * ||weights - base||^2."""
        weights = self.model.trained()
        for _ in range(self.steps):
            gradients = torch.autograd.grad(self.model.losses(rows).mean(), weights, allow_unused=True)
            with torch.no_grad():
                for weight, start, gradient in zip(weights, base, gradients, strict=True):
                    step = 2 * self.pull * (weight - start)
                    weight.sub_(step if gradient is None else step.add_(gradient), alpha=self.rate)

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        if self.most_rows is not None and len(rows) > self.most_rows:
            raise ValueError(f"rows: expected at most {self.most_rows} to answer, got {len(rows)}")
        if not self.steps:
            return super().answers(rows)
        base = [weight.detach().clone() for weight in self.model.trained()]
        memories, found = self.memory.rows, []
        for row, nearest in zip(rows, self.nearest(rows), strict=True):
            try:
                self.adapt([memories[i] for i in nearest], base)
                found += super().answers([row])
            finally:
                with torch.no_grad():
                    for weight, start in zip(self.model.trained(), base, strict=True):
                        weight.copy_(start)
        return found

    def state(self) -> State:
        return {**super().state(), "keys": self.keys, "batches": self.batches}

    def restore(self, state: State) -> None:
        super().restore(state)
        self.keys, self.batches = state["keys"].to(self.keys.device), state["batches"]

    @property
    def kept(self) -> int:
        network = sum(parameter.nbytes for parameter in self.key_network.model.parameters())
        return super().kept + network + self.keys.nbytes
