"""The ways to pass mixed-task batches through one backbone, all on the same base with the same linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.ops.bench_multi_lora import materialised
from benchmarks.shapes import sharing
from slm_fast import ScalableLM
from slm_fast.backbone import Encoded
from slm_fast.data import Row
from slm_fast.layers import AdaptedLinear, use_onednn
from slm_fast.model import Passage
from slm_fast.ops import Route
from slm_fast.predict import plan
from slm_fast.query import SentenceQuery, TrunkQuery
from slm_fast.tasks import LearnedTask, name_seed

RANK = 8

BARE = "bare backbone"
OURS = "slm_fast, trunk + gaussian"
PLAIN = "plain transformers"
PEFT = "PEFT mixed batch, oracle adapters"
TWO_MODELS = "bare backbone + separate encoder"
SENTENCE = "slm_fast, sentence + dtkr"
ONE_TASK = "increments materialised, one task a batch"
PER_SAMPLE = "increments materialised, per sample"


@dataclass(frozen=True)
class Batch:
    """Rows that pass together, and the task of each."""

    encoded: Encoded
    tasks: list[str]


Step = Callable[[Batch], Tensor]  # a batch's last hidden states [B, T, H]


class PerSample(AdaptedLinear):
    """The paper's code: the whole increment of each sample, [B, I, O], and one more product."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        route, increments = self.adaptation.route, self.increments
        if route is None or increments is None:
            return y
        return materialised(y, x, *increments, route.slot_ids, route.weights)


class OneTask(AdaptedLinear):
    """Batches of one task: its increment is added to the weight once a batch."""

    def forward(self, x: Tensor) -> Tensor:
        route, increments = self.adaptation.route, self.increments
        if route is None or increments is None:
            y: Tensor = self.base(x)
            return y
        a, b = increments
        slot = int(route.slot_ids[0, 0])
        weight: Any = self.base.weight
        bias: Any = self.base.bias
        return nn.functional.linear(x, weight + (a[slot].T @ b[slot]).T, bias)


@contextmanager
def with_layers(slm: ScalableLM, kind: type[AdaptedLinear]) -> Iterator[None]:
    """Inside the block the adapted layers are of another kind."""
    own = [module for module in slm.model.backbone.model.modules() if isinstance(module, AdaptedLinear)]
    try:
        for module in own:
            module.__class__ = kind
        yield
    finally:
        for module in own:
            module.__class__ = AdaptedLinear


def answer(slm: ScalableLM, batch: Encoded, route: Route | None = None) -> Tensor:
    """A pass with increments, (where there are any) heads and, unless it is given, the search for its route [B, K].

    Returns the last hidden states [B, T, H].
    """
    model = slm.model
    if model.config.query == "sentence" and route is None:
        assert isinstance(model.query, SentenceQuery)
        route = model.find_route(model.query.encode_tokens(batch))
    passage = Passage(batch.attention_mask)
    with model.passing(passage, model.pool.values, route):
        hidden = model.run_trunk(batch)
    if model.pool.heads is not None:
        assert passage.route is not None
        model.pool.heads.answer(TrunkQuery.pool(hidden, batch.attention_mask), model.pool.slot_task, passage.route)
    return hidden


def run_trunk(model: Any, kind: str, batch: Encoded) -> Tensor:
    """Last hidden states [B, T, H] of a bare model. Of T5 its encoder's; a causal one keeps no cache."""
    options = {}
    if kind == "seq2seq":
        model = model.get_encoder()
    elif kind == "causal":
        model, options = model.base_model, {"use_cache": False}
    hidden: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options).last_hidden_state
    return hidden


def make_tasks(slm: ScalableLM, train: Mapping[str, Sequence[str]], copies: int = 1) -> list[LearnedTask]:
    """Tasks the router knows by texts, with random increments and heads; copies have means nearby."""
    model = slm.model
    tasks = []
    for task, own in train.items():
        part = model.new_router().fit(model.queries([Row(text) for text in own]), 1, 0)
        for number in range(copies):
            name = task if copies == 1 else f"{task}-{number}"
            draw = torch.Generator().manual_seed(name_seed(name, 0))
            values = {
                module: (
                    (torch.rand(1, RANK, i, generator=draw) * 2 - 1) / i**0.5,
                    torch.randn(1, RANK, o, generator=draw) * 0.01,
                )
                for module, (i, o) in model.widths.items()
            }
            head = None
            if model.backbone.kind == "encoder":
                head = (torch.randn(8, model.backbone.width, generator=draw) * 0.05, torch.zeros(8))
            moved = dict(part)
            if number and "mean" in part:
                away = 0.1 * torch.randn(part["mean"].shape, generator=draw)
                moved["mean"] = part["mean"] * (1 + away.to(part["mean"]))
            tasks.append(LearnedTask(name, tuple("abcdefgh"), values, moved, head))
    return tasks


