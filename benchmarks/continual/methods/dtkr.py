"""DTKR retrieval of values of any kind, shared by the paper's ablations (SLM, ICLR 2024, Section 4.4 and A.5).

Each task adds four slots. Their keys are learned first, from the sentence embeddings of its inputs (`DtkrRouter`), and
are frozen while the slots' values are trained. A row reads the values of its four nearest slots, whichever tasks they
belong to. No task ID is given.

Departures:

- As elsewhere in this project, a task trains on routes over its own slots; `LearnOptions.joint` trains on routes over
  all slots, as the paper does.
- An encoder's heads are mixed by the weights of their tasks on the route. The paper's code selects a head by the true
  number of classes.
- The sentence embeddings are MiniLM's, not nli-mpnet-base-v2's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.continual.methods.common import BATCH, Classifier, Writer
from benchmarks.continual.methods.method import Answer, Setup, State
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.dtkr import DtkrRouter
from slm_fast.ops import Route
from slm_fast.options import LearnOptions
from slm_fast.query import SentenceQuery
from slm_fast.tasks import name_seed

SLOTS = 4  # per task, and retrieved per row
CPU = torch.device("cpu")

Query = Callable[[Sequence[str]], Tensor]  # texts -> [B, D]


class Dtkr(ABC):
    """A `Method` whose subclasses define a slot's value and the model that reads it.

    Args:
        query: embeds texts; default: MiniLM's sentence embeddings.

    Attributes:
        values: task -> name -> [S, ...], trained values of its slots.
        route: of the current batch.
    """

    route: Route

    def __init__(self, setup: Setup, options: LearnOptions, backbone: Backbone, query: Query | None = None) -> None:
        self.setup, self.options, self.backbone = setup, options, backbone
        self.query = SentenceQuery("minilm", backbone.device).encode if query is None else query
        self.router = DtkrRouter(k=SLOTS)
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.values: dict[str, dict[str, Tensor]] = {}
        self.models: dict[str, Classifier | Writer] = {}  # one per task, each with its own head, over one backbone

    @abstractmethod
    def new_values(self, seed: int) -> dict[str, Tensor]:
        """The untrained values of a task's slots: [S, ...] float32."""

    @abstractmethod
    def new_model(self, labels: Sequence[str], seed: int) -> Classifier | Writer:
        """The model that reads a batch with the values that `gather` returns for its route."""

    def gather(self, name: str) -> Tensor:
        """The values of this name of the slots on the batch's route, best first: [B, K, ...]."""
        pool = torch.cat([self.values[task][name] for task in self.router.names])
        return pool[self.route.slot_ids.to(pool.device)]

    @torch.inference_mode()
    def queries(self, rows: Sequence[Row]) -> Tensor:
        """[N, D] on the CPU."""
        texts = [row.query_text("input") for row in rows]
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return torch.cat([self.query(batch).cpu() for batch in batches])

    def learn(self, task: Task, progress: bool | None = None) -> None:
        seed, query = name_seed(task.name, self.options.seed), self.queries(task.rows).clone()
        self.parts[task.name] = self.router.fit(query, SLOTS, seed)
        self.router.load(self.parts, CPU)
        slot_task = torch.tensor(self.router.task_of_slot)
        own_slots = None if self.options.joint else slot_task == self.router.names.index(task.name)
        known = {row.query_text("input"): own for row, own in zip(task.rows, query, strict=True)}
        model = self.models[task.name] = self.new_model(task.labels or [], seed)
        trained = {name: nn.Parameter(value) for name, value in self.new_values(seed).items()}
        self.values[task.name] = dict(trained)

        def loss_of(rows: list[Row]) -> Tensor:
            self.route = self.router.route(torch.stack([known[row.query_text("input")] for row in rows]), own_slots)
            return model.losses(rows).mean()

        parameters = [*trained.values(), *model.head_parameters()]
        model.fit(task.name, task.rows, self.options, progress, loss_of=loss_of, parameters=parameters)
        self.values[task.name] = {name: value.detach() for name, value in trained.items()}

    @torch.inference_mode()
    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        found = [Answer("")] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        model, names = next(iter(self.models.values())), self.router.names
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = [rows[i] for i in places]
            self.route = self.router.route(self.queries(batch))
            slot_task = torch.tensor(self.router.task_of_slot)[self.route.slot_ids]  # [B, K]
            weight_BT = torch.zeros(len(batch), len(names)).scatter_add_(1, slot_task, self.route.weights)
            texts = self._labels(model, batch, weight_BT) if isinstance(model, Classifier) else model.answers(batch)
            for i, text, best, slots in zip(places, texts, weight_BT.argmax(1), slot_task, strict=True):
                found[i] = Answer(text, names[int(best)], tuple(names[int(slot)] for slot in slots))
        return found

    def _labels(self, model: Classifier, rows: Sequence[Row], weight_BT: Tensor) -> list[str]:
        """The most probable labels under the tasks' heads together, weighted by weight_BT [B, tasks]."""
        features = model.features(rows)
        heads = {name: each for name, each in self.models.items() if isinstance(each, Classifier)}
        words = sorted({word for head in heads.values() for word in head.labels})
        probability = features.new_zeros(len(rows), len(words))
        for task, name in enumerate(self.router.names):
            columns = torch.tensor([words.index(word) for word in heads[name].labels], device=features.device)
            share = weight_BT[:, task, None].to(features.device) * heads[name].head(features).softmax(1)
            probability.index_add_(1, columns, share)
        return [words[best] for best in probability.argmax(1).tolist()]

    def state(self) -> State:
        return {
            name: {
                "labels": getattr(model, "labels", []),
                "router": self.parts[name],
                "values": self.values[name],
                "head": [parameter.detach() for parameter in model.head_parameters()],
            }
            for name, model in self.models.items()
        }

    def restore(self, state: State) -> None:
        for name, own in state.items():
            self.parts[name] = own["router"]
            self.values[name] = {key: value.to(self.backbone.device) for key, value in own["values"].items()}
            self.models[name] = model = self.new_model(own["labels"], name_seed(name, self.options.seed))
            for parameter, value in zip(model.head_parameters(), own["head"], strict=True):
                parameter.data.copy_(value)
        self.router.load(self.parts, CPU)

    def _trained(self) -> list[Tensor]:
        heads = [parameter for model in self.models.values() for parameter in model.head_parameters()]
        return [*heads, *(value for values in self.values.values() for value in values.values())]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self._trained())

    @property
    def kept(self) -> int:
        keys = [tensor for part in self.parts.values() for tensor in part.values()]
        return sum(tensor.nbytes for tensor in [*self._trained(), *keys])
