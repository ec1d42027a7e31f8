"""Continual-learning metrics from the accuracies of a task stream.

All take the matrix R: for each task, in learning order, the accuracy after learning it on each task evaluated then, by
name. Undefined values are None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from slm_fast.evaluate import forgetting

Matrix = Sequence[Mapping[str, float]]


def average_accuracy(matrix: Matrix, learned: Sequence[str]) -> float:
    """Mean accuracy on all tasks after the last one. learned: names in learning order."""
    return mean(matrix[-1][name] for name in learned)


def average_incremental_accuracy(matrix: Matrix, learned: Sequence[str]) -> float:
    """Mean, over learned tasks, of the average accuracy on those learned so far (iCaRL, Rebuffi et al. 2017)."""
    return mean(average_accuracy(matrix[: n + 1], learned[: n + 1]) for n in range(len(matrix)))


def final_forgetting(matrix: Matrix, learned: Sequence[str]) -> float | None:
    """F_k after the last task k: mean, over the tasks before it, of the best earlier accuracy minus the current one
    (Chaudhry et al. 2018). None for one task."""
    seen = [{name: row[name] for name in learned[: n + 1]} for n, row in enumerate(matrix)]
    return forgetting(seen)[-1] if len(seen) > 1 else None


def backward_transfer(matrix: Matrix, learned: Sequence[str]) -> float | None:
    """Mean, over all tasks but the last, of the final accuracy minus that right after learning (Lopez-Paz & Ranzato
    2017, GEM). None for one task."""
    if len(matrix) < 2:
        return None
    return mean(matrix[-1][name] - matrix[n][name] for n, name in enumerate(learned[: len(matrix) - 1]))


def forward_transfer(matrix: Matrix, learned: Sequence[str], untrained: Mapping[str, float]) -> float | None:
    """Mean, over all tasks but the first, of the accuracy right before learning minus that of the untrained model
    (GEM). None if unseen tasks were not evaluated."""
    gains = [
        matrix[n - 1][name] - untrained[name]
        for n, name in enumerate(learned[: len(matrix)])
        if n and name in matrix[n - 1] and name in untrained
    ]
    return mean(gains) if gains and len(gains) == len(matrix) - 1 else None


def retrieval_accuracy(slots: Sequence[Sequence[str]], tasks: Sequence[str]) -> float:
    """Fraction of rows with more than half of the retrieved slots from their own task (the paper's Eq. 13).

    Args:
        slots: for each row, the task of each retrieved slot.
        tasks: task of each row.
    """
    own = [2 * sum(name == task for name in found) > len(found) for found, task in zip(slots, tasks, strict=True)]
    return mean(own) if own else 0.0
