"""The pool: the slots of all tasks as they lie on the device, and the heads that turn features into answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_fast.layers import Values
from slm_fast.ops import Route
from slm_fast.tasks import LearnedTask, in_name_order


class Pool:
    """Values and heads of the given tasks. Slots are numbered through the tasks in the order of their names.

    slot_task: [P] int64, which task (its place in `tasks`) each slot belongs to.
    values: module name -> (lora_a [P, r, I], lora_b [P, r, O]) in the backbone's dtype. Tasks of a smaller rank are
        filled up with zeros.
    """

    def __init__(self, tasks: Sequence[LearnedTask], device: torch.device, dtype: torch.dtype) -> None:
        self.tasks = in_name_order(tasks)
        owner = [i for i, task in enumerate(self.tasks) for _ in range(task.slots)]
        self.names = [task.name for task in self.tasks]
        self.slot_names = [self.names[i] for i in owner]  # the task of each slot
        self.slot_task = torch.tensor(owner, dtype=torch.int64, device=device)
        self.values: Values = _stack_values(self.tasks, device, dtype)
        self.heads = Heads.of(self.tasks, device) if self.tasks and self.tasks[0].head is not None else None

    @property
    def slots(self) -> int:
        return len(self.slot_task)

    def slots_of(self, name: str) -> Tensor:
        """[P] bool: the slots of one task."""
        return self.slot_task == self.names.index(name)

    def task_weights(self, route: Route) -> Tensor:
        """The route's weight summed over each task's slots, p(t) of every row: [B, tasks] float32."""
        weights = torch.zeros(len(route.slot_ids), len(self.tasks), device=route.weights.device)
        return weights.scatter_add_(1, self.slot_task[route.slot_ids.clamp(min=0)], route.weights)


def _stack_values(tasks: Sequence[LearnedTask], device: torch.device, dtype: torch.dtype) -> Values:
    if not tasks:
        return {}

    def stack(module: str, which: int) -> Tensor:
        parts = [task.values[module][which] for task in tasks]
        rank = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, 0, 0, rank - part.shape[1])) for part in parts]
        return torch.cat(parts).to(device=device, dtype=dtype)

    return {module: (stack(module, 0), stack(module, 1)) for module in tasks[0].values}


@dataclass(frozen=True)
class Heads:
    """Every task's head side by side, so that one product serves a batch that mixes tasks.

    weight [C, H], bias [C]: the heads stacked. column [tasks, Cmax]: where a task's labels stand (-1 = no more).
    word [tasks, Cmax]: which of `words` each label is; two tasks with the same word share it.
    """

    weight: Tensor
    bias: Tensor
    column: Tensor
    word: Tensor
    words: list[str]

    @classmethod
    def of(cls, tasks: Sequence[LearnedTask], device: torch.device) -> Heads:
        words = sorted({label for task in tasks for label in task.labels or ()})
        most = max(len(task.labels or ()) for task in tasks)
        column = torch.full((len(tasks), most), -1)
        word = torch.zeros(len(tasks), most, dtype=torch.int64)
        weights, biases, start = [], [], 0
        for i, task in enumerate(tasks):
            assert task.head is not None
            assert task.labels is not None
            n = len(task.labels)
            column[i, :n] = torch.arange(start, start + n)
            word[i, :n] = torch.tensor([words.index(label) for label in task.labels])
            weights.append(task.head[0])
            biases.append(task.head[1])
            start += n
        return cls(
            torch.cat(weights).to(device), torch.cat(biases).to(device), column.to(device), word.to(device), words
        )

    def answer(self, features: Tensor, slot_task: Tensor, route: Route) -> Tensor:
        """Distribution over `words`, sum_t p(t) softmax(head_t(features)): features [B, H] -> [B, words] float32."""
        logits = features.float() @ self.weight.T + self.bias  # [B, C]
        answer = logits.new_zeros(len(features), len(self.words))
        task_BK = slot_task[route.slot_ids.clamp(min=0)]
        for k in range(task_BK.shape[1]):
            column = self.column[task_BK[:, k]]  # [B, Cmax]
            own = logits.gather(1, column.clamp(min=0)).masked_fill(column < 0, -torch.inf)
            answer.scatter_add_(1, self.word[task_BK[:, k]], own.softmax(-1) * route.weights[:, k, None])
        return answer
