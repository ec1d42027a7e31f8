"""Progressive Prompts: each task learns a soft prompt of its own, which is read before those of earlier tasks.

Source: Razdaibiedina et al., Progressive Prompts: Continual Learning for Language Models, ICLR 2023. Task k reads
[P_k, ..., P_1, x] and trains only P_k, written as P + MLP(P), where the MLP has one hidden layer of 800 ReLUs.
Afterwards the MLP is dropped, and the resulting P_k is kept and never changes. With an encoder, each task has its own
classifier, trained with its prompt; the backbone stays frozen. A prompt is initialised to the embeddings of random
tokens. The task of each row is given. Ten vectors per task, as in the released code (arazd/ProgressivePrompts), whose
README leaves out the MLP that the paper has.

Departures:

- AdamW with linear warm-up and decay and the epochs of all rivals here, without early stopping on a validation set.
- One learning rate for prompt and MLP, and three to ten times that for the head, not 0.3 (T5) or 3e-5 for 50 epochs
  (BERT).
- Weight decay is Lester et al.'s. Dropout is off.
- The classifier reads the mean over the text's tokens, not the state at the first vector of the task's prompt.
- The code's BERT reads its prompts after the padded text, the newest last, each at its own positions, and keeps its
  MLPs.
- Texts are not cut to make room for prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.continual.methods.common import answers_by_task
from benchmarks.continual.methods.method import Answer, Setup, State
from benchmarks.continual.methods.prompts import (
    PromptedClassifier,
    PromptedWriter,
    make_prompted,
    prompt_options,
    starting_prompt,
)
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.tasks import name_seed

LENGTH, BOTTLENECK = 10, 800
LEARNING_RATE = 1e-3  # of prompt and MLP: the rates for a prompt alone are too large for an MLP


class Reparameterised(nn.Module):
    """A prompt [P, H] written as P + MLP(P)."""

    def __init__(self, prompt: Tensor, bottleneck: int, seed: int) -> None:
        super().__init__()
        width, device = prompt.shape[1], prompt.device
        self.prompt = nn.Parameter(prompt)
        self.mlp = nn.Sequential(nn.Linear(width, bottleneck), nn.ReLU(), nn.Linear(bottleneck, width)).to(device)
        generator = torch.Generator().manual_seed(seed)
        for parameter, fan_in in zip(self.mlp.parameters(), (width, width, bottleneck, bottleneck), strict=True):
            bound = fan_in**-0.5  # torch's initialisation of linear layers
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)

    def forward(self) -> Tensor:
        return self.prompt + self.mlp(self.prompt)


class ProgressivePrompts:
    """A `Method`. prompts: each task's, [P, H], in the order of learning."""

    def __init__(self, setup: Setup, *, length: int = LENGTH, bottleneck: int = BOTTLENECK) -> None:
        self.setup, self.length, self.bottleneck = setup, length, bottleneck
        self.backbone = Backbone.load(setup.backbone)
        self.options = replace(prompt_options(setup.options, self.backbone.kind), learning_rate=LEARNING_RATE)
        self.prompts: dict[str, Tensor] = {}
        self.models: dict[str, PromptedClassifier | PromptedWriter] = {}

    def read(self, name: str) -> Tensor:
        """What a task's rows read before their text, [k P, H]: its prompt, then earlier ones, newest first."""
        names = list(self.prompts)
        return torch.cat([self.prompts[each] for each in names[names.index(name) :: -1]])

    def _new(self, name: str, labels: Sequence[str]) -> PromptedClassifier | PromptedWriter:
        seed = name_seed(name, self.options.seed)
        return make_prompted(self.backbone, self.setup, labels, seed, lambda rows: self.read(name))

    def learn(self, task: Task, progress: bool | None = None) -> None:
        seed, earlier = name_seed(task.name, self.options.seed), list(self.prompts.values())[::-1]
        own = Reparameterised(starting_prompt(self.backbone, self.length, seed), self.bottleneck, seed)
        model = self._new(task.name, task.labels or [])
        model.prompt_of = lambda rows: torch.cat([own(), *earlier])
        trained = [*own.parameters(), *model.head_parameters()]
        model.fit(task.name, task.rows, self.options, progress, parameters=trained)
        model.prompt_of = lambda rows: self.read(task.name)
        self.prompts[task.name], self.models[task.name] = own().detach(), model

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        return answers_by_task(self.models, rows, tasks)

    def state(self) -> State:
        return {
            name: {
                "labels": getattr(model, "labels", []),
                "prompt": self.prompts[name],
                "head": [parameter.detach() for parameter in model.head_parameters()],
            }
            for name, model in self.models.items()
        }

    def restore(self, state: State) -> None:
        for name, own in state.items():
            self.models[name] = model = self._new(name, own["labels"])
            self.prompts[name] = own["prompt"].to(self.backbone.device)
            for parameter, value in zip(model.head_parameters(), own["head"], strict=True):
                parameter.data.copy_(value)

    def _tensors(self) -> list[Tensor]:
        heads = [parameter for model in self.models.values() for parameter in model.head_parameters()]
        return [*self.prompts.values(), *heads]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self._tensors())

    @property
    def kept(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())
