"""IDBR: a text's generic and task-specific information are separated, and each is kept near its earlier state.

Source: Huang et al., Continual Learning for Text Classification with Information Disentanglement Based Regularization,
NAACL 2021 (SALT-NLP/IDBR); all constants are those of the released code.

- Two layers (H -> 128, tanh) make two spaces, and the head reads both. The generic space is also trained to tell
  whether the two halves of a text are in order (next-sentence prediction). The specific space is also trained to name
  the row's task while rows are replayed.
- While a later task is learned, the loss includes the mean squared distances of both spaces to those that the model
  made of the same rows before that task, each times 0.5, and their sum times 0.5 or, in replayed batches, 5.
- A text is cut in two at a random place. Its halves in reverse order are a second row with the same label.
- 1 % of a task's rows are kept: those nearest to the k-means centres of their embeddings. A batch of each earlier task
  is mixed into every tenth batch.

Departures:

- The encoder need not be BERT-base, and its embedding is the mean over real tokens, which MiniLM was trained for, not
  the first token's.
- MiniLM has no next-sentence layer, so a new one is made. As in the code, it reads the generic space, not BERT's
  pooler.
- New layers learn at the rates of heads here, and the backbone at Finetune's (originally: 3e-5, but 5e-4 for the layer
  that names tasks). AdamW's decay, batch size, epochs and the absence of dropout are those of all rivals (originally:
  batches of 8, 1,000 warm-up steps, epochs chosen per task).
- The layer that names tasks grows with them.
- At least one row per task is kept.
- Tenth batches are counted through all epochs of a task.
- The model of the last step is kept, not the best on validation rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.continual.methods.common import BATCH, Classifier
from benchmarks.continual.methods.memory import EVERY, SHARE, Remembering, mix, shared
from benchmarks.continual.methods.method import State
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.query import TrunkQuery
from slm_fast.tasks import name_seed
from slm_fast.tokenization import pad

WIDTH = 128  # of each space
GENERIC, SPECIFIC = 0.5, 0.5  # weights of the distances in each space
HELD, HELD_IN_REPLAY = 0.5, 5.0  # weights of the sum of the distances


class Spaces(Classifier):
    """A classifier whose head reads a generic and a specific space, [B, 2 WIDTH]."""

    def __init__(self, backbone: Backbone, labels: Sequence[str], max_length: int, seed: int) -> None:
        super().__init__(backbone, labels, max_length, seed)
        generator = Generator().manual_seed(seed)
        self.generic = self.layer(backbone.width, WIDTH, generator)
        self.specific = self.layer(backbone.width, WIDTH, generator)
        self.head = self.layer(2 * WIDTH, len(self.labels), generator)
        self.order = self.layer(WIDTH, 2, generator)  # whether halves are in order (0) or not (1)
        self.task = self.layer(WIDTH, 1, generator)  # which of the tasks so far

    def layer(self, width: int, outputs: int, generator: Generator) -> nn.Linear:
        """A new layer with weights initialised as torch does but from this generator, and zero biases."""
        linear = nn.utils.skip_init(nn.Linear, width, outputs)
        nn.init.uniform_(linear.weight, -(width**-0.5), width**-0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        return linear.to(self.backbone.device)

    def add_task(self, seed: int) -> None:
        """Add an output to the layer that names tasks, for the second and each later task."""
        wider = self.layer(WIDTH, self.task.out_features + 1, Generator().manual_seed(seed))
        with torch.no_grad():
            wider.weight[:-1], wider.bias[:-1] = self.task.weight, self.task.bias
        self.task = wider

    def head_parameters(self) -> list[nn.Parameter]:
        layers = (self.head, self.generic, self.specific, self.order, self.task)
        return [parameter for layer in layers for parameter in layer.parameters()]

    def embed(self, rows: Sequence[Row], generator: Generator | None = None, *, swapped: bool = False) -> Tensor:
        """The mean last hidden state over real tokens, [B, H].

        Rows are cut in the middle or, with a generator, at random. swapped: the second half comes first.
        """
        tokens, _ = self.backbone.tokenization.tokenize([row.prompt for row in rows], self.max_length - 1)
        ids, types = [], []
        for start, *words, end in tokens:
            cut = len(words) // 2
            if generator is not None:
                cut = int(torch.randint(1, max(2, len(words)), (), generator=generator))
            first, second = words[:cut], words[cut:]
            if swapped:
                first, second = second, first
            ids.append([start, *first, end, *second, end])
            types.append([0] * (len(first) + 2) + [1] * (len(second) + 1))
        device = self.backbone.device
        padded, mask = (each.to(device) for each in pad(ids, self.backbone.tokenizer.pad_token_id))
        inputs = {"input_ids": padded, "attention_mask": mask}
        if self.backbone.model.config.type_vocab_size > 1:  # RoBERTa has one
            inputs["token_type_ids"] = pad(types, 0)[0].to(device)
        hidden = self.network(**inputs).last_hidden_state
        return TrunkQuery.pool(hidden, mask)

    def spaces(self, embedded: Tensor) -> Tensor:
        """[B, H] -> [B, 2 WIDTH], the generic space first."""
        return torch.cat([self.generic(embedded).tanh(), self.specific(embedded).tanh()], 1)

    def features(self, rows: Sequence[Row]) -> Tensor:
        return self.spaces(self.embed(rows))

    @torch.no_grad()
    def embed_all(self, rows: Sequence[Row]) -> Tensor:
        """[rows, H] for any number of rows."""
        return torch.cat([self.embed(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)])

    def task_losses(self, rows: Sequence[Row], generator: Generator, tasks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The training loss of a batch, and the spaces [B, 2 WIDTH] of its rows in order, for regularisation.

        The loss sums those of the labels, of the halves' order and, given each row's task index [B], of the tasks.
        """
        embedded = torch.cat([self.embed(rows, generator), self.embed(rows, generator, swapped=True)])
        spaces = self.spaces(embedded)  # [2B, 2 WIDTH]
        in_order = torch.arange(2, device=spaces.device).repeat_interleave(len(rows))
        loss = cross_entropy(self.head(spaces), self.targets(rows).repeat(2))
        loss = loss + cross_entropy(self.order(spaces[:, :WIDTH]), in_order)
        if tasks is not None:
            loss = loss + cross_entropy(self.task(spaces[:, WIDTH:]), tasks.repeat(2))
        return loss, spaces[: len(rows)]


