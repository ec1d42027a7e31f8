"""The ways to run mixed-task batches through one backbone, all on the same base with the same linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import peft
from torch import Tensor

from benchmarks.speed.backbones import copies, sharing
from benchmarks.speed.layers import Pass, one_task, per_sample, replace_layers
from benchmarks.speed.tasks import RANK, random_tasks
from slm_fast import ScalableLM, encoder_graphs
from slm_fast.batching import length_buckets
from slm_fast.layers import use_onednn
from slm_fast.ops import Route
from slm_fast.query import SentenceQuery
from slm_fast.tokenization import Encoded

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
    """Rows of one pass, and the task of each."""

    encoded: Encoded
    tasks: list[str]


Step = Callable[[Batch], Tensor]  # a batch's last hidden states [B, T, H]


def answer(slm: ScalableLM, batch: Encoded, route: Route | None = None) -> Tensor:
    """One pass with increments, with heads if there are any and, unless `route` [B, K] is given, with routing.

    Returns the last hidden states [B, T, H], or their mean [B, H] if there is nothing else (from a CUDA graph).
    """
    model = slm.model
    if isinstance(model.query, SentenceQuery) and route is None:
        route = model.route(model.query.encode_tokens(batch))
    passed = encoder_graphs.forward(model, batch, route)
    if model.pool.heads is not None:
        model.pool.heads.answer(passed.mean, model.pool.slot_task, passed.route)
    return passed.mean if passed.hidden is None else passed.hidden


def run_trunk(model: Any, kind: str, batch: Encoded) -> Tensor:
    """Last hidden states [B, T, H] of a bare model: for T5 the encoder's, for a causal model without a cache."""
    options = {}
    if kind == "seq2seq":
        model = model.get_encoder()
    elif kind == "causal":
        model, options = model.base_model, {"use_cache": False}
    hidden: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options).last_hidden_state
    return hidden


class Ways:
    """Every way over the same batches. A way's model is created when its step is first requested.

    Args:
        plain: an unmodified transformers model; all ways share its parameters.
        encoder: path or name of the second model, for the sentence query and the two-model design.
        train: {task: texts} for the router to learn the tasks by.
        rows: (task, text) to answer.
        tokens: per batch, padding included.
        batches: how many, spread over all lengths.
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
        self.plain, self.encoder, self.train = plain.requires_grad_(False), encoder, train
        self.load = copies(self.plain, tokenizer)
        self.steps: dict[str, Callable[[], Step]] = {
            BARE: lambda: self._trunk_of(self.bare),
            OURS: lambda: self._answered_by(self.slm),
            PLAIN: lambda: self._trunk_of(self.plain),
            PEFT: self._peft,
            TWO_MODELS: self._two_models,
            SENTENCE: lambda: self._answered_by(self.paper),
            ONE_TASK: lambda: self._answered_by(self.passing(one_task)),
            PER_SAMPLE: lambda: self._answered_by(self.passing(per_sample)),
        }
        backbone, longest = self.slm.model.backbone, self.slm.model.config.max_length
        assert longest is not None
        ids, _ = backbone.tokenization.tokenize([text for _, text in rows], longest)
        planned = length_buckets([len(row) for row in ids], tokens)
        count = min(batches, len(planned))
        chosen = [planned[int((i + 0.5) * len(planned) / count)] for i in range(count)]

        def batch(own: Sequence[int]) -> Batch:
            encoded = backbone.tokenization.collate([ids[i] for i in own]).to(backbone.device)
            return Batch(encoded, [rows[i][0] for i in own])

        self.batches = [batch(own) for own in chosen]
        self.rows = sum(map(len, chosen))
        self.by_task: list[Batch] = []
        for name in train:
            alike = [i for own in chosen for i in own if rows[i][0] == name]
            self.by_task += [
                batch([alike[i] for i in own]) for own in length_buckets([len(ids[i]) for i in alike], tokens)
            ]

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
        """A model that knows `copies` tasks of each name, with random values."""
        slm = self._untaught(**config)
        slm.add(random_tasks(slm, self.train, copies))
        return slm

    def passing(self, way: Pass) -> ScalableLM:
        """A model of the same tasks whose layers apply the increments in another way."""
        slm = self._untaught(query="trunk", router="gaussian")
        slm.add(list(self.slm.learned.values()))
        replace_layers(slm, dict.fromkeys(slm.model.modules, way))
        return slm

    def _untaught(self, **config: Any) -> ScalableLM:
        model, tokenizer = self.load()
        slm = ScalableLM.from_backbone(model, tokenizer=tokenizer, **config)
        if isinstance(slm.model.query, SentenceQuery):
            slm.model.query.encoder.to(self.plain.dtype)
        return slm

    def passes(self, name: str) -> list[Callable[[], object]]:
        """One call per batch, in the way of this name."""
        step = self.steps[name]()
        return [partial(step, batch) for batch in (self.by_task if name == ONE_TASK else self.batches)]

    @property
    def kind(self) -> str:
        return self.slm.model.backbone.kind

    def _trunk_of(self, model: Any) -> Step:
        kind = self.kind
        return lambda batch: run_trunk(model, kind, batch.encoded)

    def _answered_by(self, slm: ScalableLM) -> Step:
        return lambda batch: answer(slm, batch.encoded)

    def _two_models(self) -> Step:
        query, trunk = self.paper.model.query, self._trunk_of(self.bare)
        assert isinstance(query, SentenceQuery)

        def step(batch: Batch) -> Tensor:
            query.encode_tokens(batch.encoded)
            return trunk(batch)

        return step

    def _peft(self) -> Step:
        """PEFT LoRA with the increments of our tasks, one adapter per task; each row names its adapter."""
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