class Ways:
    """Every way over the same batches. A way's model is made when its step is first asked for.

    Args:
        plain: a transformers model that nobody has touched; all ways share its parameters.
        encoder: path or name of the second model, for the sentence query and the two-model design.
        train: {task: texts} that the router learns the tasks by.
        rows: (task, text) that are answered.
        tokens: of a batch, padding included. batches: how many, from all over the lengths.
    """

    def __init__(
        self,
        plain: Any,
        tokenizer: Any,
        encoder: str,
        train: Mapping[str, Sequence[str]],
        rows: Sequence[tuple[str, str]],
        *,
        tokens: int,
        batches: int,
    ) -> None:
        self.plain, self.tokenizer, self.encoder, self.train = plain.requires_grad_(False), tokenizer, encoder, train
        self.steps: dict[str, Callable[[], Step]] = {
            BARE: lambda: self._trunk_of(self.bare),
            OURS: lambda: self._answered_by(self.slm),
            PLAIN: lambda: self._trunk_of(self.plain),
            PEFT: self._peft,
            TWO_MODELS: self._two_models,
            SENTENCE: lambda: self._answered_by(self.paper),
            ONE_TASK: lambda: self._answered_by(self.slm, OneTask),
            PER_SAMPLE: lambda: self._answered_by(self.slm, PerSample),
        }
        backbone, longest = self.slm.model.backbone, self.slm.model.config.max_length
        assert longest is not None
        ids, _ = backbone.tokenise([text for _, text in rows], longest)
        planned = plan([len(row) for row in ids], tokens)
        count = min(batches, len(planned))
        chosen = [planned[int((i + 0.5) * len(planned) / count)] for i in range(count)]

        def batch(own: Sequence[int]) -> Batch:
            encoded = backbone.collate([ids[i] for i in own], [False] * len(own)).to(backbone.device)
            return Batch(encoded, [rows[i][0] for i in own])

        self.batches = [batch(own) for own in chosen]
        self.rows = sum(map(len, chosen))
        self.by_task: list[Batch] = []
        for name in train:
            alike = [i for own in chosen for i in own if rows[i][0] == name]
            self.by_task += [batch([alike[i] for i in own]) for own in plan([len(ids[i]) for i in alike], tokens)]

    @cached_property
    def bare(self) -> Any:
        model = sharing(self.plain)
        use_onednn(model)
        return model

    @cached_property
    def slm(self) -> ScalableLM:
        return self.learned(query="trunk", router="gaussian")

    @cached_property
    def paper(self) -> ScalableLM:
        return self.learned(query="sentence", router="dtkr", encoder=self.encoder)

    def learned(self, copies: int = 1, **config: Any) -> ScalableLM:
        slm = ScalableLM.from_backbone(sharing(self.plain), tokenizer=copy.deepcopy(self.tokenizer), **config)
        if isinstance(slm.model.query, SentenceQuery):
            slm.model.query.encoder.to(self.plain.dtype)
        slm._set(make_tasks(slm, self.train, copies))
        return slm

    def passes(self, name: str) -> list[Callable[[], object]]:
        """Calls that pass a batch each in the way of this name."""
        step = self.steps[name]()
        return [partial(step, batch) for batch in (self.by_task if name == ONE_TASK else self.batches)]

    @property
    def kind(self) -> str:
        return self.slm.model.backbone.kind

    def _trunk_of(self, model: Any) -> Step:
        kind = self.kind
        return lambda batch: run_trunk(model, kind, batch.encoded)

    def _answered_by(self, slm: ScalableLM, layers: type[AdaptedLinear] | None = None) -> Step:
        def step(batch: Batch) -> Tensor:
            with with_layers(slm, layers) if layers else nullcontext():
                return answer(slm, batch.encoded)

        return step

    def _two_models(self) -> Step:
        query, trunk = self.paper.model.query, self._trunk_of(self.bare)
        assert isinstance(query, SentenceQuery)

        def step(batch: Batch) -> Tensor:
            query.encode_tokens(batch.encoded)
            return trunk(batch)

        return step

    def _peft(self) -> Step:
        """PEFT LoRA with the increments of our tasks, one adapter a task; each row names its own."""
        modules, kind = list(self.slm.model.modules), self.kind
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules, lora_dropout=0.0)
        names = list(self.train)
        wrapped = peft.get_peft_model(sharing(self.bare), config, adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, config)
        model = wrapped.base_model.model
        for module in modules:
            layer = model.get_submodule(module)
            for name in names:
                lora_a, lora_b = self.slm.learned[name].values[module]
                layer.lora_A[name].weight.data.copy_(lora_a[0])
                layer.lora_B[name].weight.data.copy_(lora_b[0].T)
        wrapped.to(self.plain.dtype).eval()

        def step(batch: Batch) -> Tensor:
            with wrapped._enable_peft_forward_hooks(adapter_names=batch.tasks):  # as its forward does
                return run_trunk(model, kind, batch.encoded)

        return step
