"""A task's rows as a transformers user has them: token ids, and the loss of the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from slm_fast import Task
from slm_fast.backbone import Backbone
from slm_fast.query import TrunkQuery

Learn = Callable[[], object]  # learns the task once
LENGTH = 128  # tokens read per text
IGNORE = -100  # label ignored by transformers' losses


class Rows:
    """N rows, tokenised.

    sequences: what the model reads; a causal model's end with the answer. answers: token ids, or one label's index.
    """

    def __init__(self, backbone: Backbone, task: Task) -> None:
        self.backbone = backbone
        targets = [row.target or "" for row in task.rows]
        self.sequences, _ = backbone.tokenization.tokenize([row.prompt for row in task.rows], LENGTH)
        if backbone.kind == "encoder":
            labels = list(task.labels or ())
            self.answers = [[labels.index(target)] for target in targets]
        else:
            self.answers = backbone.tokenization.encode_answers(targets, LENGTH)
        if backbone.kind == "causal":
            self.sequences = [prompt + answer for prompt, answer in zip(self.sequences, self.answers, strict=True)]
        self.lengths = torch.tensor([len(sequence) for sequence in self.sequences])

    def __len__(self) -> int:
        return len(self.sequences)

    def loss(self, model: Any, head: nn.Linear, chosen: Sequence[int]) -> Tensor:
        """The mean loss of the chosen rows: of labels, by a head on the mean hidden state, or of answer tokens."""
        device, kind = self.backbone.device, self.backbone.kind
        batch = self.backbone.tokenization.collate([self.sequences[i] for i in chosen]).to(device)
        answers = [self.answers[i] for i in chosen]
        if kind == "encoder":
            hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
            logits = head(TrunkQuery.pool(hidden, batch.attention_mask))
            return cross_entropy(logits, torch.tensor(answers, device=device)[:, 0])
        if kind == "causal":
            before = [len(self.sequences[i]) - len(self.answers[i]) for i in chosen]
            answers = [[IGNORE] * n + answer for n, answer in zip(before, answers, strict=True)]
        labels = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True, padding_value=IGNORE)
        loss: Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels.to(device), use_cache=False
        ).loss
        return loss
