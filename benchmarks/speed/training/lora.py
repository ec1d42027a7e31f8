"""PEFT's LoRA on the layers that slm_fast adapts by default, tokenised in advance."""

from __future__ import annotations

from collections.abc import Iterable

import peft
import torch
from torch import Tensor, nn

from benchmarks.peers import adapted_layers, shuffled, train
from benchmarks.speed.backbones import Load
from benchmarks.speed.training.rows import Learn, Rows
from slm_fast import Task
from slm_fast.backbone import Backbone
from slm_fast.batching import shuffled_buckets
from slm_fast.options import LearnOptions


def lora(load: Load, task: Task, options: LearnOptions, *, bucketed: bool) -> Learn:
    """bucketed: batches hold rows of similar lengths, as slm_fast's do."""
    backbone = Backbone(*load(), "")
    rows, modules = Rows(backbone, task), adapted_layers(backbone)
    wanted = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, lora_dropout=0.0, target_modules=modules)
    model = peft.get_peft_model(backbone.model, wanted)
    head = nn.Linear(backbone.width, len(task.labels or ()), device=backbone.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if backbone.kind == "encoder":
        parameters += head.parameters()

    def learn() -> None:
        generator = torch.Generator().manual_seed(0)

        def epoch() -> Iterable[Tensor]:
            if bucketed:
                return shuffled_buckets(rows.lengths, options.batch_size, generator)
            return shuffled(len(rows), options.batch_size, generator)

        train(parameters, lambda chosen: rows.loss(model, head, chosen), len(rows), options, epoch)

    return learn
