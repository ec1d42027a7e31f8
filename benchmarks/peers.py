"""What rivals share with slm_fast, so that they differ only in what they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Generator, Tensor, nn

from slm_fast.backbone import Backbone
from slm_fast.configure import complete
from slm_fast.epochs import optimizer_and_schedule
from slm_fast.memory import return_freed_memory
from slm_fast.options import LearnOptions, ModelConfig


def adapted_layers(backbone: Backbone) -> list[str]:
    """Names of the linear layers that slm_fast adapts by default."""
    config = complete(ModelConfig(), backbone)
    return backbone.find_linears(config.targets or (), config.first_layer or 0)


def shuffled(rows: int, batch_size: int, generator: Generator) -> Sequence[Tensor]:
    """One epoch of row indices in batches, in a new order each time."""
    return torch.randperm(rows, generator=generator).split(batch_size)


def train(
    parameters: Sequence[Tensor],
    loss_of: Callable[[list[int]], Tensor],
    rows: int,
    options: LearnOptions,
    epoch: Callable[[], Iterable[Tensor]],
    report: Callable[[int, Tensor], None] | None = None,
    head: Sequence[Tensor] = (),
) -> None:
    """slm_fast's training loop: AdamW, linear warm-up and decay, gradients clipped at 1. With `options.accumulate` they
    are computed in parts of a batch, which changes nothing but rounding if the loss is the mean over rows.

    Args:
        loss_of: the mean loss of the rows with these indices.
        rows: of the task.
        epoch: batches of row indices, called once per epoch.
        report: called after each step with its number of rows and its loss.
        head: parameters that train at the learning rate of heads.
    """
    optimizer, schedule = optimizer_and_schedule(parameters, options, rows, head)
    every = [*parameters, *head]
    for _ in range(options.epochs_for(rows)):
        for batch in epoch():
            optimizer.zero_grad()
            losses = []
            for part in batch.split(math.ceil(len(batch) / options.accumulate)):
                share = loss_of(part.tolist()) * (len(part) / len(batch))
                share.backward()
                losses.append(share.detach())
            nn.utils.clip_grad_norm_(every, 1.0)
            optimizer.step()
            schedule.step()
            if options.accumulate > 1:  # memory is scarce
                return_freed_memory()
            if report is not None:
                report(len(batch), torch.stack(losses).sum())
