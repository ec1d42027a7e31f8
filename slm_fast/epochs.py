"""Training epochs: learning rate schedule, step callbacks, choice of the best epoch, early stopping."""

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
    """One optimiser step, as passed to `on_step`.

    Attributes:
        task: name of the task.
        step, steps: number of this step, from 1, and total steps of all requested epochs.
        epoch: number of the epoch, from 1.
        loss: mean over the step's rows, or over the tokens of their answers for generated text.
        learning_rate: of the LoRA increments in this step. A head's is higher (`LearnOptions.head_rate`).
        valid_accuracy, valid_loss: on `valid`, at the end of an epoch (otherwise None): means over rows, or over the
            tokens of their answers, each after the right ones before it, for generated text.
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
        """The values to log, by name, without those that are None."""
        named = {"loss": self.loss, "learning_rate": self.learning_rate, "epoch": self.epoch}
        more = {"valid_accuracy": self.valid_accuracy, "valid_loss": self.valid_loss}
        return named | {name: value for name, value in more.items() if value is not None}


OnStep = Callable[[LearnStep], object]


def optimizer_and_schedule(
    parameters: Sequence[Tensor], options: LearnOptions, rows: int, head: Sequence[Tensor] = ()
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over the parameters and, at its own learning rate, a head (weight [C, H], bias [C]), with linear warm-up
    and decay over all steps."""
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
    """Keeps the parameters of the best epoch on validation rows; until then, the initial ones."""

    def __init__(self, parameters: Sequence[Tensor], patience: int | None) -> None:
        self.parameters, self.patience = parameters, patience
        self.score, self.worse = -math.inf, 0
        self._keep()

    def _keep(self) -> None:
        self.kept = [parameter.detach().clone() for parameter in self.parameters]

    def is_enough(self, score: float) -> bool:
        """Take an epoch's score (higher is better). Returns whether `patience` epochs in a row were no better."""
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
    """Return `patience`; raise InputError if it is invalid, or given without validation rows."""
    if patience is None:
        return None
    if not has_valid:
        raise InputError("patience: goes with valid= (--valid), which says when an epoch is no better")
    return at_least_one("patience", patience)


def checked_callback(on_step: OnStep | None) -> OnStep | None:
    """Return `on_step`; raise InputError if it is not callable."""
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step: expected a function of one LearnStep, got a {type(on_step).__name__}")
    return on_step
