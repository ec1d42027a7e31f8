"""Epochs of learning: their schedule, what a callback is told of each step, which epoch is kept, when they end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.options import LearnOptions, at_least_one


@dataclass(frozen=True)
class LearnStep:
    """One optimiser step of learning, as `on_step` is told of it.

    Attributes:
        task: its name. step, steps: this step's number, from 1, and how many all epochs asked for have. epoch: from 1.
        loss: the mean over the step's rows, or over the tokens of their answers where texts are written.
        learning_rate: of the step, of the LoRA increments; a head's is higher (`LearnOptions.head_rate`).
        valid_accuracy: at the end of an epoch, of a task whose head is learned with `valid`, else None.
        valid_loss: at the end of an epoch, of a backbone that writes, the mean loss over the tokens, else None.
    """

    task: str
    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    valid_accuracy: float | None = None
    valid_loss: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers to log, by name: those that there are."""
        named = {"loss": self.loss, "learning_rate": self.learning_rate, "epoch": self.epoch}
        more = {"valid_accuracy": self.valid_accuracy, "valid_loss": self.valid_loss}
        return named | {name: value for name, value in more.items() if value is not None}


OnStep = Callable[[LearnStep], object]


def optimizer_and_schedule(
    parameters: Sequence[Tensor], options: LearnOptions, rows: int, head: Sequence[Tensor] = ()
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over parameters and, at a rate of its own, a head's (weight [C, H], bias [C]), with a linear warm-up and
    decay over all steps."""
    groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": options.learning_rate}]
    if head:
        groups.append({"params": list(head), "lr": options.head_rate(len(head[0]))})
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)
    steps = options.epochs_for(rows) * math.ceil(rows / options.batch_size)
    warmup = max(1, round(options.warmup * steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )


class Best:
    """The parameters after the epoch that did best on validation rows; before the first, as they began."""

    def __init__(self, parameters: Sequence[Tensor], patience: int | None) -> None:
        self.parameters, self.patience = parameters, patience
        self.score, self.worse = -math.inf, 0
        self._keep()

    def _keep(self) -> None:
        self.kept = [parameter.detach().clone() for parameter in self.parameters]

    def is_enough(self, score: float) -> bool:
        """Take an epoch's score, the higher the better: whether `patience` epochs in a row were no better than the
        best."""
        if score > self.score:
            self.score, self.worse = score, 0
            self._keep()
        else:
            self.worse += 1
        return self.patience is not None and self.worse >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)


def checked_patience(patience: int | None, *, has_valid: bool) -> int | None:
    """Raises InputError for what is no number of epochs, or goes without validation rows."""
    if patience is None:
        return None
    if not has_valid:
        raise InputError("patience: goes with valid= (--valid), which says when an epoch is no better")
    return at_least_one("patience", patience)


def checked_callback(on_step: OnStep | None) -> OnStep | None:
    """Raises InputError for what cannot be called."""
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step: expected a function of one LearnStep, got a {type(on_step).__name__}")
    return on_step
