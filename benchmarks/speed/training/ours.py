"""slm_fast's own way: `ScalableLM.learn`."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.speed.backbones import Load
from benchmarks.speed.training.rows import LENGTH, Learn
from slm_fast import ScalableLM, Task
from slm_fast.options import LearnOptions


def ours(load: Load, task: Task, options: LearnOptions) -> Learn:
    model, tokenizer = load()
    slm = ScalableLM.from_backbone(model, tokenizer=tokenizer, max_length=LENGTH)

    def learn() -> None:
        slm.learn(task, progress=False, **asdict(options))
        slm.forget(task.name)  # so that it can be learned again

    return learn
