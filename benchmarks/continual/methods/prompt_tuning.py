"""Prompt tuning in sequence: one soft prompt before the input of a frozen backbone, trained on task after task.

Source: Lester, Al-Rfou & Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021. The prompt has
100 vectors, initialised to the embeddings of the label words (averaged over a word's tokens) and then of random tokens.
Nothing preserves what earlier tasks taught it: this is the lower bound of methods that tune prompts.

Departures:

- AdamW with linear warm-up and decay, clipped at 1, for the epochs of all rivals here, not Adafactor at a constant rate
  for 30,000 steps with the best checkpoint. Dropout is off, as in all frozen backbones here.
- Random tokens are drawn from the whole vocabulary, not from its 5,000 most common.
- The paper trains one prompt for each task.
- An encoder, which the paper does not use, learns one head over all label words with the prompt, at a rate chosen here.
  `prompts.py` has the rates.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from benchmarks.continual.methods.method import Answer, Setup, State
from benchmarks.continual.methods.prompts import make_prompted, prompt_options, starting_prompt
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task

LENGTH = 100


class PromptTuning:
    """A `Method`."""

    def __init__(self, setup: Setup, *, length: int = LENGTH) -> None:
        backbone = Backbone.load(setup.backbone)
        self.options = prompt_options(setup.options, backbone.kind)
        self.prompt = nn.Parameter(starting_prompt(backbone, length, setup.options.seed, setup.labels))  # [P, H]
        self.model = make_prompted(backbone, setup, setup.labels, setup.options.seed, lambda rows: self.prompt)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [self.prompt, *self.model.head_parameters()]

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.model.fit(task.name, task.rows, self.options, progress, parameters=self.trained)

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        return [Answer(text) for text in self.model.answer(rows)]

    def state(self) -> State:
        return {"trained": [parameter.detach() for parameter in self.trained]}

    def restore(self, state: State) -> None:
        for parameter, value in zip(self.trained, state["trained"], strict=True):
            parameter.data.copy_(value)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.trained)

    @property
    def kept(self) -> int:
        return sum(parameter.nbytes for parameter in self.trained)
