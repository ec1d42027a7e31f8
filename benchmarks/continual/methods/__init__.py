"""Rivals, one file each: ways to learn a stream of tasks, with the table of them, and `Identifier`s.

These only name the task of a row; `benchmarks/continual/routers.py` has their table. A new rival is a class with the
face of `method.Method` in a file of its own, whose docstring names its source and every departure from it, and a line
of `METHODS`.
"""

from __future__ import annotations

from functools import partial

from benchmarks.continual.methods.dtkr_adapter import DtkrAdapter
from benchmarks.continual.methods.dtkr_prompt import DtkrPrompt
from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.lfpt5 import Lfpt5
from benchmarks.continual.methods.method import Entry
from benchmarks.continual.methods.progressive_prompts import ProgressivePrompts
from benchmarks.continual.methods.prompt_tuning import PromptTuning
from benchmarks.continual.methods.separate import Separate
from benchmarks.continual.methods.slm import Slm

METHODS = {
    "slm": Entry("SLM, trunk + gaussian (the default)", Slm),
    "slm-ti": Entry("SLM, task-ID given", partial(Slm, told=True), told=True),
    "slm-paper": Entry(
        "SLM, sentence + dtkr (as the paper)", partial(Slm, query="sentence", router="dtkr", encoder="minilm")
    ),
    "separate": Entry("Separate LoRA, task-ID given", Separate, told=True),
    "finetune": Entry("Finetune, one model in sequence", Finetune),
    "prompt": Entry("Prompt tuning, one prompt in sequence", PromptTuning),
    "progressive": Entry("Progressive Prompts, task-ID given", ProgressivePrompts, told=True),
    "lfpt5": Entry("LFPT5", Lfpt5, ("seq2seq",)),
    "dtkr-prompt": Entry("DTKR + Prompt", DtkrPrompt),
    "dtkr-adapter": Entry("DTKR + Adapter", DtkrAdapter, ("encoder", "causal")),
}
