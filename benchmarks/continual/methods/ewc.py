"""EWC: fine-tuning with changes to weights penalised by how much they mattered to earlier tasks.

Source: Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017, Eq. 3: the loss of a task
plus strength / 2 * sum_i F_i (w_i - w*_i)^2 for each earlier task, where w* are the weights after it and F is the
diagonal of its Fisher information there. This is the original, with one penalty per task and no decay, not the online
variant. The sum of these quadratics is stored as a single one, equal up to a constant (as the paper notes):
F = sum_t F_t around w* = sum_t F_t w*_t / F.

F is the Fisher information, not the "empirical" one: squared per-row gradients of the log-likelihood of an answer
sampled from the model's own prediction. With the rows' own answers it would vanish where the task is learned well
(Kunstner et al. 2019). A writer samples each token given the row's own answer before it.

Departures:

- F is the mean over at most 1,000 rows of a task, drawn at random.
- The strength is 5,000, the best for EWC in Serra et al. 2018 and the choice of later work on text. The paper chose it
  per task.
- All weights are penalised, including the head's.
- AdamW, learning rates, batch size and epochs are those of all rivals here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from benchmarks.continual.methods.common import IGNORE
from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.method import Setup, State
from slm_fast.data import Row, Task
from slm_fast.tasks import name_seed

STRENGTH = 5000.0  # lambda
FISHER_ROWS = 1000


class Ewc(Finetune):
    """A `Method`.

    Args:
        strength: lambda of the penalty.
        fisher_rows: rows of a task used to estimate F, at most.

    Attributes:
        fisher, anchor: F and w*, in the order and shapes of the trained parameters; empty before the first task.
    """

    def __init__(self, setup: Setup, *, strength: float = STRENGTH, fisher_rows: int = FISHER_ROWS) -> None:
        super().__init__(setup)
        self.strength, self.fisher_rows = strength, fisher_rows
        self.fisher: list[Tensor] = []
        self.anchor: list[Tensor] = []

    def learn(self, task: Task, progress: bool | None = None) -> None:
        def loss_of(rows: Sequence[Row]) -> Tensor:
            return self.model.losses(rows).mean() + self.penalty()

        self.model.fit(task.name, task.rows, self.options, progress, loss_of=loss_of if self.fisher else None)
        generator = Generator().manual_seed(name_seed(f"{task.name}/fisher", self.options.seed))
        chosen = torch.randperm(len(task.rows), generator=generator)[: self.fisher_rows]
        self.hold(self.fisher_of([task.rows[i] for i in chosen.tolist()], generator))

    def penalty(self) -> Tensor:
        """strength / 2 * sum F (w - w*)^2, a scalar."""
        parts = zip(self.model.trained(), self.fisher, self.anchor, strict=True)
        total = sum(((fisher * (weight - anchor).square()).sum() for weight, fisher, anchor in parts), torch.zeros(()))
        return 0.5 * self.strength * total

    def fisher_of(self, rows: Sequence[Row], generator: Generator) -> list[Tensor]:
        """The diagonal of the Fisher information at the current weights, averaged over rows."""
        weights = self.model.trained()
        fisher = [torch.zeros_like(weight) for weight in weights]
        for row in rows:
            logits, targets = self.model.predictions([row])
            said = logits[targets != IGNORE].float()  # [tokens, V]
            drawn = torch.multinomial(said.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
            loss = cross_entropy(said, drawn.to(said.device), reduction="sum")
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, gradient in zip(fisher, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=1 / len(rows))
        return fisher

    def hold(self, fisher: Sequence[Tensor]) -> None:
        """Add a penalty around the current weights."""
        weights = [weight.detach() for weight in self.model.trained()]
        if not self.fisher:
            self.fisher, self.anchor = list(fisher), [weight.clone() for weight in weights]
            return
        for total, anchor, new, weight in zip(self.fisher, self.anchor, fisher, weights, strict=True):
            total += new
            share = new / total.clamp(min=torch.finfo(total.dtype).tiny)
            anchor += share * (weight - anchor)

    def state(self) -> State:
        return {**super().state(), "fisher": self.fisher, "anchor": self.anchor}

    def restore(self, state: State) -> None:
        super().restore(state)
        device = self.model.backbone.device
        self.fisher = [part.to(device, copy=True) for part in state["fisher"]]
        self.anchor = [part.to(device, copy=True) for part in state["anchor"]]

    @property
    def kept(self) -> int:
        return super().kept + sum(part.nbytes for part in (*self.fisher, *self.anchor))
