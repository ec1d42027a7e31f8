"""Continual-learning metrics from the accuracies of a task stream.

All take the matrix R: for each task, in learning order, the accuracy after learning it on each task evaluated then, by
name. Undefined values are None.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import fsum
from statistics import fmean, mean
from typing import TypeVar

Matrix = Sequence[Mapping[str, float]]
Row = TypeVar("Row", bound=Hashable)


def forgetting(history: Matrix) -> list[float]:
    """F_k = mean over j < k of (max over l < k of a[l, j]) - a[k, j], after each task k (Chaudhry et al. 2018).

    Args:
        history: accuracy by task, after each task was learned, in learning order.

    Returns:
        One value per task; 0.0 for the first.
    """
    result = [0.0]
    for k in range(1, len(history)):
        before = [name for name in history[k] if any(name in past for past in history[:k])]
        drops = [max(past[name] for past in history[:k] if name in past) - history[k][name] for name in before]
        result.append(sum(drops) / len(drops))
    return result


def average_accuracy(matrix: Matrix, learned: Sequence[str]) -> float:
    """Mean accuracy on all tasks after the last one. learned: names in learning order."""
    return mean(matrix[-1][name] for name in learned)


def average_incremental_accuracy(matrix: Matrix, learned: Sequence[str]) -> float:
    """Mean, over learned tasks, of the average accuracy on those learned so far (iCaRL, Rebuffi et al. 2017)."""
    return mean(average_accuracy(matrix[: n + 1], learned[: n + 1]) for n in range(len(matrix)))


def final_forgetting(matrix: Matrix, learned: Sequence[str]) -> float | None:
    """F_k after the last task k: mean, over the tasks before it, of the best earlier accuracy minus the current one
    (Chaudhry et al. 2018). None for one task."""
    return forgetting_by_step(matrix, learned)[-1]


def forgetting_by_step(matrix: Matrix, learned: Sequence[str]) -> list[float | None]:
    """F_k after each task k (see `final_forgetting`); None after the first."""
    seen = [{name: row[name] for name in learned[: n + 1]} for n, row in enumerate(matrix)]
    return [None, *forgetting(seen)[1:]]


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


def paired_difference(differences: Mapping[str, Sequence[Mapping[Row, float]]]) -> tuple[float, float | None]:
    """Difference in average accuracy between two methods that answered the same rows, and its standard error.

    The standard error is that of the rows drawn: sqrt(sum over tasks of s_t^2 / n_t) / tasks, with s_t^2 the sample
    variance of the n_t differences of task t. Seeds that answered the same rows of a task are averaged row by row
    first; seeds with other rows count as drawn independently.

    Args:
        differences: for each task, for each seed, the score of one method minus that of the other, by row.

    Returns:
        The difference, and the standard error; None if a task has only one row.
    """
    value, variance = 0.0, 0.0
    known = True
    for seeds in differences.values():
        value += fmean(fmean(own.values()) for own in seeds) / len(differences)
        alike: dict[frozenset[Row], list[Mapping[Row, float]]] = {}
        for own in seeds:
            alike.setdefault(frozenset(own), []).append(own)
        for same in alike.values():
            by_row = [fmean(own[row] for own in same) for row in same[0]]
            known = known and len(by_row) > 1
            middle = fmean(by_row)
            squares = fsum((each - middle) ** 2 for each in by_row)
            variance += (len(same) / len(seeds)) ** 2 * squares / max(1, len(by_row) - 1) / len(by_row)
    return value, variance**0.5 / len(differences) if known else None


def retrieval_accuracy(slots: Sequence[Sequence[str]], tasks: Sequence[str]) -> float:
    """Fraction of rows with more than half of the retrieved slots from their own task (the paper's Eq. 13).

    Args:
        slots: for each row, the task of each retrieved slot.
        tasks: task of each row.
    """
    own = [2 * sum(name == task for name in found) > len(found) for found, task in zip(slots, tasks, strict=True)]
    return mean(own) if own else 0.0
