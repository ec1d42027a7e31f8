"""Replay: fine-tuning with 1 % of the rows of earlier tasks kept and replayed among those of the next.

Source: the Replay baseline of Huang et al., Continual Learning for Text Classification with Information Disentanglement
Based Regularization, NAACL 2021 (SALT-NLP/IDBR), whose share the SLM paper (ICLR 2024) also uses. 1 % of a task's
training rows are drawn at random once it is learned. While a later task is learned, a batch of each earlier task is
mixed into every tenth batch; these rows are additional steps.

Departures:

- The backbone, its reading of a row (the mean over tokens, or generating the label), AdamW's warm-up and decay,
  learning rates, batch size and epochs are those of all rivals here (originally: BERT-base, 3e-5 throughout, batches of
  8, epochs chosen per task).
- At least one row per task is kept.
- Tenth batches are counted through all epochs of a task, not anew in each, so that short tasks replay, too.
- The model of the last step is kept, not the best on validation rows.
"""

from __future__ import annotations

from torch import Generator, Tensor

from benchmarks.continual.methods.memory import EVERY, SHARE, Remembering, mix, sample
from benchmarks.continual.methods.method import Setup
from slm_fast.data import Task


class Replay(Remembering):
    """A `Method`. share: of a task's rows to keep. every: replay in every `every`-th batch."""

    def __init__(self, setup: Setup, *, share: float = SHARE, every: int = EVERY) -> None:
        super().__init__(setup)
        self.share, self.every = share, every

    def learn(self, task: Task, progress: bool | None = None) -> None:
        earlier = self.memory.numbers(len(task.rows))

        def arrange(batches: list[Tensor], generator: Generator) -> list[Tensor]:
            return mix(batches, earlier, self.options.batch_size, self.every, generator)[0]

        self.model.fit(task.name, task.rows, self.options, progress, kept=self.memory.rows, arrange=arrange)
        self.memory.keep(task.name, sample(task.name, task.rows, self.share, self.options.seed))