def distance(spaces: Tensor, before: Tensor) -> Tensor:
    """The weighted distance of a batch's spaces [B, 2 WIDTH] from their earlier values, a scalar."""
    generic, specific = (mse_loss(spaces[:, part], before[:, part]) for part in (slice(WIDTH), slice(WIDTH, None)))
    return GENERIC * generic + SPECIFIC * specific


def central(points: Tensor, count: int, seed: int) -> list[int]:
    """The indices of the points [N, H] nearest to the centres of `count` clusters, one for each cluster."""
    from sklearn.cluster import KMeans  # a slow import

    found = points.double().cpu().numpy()
    clusters = KMeans(count, n_init=10, random_state=seed % 2**32).fit(found)
    distances = np.linalg.norm(found - clusters.cluster_centers_[clusters.labels_], axis=1)  # to own centre, [N]
    members = [np.flatnonzero(clusters.labels_ == cluster) for cluster in range(count)]
    return [int(own[distances[own].argmin()]) for own in members if len(own)]


class Idbr(Remembering):
    """A `Method`, for encoders only."""

    model: Spaces

    def pretrained(self) -> Spaces:
        loaded = Backbone.load(self.setup.backbone)
        loaded.model.requires_grad_(True)
        return Spaces(loaded, self.setup.labels, self.setup.max_length, self.setup.options.seed)

    def learn(self, task: Task, progress: bool | None = None) -> None:
        model, kept = self.model, self.memory.rows
        seed, number = name_seed(task.name, self.options.seed), len(self.memory.tasks)
        if number:
            model.add_task(seed)
        rows = [*task.rows, *kept]
        places = {id(row): i for i, row in enumerate(rows)}
        sizes = [len(task.rows), *map(len, self.memory.tasks.values())]
        tasks = torch.tensor([number, *range(number)]).repeat_interleave(torch.tensor(sizes)).to(model.backbone.device)
        with torch.no_grad():
            before = model.spaces(model.embed_all(rows)) if number else None
        generator = Generator().manual_seed(name_seed(f"{task.name}/halves", self.options.seed))
        replays: Iterator[bool] = iter(())  # whether the next batch contains kept rows

        def arrange(batches: list[Tensor], shuffling: Generator) -> list[Tensor]:
            nonlocal replays
            earlier = self.memory.numbers(len(task.rows))
            batches, mixed = mix(batches, earlier, self.options.batch_size, EVERY, shuffling)
            replays = iter(mixed)
            return batches

        def loss_of(batch: list[Row]) -> Tensor:
            replay, own = next(replays), [places[id(row)] for row in batch]
            loss, spaces = model.task_losses(batch, generator, tasks[own] if replay else None)
            if before is not None:
                loss = loss + (HELD_IN_REPLAY if replay else HELD) * distance(spaces, before[own])
            return loss

        model.fit(task.name, task.rows, self.options, progress, loss_of=loss_of, kept=kept, arrange=arrange)
        chosen = central(model.embed_all(task.rows), shared(len(task.rows), SHARE), seed)
        self.memory.keep(task.name, [task.rows[i] for i in chosen])

    def restore(self, state: State) -> None:
        for _ in range(len(state["memory"]) - 1):
            self.model.add_task(0)
        super().restore(state)
