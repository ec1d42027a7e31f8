"""The heads of all tasks, which turn features into answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from slm_fast.memory import aligned
from slm_fast.ops import Route
from slm_fast.tasks import LearnedTask

EPSILON = 1e-5  # of the layer norm after an activation
ACTIVATE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
}


def _activated(x: Tensor, word: str) -> Tensor:
    """Apply the activation `word`, one of `slm_fast.task_tensors.ACTIVATIONS`."""
    name, _, norm = word.partition("_")
    y = ACTIVATE[name](x)
    return nn.functional.layer_norm(y, y.shape[-1:], eps=EPSILON) if norm else y


@dataclass(frozen=True)
class Heads:
    """The heads of all tasks, stacked, so that one product serves a batch of mixed tasks.

    Attributes:
        weight: [C, H].
        bias: [C].
        column: [tasks, Cmax], index of each label of a task among the C (-1: no more labels).
        word: [tasks, Cmax], index of each label in `words`.
        words: distinct labels, shared by tasks with the same word.
        imported: imported tasks, which may read other features than the mean over tokens, by index.
    """

    weight: Tensor
    bias: Tensor
    column: Tensor
    word: Tensor
    words: list[str]
    imported: Mapping[int, LearnedTask] = field(default_factory=dict)

    def features(self, mean: Tensor, hidden: Tensor | None, mask: Tensor, winner: Tensor) -> Tensor:
        """Features [B, H] float32 that the heads read.

        Args:
            mean: [B, H], mean of the hidden states over real tokens: the features unless the winner is imported.
            hidden: [B, T, H]. May be None if no task is imported.
            mask: [B, T], real tokens.
            winner: [B], each row's best task. If it is imported, the row's features are what its own head reads.
        """
        features = mean if not self.imported else mean.clone()
        for place in set(winner.tolist()) & self.imported.keys() if self.imported else ():
            rows, task = (winner == place).nonzero()[:, 0], self.imported[place]
            assert task.adapter is not None
            assert hidden is not None
            own = features[rows]
            if task.adapter.pooling != "mean":
                real = mask[rows].bool()
                first = real.int().argmax(1)
                last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
                own = hidden[rows, first if task.adapter.pooling == "first" else last].float()
            if task.dense is not None:
                weight, bias = task.dense
                own = _activated(own @ aligned(weight).T + bias, task.adapter.activation)
            features[rows] = own
        return features

    def prior(self, scores: Tensor, task: Tensor, label: Tensor) -> Tensor:
        """Scores [B, C] of labels from a router's scores [B, M] of means: the highest of a label's means, or the lowest
        of all if it has none.

        task, label: [M], index of each mean's task, and its label's number there (-1 for none).
        """
        column, last = self.column[task, label.clamp(min=0)], len(self.bias)
        column = torch.where((label >= 0) & (column >= 0), column, last)  # means without a label go to an extra column
        found = scores.new_full((len(scores), last + 1), -torch.inf)
        found = found.scatter_reduce_(1, column.expand(len(scores), -1), scores, "amax")[:, :last]
        lowest = scores.amin(1, keepdim=True).expand_as(found)
        return torch.where(found.isinf(), lowest, found)

    @classmethod
    def of(cls, tasks: Sequence[LearnedTask], device: torch.device) -> Heads:
        heads = [task.head for task in tasks if task.head is not None]
        labels = [task.labels or () if task.head is not None else () for task in tasks]
        words = sorted({label for own in labels for label in own})
        place = {word: i for i, word in enumerate(words)}
        counts = torch.tensor([len(own) for own in labels])
        label_there = torch.arange(int(counts.max())) < counts[:, None]  # [tasks, Cmax]
        column = torch.full(label_there.shape, -1)
        column[label_there] = torch.arange(int(counts.sum()))
        word = torch.zeros(label_there.shape, dtype=torch.int64)
        word[label_there] = torch.tensor([place[label] for own in labels for label in own])
        weight, bias = torch.cat([weight for weight, _ in heads]), torch.cat([bias for _, bias in heads])
        imported = {
            i: replace(task, dense=task.dense and (task.dense[0].to(device), task.dense[1].to(device)))
            for i, task in enumerate(tasks)
            if task.head is not None and task.adapter is not None
        }
        return cls(weight.to(device), bias.to(device), column.to(device), word.to(device), words, imported)

    def only(self, tasks: Tensor) -> Heads:
        """Heads with the labels of these tasks [U] (indices) alone, which answer the tasks' rows as all heads do."""
        column = self.column[tasks]
        there = column >= 0
        chosen = column[there]
        column[there] = torch.arange(len(chosen), device=column.device)
        where = torch.full_like(self.column, -1).index_copy_(0, tasks, column)
        return replace(self, weight=self.weight[chosen], bias=self.bias[chosen], column=where)

    def answer(self, features: Tensor, slot_task: Tensor, route: Route, prior: Tensor | None = None) -> Tensor:
        """Distribution over `words`: sum_t p(t) softmax(head_t(features) + prior_t).

        Args:
            features: [B, H].
            slot_task: [P], index of each slot's task.
            route: [B, K].
            prior: [B, C], what is known about the labels besides the features, added to the logits.

        Returns:
            [B, words] float32.
        """
        logits = features.float() @ self.weight.T + self.bias  # [B, C]
        if prior is not None:
            logits += prior
        answer = logits.new_zeros(len(features), len(self.words))
        task_BK = slot_task[route.slot_ids.clamp(min=0)]
        for k in range(task_BK.shape[1]):
            column = self.column[task_BK[:, k]]  # [B, Cmax]
            own = logits.gather(1, column.clamp(min=0)).masked_fill(column < 0, -torch.inf)
            share, weight = own.softmax(-1), route.weights[:, k, None]
            if self.imported:  # then others may have no head, whose softmax is NaN
                share = share.masked_fill(weight == 0, 0.0)
            answer.scatter_add_(1, self.word[task_BK[:, k]], share * weight)
        return answer
