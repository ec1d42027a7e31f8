"""The heads of all tasks, that turn features into answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from slm_fast.ops import Route
from slm_fast.tasks import LearnedTask

EPSILON = 1e-5  # of the norm behind an activation
ACTIVATE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
}


def _activated(x: Tensor, word: str) -> Tensor:
    """word: of `slm_fast.task_tensors.ACTIVATIONS`."""
    name, _, norm = word.partition("_")
    y = ACTIVATE[name](x)
    return nn.functional.layer_norm(y, y.shape[-1:], eps=EPSILON) if norm else y


@dataclass(frozen=True)
class Heads:
    """Every task's head side by side, so that one product serves a batch that mixes tasks.

    weight [C, H], bias [C]: the heads stacked. column [tasks, Cmax]: where a task's labels stand (-1 = no more).
    word [tasks, Cmax]: which of `words` each label is; two tasks with the same word share it.
    imported: tasks by their places, which read other features than the mean over tokens.
    """

    weight: Tensor
    bias: Tensor
    column: Tensor
    word: Tensor
    words: list[str]
    imported: Mapping[int, LearnedTask] = field(default_factory=dict)

    def features(self, mean: Tensor, hidden: Tensor | None, mask: Tensor, winner: Tensor) -> Tensor:
        """What the heads read, [B, H] float32: the `mean` [B, H] of hidden states [B, T, H] over real tokens (mask [B,
        T]), but for rows whose `winner` [B] is an imported task, what its own head reads. hidden may be None where no
        task is imported."""
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
                own = _activated(own @ weight.T + bias, task.adapter.activation)
            features[rows] = own
        return features

    def prior(self, scores: Tensor, task: Tensor, label: Tensor) -> Tensor:
        """What a router's scores [B, M] of means say of labels: the highest of each label's, [B, C]; the lowest of all
        where a label has no mean.

        task, label: [M], the place of each mean's task, and its label's number there (-1 for none).
        """
        column, last = self.column[task, label.clamp(min=0)], len(self.bias)
        column = torch.where((label >= 0) & (column >= 0), column, last)  # what is no label's goes beyond the last
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
        """What answers rows of these tasks [U], by their places, as all heads do, from their labels alone."""
        column = self.column[tasks]
        there = column >= 0
        chosen = column[there]
        column[there] = torch.arange(len(chosen), device=column.device)
        where = torch.full_like(self.column, -1).index_copy_(0, tasks, column)
        return replace(self, weight=self.weight[chosen], bias=self.bias[chosen], column=where)

    def answer(self, features: Tensor, slot_task: Tensor, route: Route, prior: Tensor | None = None) -> Tensor:
        """Distribution over `words`, sum_t p(t) softmax(head_t(features) + prior_t): features [B, H] -> [B, words]
        float32. prior: [B, C], what is known of the labels beside the features."""
        logits = features.float() @ self.weight.T + self.bias  # [B, C]
        if prior is not None:
            logits += prior
        answer = logits.new_zeros(len(features), len(self.words))
        task_BK = slot_task[route.slot_ids.clamp(min=0)]
        for k in range(task_BK.shape[1]):
            column = self.column[task_BK[:, k]]  # [B, Cmax]
            own = logits.gather(1, column.clamp(min=0)).masked_fill(column < 0, -torch.inf)
            share, weight = own.softmax(-1), route.weights[:, k, None]
            if self.imported:  # beside such a task others may have no head, and no share to give
                share = share.masked_fill(weight == 0, 0.0)
            answer.scatter_add_(1, self.word[task_BK[:, k]], share * weight)
        return answer
