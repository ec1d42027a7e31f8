"""The adapted model: text -> query -> route -> the frozen backbone with that route's increments -> features or text.

With `trunk` queries one forward pass does everything. Hooks on the tapped layers collect the query on the way up; at
the last tap the route is found, and the layers above it, the only ones that carry increments, use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_fast.backbone import Backbone, Encoded
from slm_fast.data import Row
from slm_fast.errors import InputError
from slm_fast.layers import Adaptation, AdaptedLinear, Values
from slm_fast.ops import Route
from slm_fast.pool import Pool
from slm_fast.query import DEFAULT_ENCODER, SentenceQuery, TrunkQuery, check_taps, default_taps
from slm_fast.router import DtkrRouter, GaussianRouter, Router
from slm_fast.tasks import LearnedTask

Report = Callable[[int], None]  # told how many rows were just done


@dataclass(frozen=True)
class Config:
    """How one kind of adapted model is put together. It is part of a store and the same for all its tasks.

    query: "trunk" or "sentence". router: "gaussian" or "dtkr". taps: layers the trunk query reads. encoder: the
    sentence query's model. targets: linear layers that carry increments, in the words of the backbone's family.
    first_layer: the lowest layer that does. k: slots retrieved. groups, aggregate: for dtkr. temperature: for gaussian.
    route_on: "input" (an instruction does not help routing) or "prompt". max_length: tokens read of an input.
    None means: chosen from the backbone.
    """

    query: str = "trunk"
    router: str = "gaussian"
    taps: tuple[int, ...] | None = None
    encoder: str | None = None
    targets: tuple[str, ...] = ("query", "value", "out", "up", "down")
    first_layer: int | None = None
    k: int | None = None
    groups: int | None = None
    aggregate: str = "mean"
    temperature: float = 4.0
    route_on: str = "input"
    max_length: int | None = None

    def completed(self, backbone: Backbone) -> Config:
        """This configuration with every choice made. Raises InputError for one that cannot be right."""
        for name, choices in (
            ("query", ("trunk", "sentence")),
            ("router", ("gaussian", "dtkr")),
            ("route_on", ("input", "prompt")),
            ("aggregate", ("mean", "vote")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: expected {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        layers, trunk = len(backbone.layers), self.query == "trunk"
        taps = check_taps(default_taps(layers) if self.taps is None else self.taps, layers) if trunk else None
        lowest = taps[-1] if taps else 0
        first_layer = self.first_layer if self.first_layer is not None else (lowest if taps else layers // 2)
        if not lowest <= first_layer < layers:
            raise InputError(
                f"first_layer: expected {lowest}..{layers - 1} (not below the last tap), got {first_layer}"
            )
        if not self.targets:
            raise InputError(f"targets: expected at least one of {', '.join(backbone.family.linears)}, got none")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature: expected a positive number, got {self.temperature}")
        k = self.k if self.k is not None else (2 if self.router == "gaussian" else 4)
        if k < 1:
            raise InputError(f"k: expected at least 1, got {k}")
        limit = backbone.longest()
        max_length = min(256, limit or 256) if self.max_length is None else self.max_length
        if self.encoder is not None and trunk:
            raise InputError(f"encoder: goes with query='sentence', got query='trunk' and encoder {self.encoder!r}")
        if self.taps is not None and not trunk:
            raise InputError(f"taps: go with query='trunk', got query='sentence' and taps {list(self.taps)}")
        if max_length < 4 or (limit is not None and max_length > limit):
            raise InputError(f"max_length: expected 4..{limit or 'any'} for this backbone, got {max_length}")
        encoder = None if trunk else self.encoder or DEFAULT_ENCODER
        targets = tuple(self.targets)
        return replace(
            self, taps=taps, encoder=encoder, targets=targets, first_layer=first_layer, k=k, max_length=max_length
        )


@dataclass
class Passage:
    """A batch on its way through: what the trunk's taps need and what they found."""

    mask: Tensor  # [B, T] real tokens
    slot_mask: Tensor | None = None  # [B, P] slots allowed
    abstain: float | None = None
    stop: str | None = None  # "query" or "states": end the pass once they are known
    pooled: list[Tensor] | None = None
    query: Tensor | None = None  # [B, D] once the last tap is passed
    states: Tensor | None = None  # [B, T, H] that enter the lowest layer with increments, if asked for
    route: Route | None = None


class Reading(NamedTuple):
    """A row as the model reads it: the tokens of its prompt, and whether they were cut to fit.

    ahead: what its query has to be found from before the forward pass (tokens, or the text for an encoder with a
    tokenizer of its own); None where it is found on the way. A sentence encoder's query always goes ahead, the trunk's
    when an instruction stands in the prompt, because in the pass itself the input's tokens attend to it.
    """

    ids: list[int]
    truncated: bool
    ahead: list[int] | str | None


class Output(NamedTuple):
    """What a pass of a batch gives.

    hidden: the last hidden states [B, T, H]. query: [B, D] where the trunk's taps found it on the way, else None.
    route: the slots that adapted the pass, [B, K].
    """

    hidden: Tensor
    query: Tensor | None
    route: Route


class _QueryFound(Exception):
    """Ends a forward pass of which only the query, or what enters the increments, was wanted."""


class _Known(torch.nn.Module):
    """Stands in the place of layers whose output is known already. With a `layer`, that layer runs all the same, for
    what it returns beside the hidden states."""

    def __init__(self, states: Tensor, layer: torch.nn.Module | None) -> None:
        super().__init__()
        self.states, self.layer = states, layer
        self.beside: tuple[Any, ...] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer is not None and self.beside is None:
            self.beside = self.layer(*args, **kwargs)[1:]
        return self.states if self.beside is None else (self.states, *self.beside)


class AdaptedModel:
    """A backbone whose linear layers can carry increments, with the pool and router of the tasks it knows."""

    def __init__(self, backbone: Backbone, config: Config) -> None:
        self.backbone = backbone
        self.config = config.completed(backbone)
        self.adaptation = Adaptation()
        self._passage: Passage | None = None
        self.query: TrunkQuery | SentenceQuery
        if self.config.taps is not None:
            self.query = TrunkQuery(self.config.taps, backbone.width, backbone.device)
        else:
            self.query = SentenceQuery(self.config.encoder or DEFAULT_ENCODER, backbone.device)
        self._shared = isinstance(self.query, SentenceQuery) and self.query.shares(backbone)
        width, groups = self.query.width, self.config.groups
        if groups is None:  # six, as the paper, where the width allows it
            groups = next(g for g in (6, 5, 4, 3, 2, 1) if width % g == 0)
        if groups < 1 or width % groups:
            raise InputError(f"groups: expected a divisor of the query width {width}, got {groups}")
        self.config = replace(self.config, groups=groups)
        self.modules = backbone.find_linears(self.config.targets, self.config.first_layer or 0)
        self.widths = backbone.widths(self.modules)  # module name -> (in_features, out_features)
        for name in self.modules:
            parent, _, child = name.rpartition(".")
            base = backbone.model.get_submodule(name)
            setattr(backbone.model.get_submodule(parent), child, AdaptedLinear(base, name, self.adaptation))
        for tap in self.config.taps or ():
            backbone.layers[tap].register_forward_pre_hook(self._tap, with_kwargs=True)
        entrance = backbone.layers[self.config.first_layer or 0]
        entrance.register_forward_pre_hook(self._enter, with_kwargs=True)  # after the tap that may be there
        self.set_tasks([])

    @property
    def about(self) -> dict[str, Any]:
        """What a store of this model's tasks has in common; all but `backbone` must agree for it to be opened."""
        config = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.config).items()}
        about = {"backbone": self.backbone.name, "fingerprint": self.backbone.fingerprint, "config": config}
        if isinstance(self.query, SentenceQuery):
            about["encoder_fingerprint"] = self.query.fingerprint
        return about

    # Tasks

    def set_tasks(self, tasks: Sequence[LearnedTask]) -> None:
        self.pool = Pool(tasks, self.backbone.device, self.backbone.dtype)
        self.router = self.new_router(self.pool.tasks)

    def new_router(self, tasks: Sequence[LearnedTask] = ()) -> Router:
        """A router as the configuration says, over these tasks' slots."""
        router: Router
        if self.config.router == "gaussian":
            router = GaussianRouter(k=self.config.k or 1, temperature=self.config.temperature)
        else:
            router = DtkrRouter(k=self.config.k or 1, groups=self.config.groups or 1, aggregate=self.config.aggregate)
        if tasks:
            router.load([task.router for task in tasks], self.backbone.device)
        return router

    # From text to query and route

    def encode(self, rows: Sequence[Row], *, padding_side: str = "right") -> Encoded:
        return self.backbone.encode(
            [row.prompt for row in rows], self.config.max_length or 0, padding_side=padding_side
        )

    def read(self, rows: Sequence[Row]) -> list[Reading]:
        """Rows as tokens, each text tokenised once. May be called by one thread while another uses the model."""
        longest = self.config.max_length or 0
        texts, queries = [row.prompt for row in rows], [row.query_text(self.config.route_on) for row in rows]
        if isinstance(self.query, SentenceQuery) and self._shared and texts == queries:
            encoder_longest = self.query.longest or longest
            ids, cut = self.backbone.tokenise(texts, max(longest, encoder_longest))
            return [
                Reading(self.backbone.shorten(row, longest), lost or len(row) > longest, shared)
                for row, lost, shared in zip(
                    ids, cut, (self.backbone.shorten(row, encoder_longest) for row in ids), strict=True
                )
            ]
        ahead: dict[int, list[int] | str]
        if isinstance(self.query, SentenceQuery):
            ahead = dict(enumerate(queries))
        else:
            other = [i for i, text in enumerate(texts) if queries[i] != text]
            ahead = dict(zip(other, self.backbone.tokenise([queries[i] for i in other], longest)[0], strict=True))
        ids, cut = self.backbone.tokenise(texts, longest)
        return [Reading(row, lost, ahead.get(i)) for i, (row, lost) in enumerate(zip(ids, cut, strict=True))]

    def query_ahead(self, texts: Sequence[list[int] | str]) -> Tensor:
        """Queries [B, D] of what `read` says has to be seen before the forward pass."""
        if isinstance(texts[0], str):
            return self._query_batch([text for text in texts if isinstance(text, str)])
        tokens = [ids for ids in texts if not isinstance(ids, str)]
        return self._query_tokens(self.backbone.collate(tokens, []).to(self.backbone.device))

    @torch.no_grad()  # not inference_mode: training saves these queries for backward
    def queries(self, rows: Sequence[Row], *, batch_size: int = 32, report: Report | None = None) -> Tensor:
        """Queries [N, D] float32 of rows, without running the layers above the last tap."""
        texts = [row.query_text(self.config.route_on) for row in rows]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.query.width, device=self.backbone.device)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found[chosen] = self._query_batch([texts[i] for i in chosen])
            if report is not None:
                report(len(chosen))
        return found

    def _query_batch(self, texts: Sequence[str]) -> Tensor:
        if isinstance(self.query, SentenceQuery):
            return self.query.encode(texts).to(self.backbone.device)
        return self._query_tokens(self.backbone.encode(texts, self.config.max_length or 0))

    def _query_tokens(self, encoded: Encoded) -> Tensor:
        if isinstance(self.query, SentenceQuery):
            return self.query.encode_tokens(encoded)
        passage = Passage(encoded.attention_mask, stop="query")
        with self.passing(passage, {}), suppress(_QueryFound):
            self.run_trunk(encoded)
        assert passage.query is not None
        return passage.query

    def find_route(self, query: Tensor, slot_mask: Tensor | None = None, abstain: float | None = None) -> Route:
        """The route of queries [B, D]; with `abstain`, rows farther from the task found than that share of its own
        training rows get an empty route (all ids -1)."""
        route = self.router.route(query, slot_mask)
        if abstain is None:
            return route
        distance, percentiles = self.router.distance(query, route.slot_ids[:, 0].clamp(min=0))
        far = (distance > percentiles[:, round(100 * abstain)]).to(query.device)[:, None]
        return Route(route.slot_ids.masked_fill(far, -1), route.weights.masked_fill(far, 0.0))

    def empty_route(self, batch: int) -> Route:
        """No increments at all: the bare backbone."""
        device = self.backbone.device
        return Route(torch.full((batch, 1), -1, device=device), torch.zeros(batch, 1, device=device))

    # Through the backbone

    @contextmanager
    def passing(self, passage: Passage, values: Values, route: Route | None = None) -> Iterator[None]:
        """Adapt the forward passes inside the block; without a route the trunk's taps find it on the way."""
        with self.adaptation.using(values, route):
            self._passage = passage if route is None else None
            passage.route = route
            try:
                yield
            finally:
                self._passage = None

    def _tap(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        passage = self._passage
        if passage is None or passage.query is not None or not isinstance(self.query, TrunkQuery):
            return
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        beams = hidden.shape[0] // passage.mask.shape[0]  # generation repeats each row for its beams
        passage.pooled = passage.pooled or []
        passage.pooled.append(self.query.pool(hidden, passage.mask.repeat_interleave(beams, 0)))
        if len(passage.pooled) < len(self.query.taps):
            return
        passage.query = self.query.join(passage.pooled)
        if passage.stop == "query":
            raise _QueryFound
        if passage.stop == "states":
            return
        slot_mask = None if passage.slot_mask is None else passage.slot_mask.repeat_interleave(beams, 0)
        passage.route = self.adaptation.route = self.find_route(passage.query, slot_mask, passage.abstain)

    def _enter(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        passage = self._passage
        if passage is not None and passage.stop == "states":
            passage.states = args[0] if args else kwargs["hidden_states"]
            raise _QueryFound

    @torch.no_grad()
    def trunk_states(self, encoded: Encoded, query_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters the lowest layer with increments, [B, T, H], and, with `trunk` queries, the queries [B, D] pooled
        over `query_mask` [B, T] on the way."""
        passage = Passage(query_mask, stop="states")
        with self.passing(passage, {}), suppress(_QueryFound):
            self.run_trunk(encoded)
        assert passage.states is not None
        return passage.states, passage.query

    @contextmanager
    def above(self, states: Tensor | None) -> Iterator[None]:
        """Passes inside the block begin at the lowest layer with increments: `states` [B, T, H] enter it, as
        `trunk_states` gave them. None: they begin at the bottom, as always."""
        if states is None:
            yield
            return
        layers, lower = self.backbone.layers, range(self.config.first_layer or 0)
        replaced = [layers[i] for i in lower]
        # T5's layers hand on the position bias that the first of them makes.
        known = _Known(states, replaced[0] if self.backbone.kind == "seq2seq" else None)
        try:
            for i in lower:
                layers[i] = known
            yield
        finally:
            for i, layer in zip(lower, replaced, strict=True):
                layers[i] = layer

    def forward(self, batch: Encoded, route: Route | None = None) -> Output:
        """One pass of a tokenised batch through the trunk, with the increments of the pool's slots on `route` [B, K].

        Without a route the trunk's taps find it on the way; a sentence query's has to be found before (`find_routes`).
        """
        passage = Passage(batch.attention_mask)
        with self.passing(passage, self.pool.values, route):
            hidden = self.run_trunk(batch)
        assert passage.route is not None
        return Output(hidden, passage.query, passage.route)

    def find_routes(self, batch: Encoded) -> Route:
        """The routes [B, K] of a tokenised batch, found before its pass."""
        return self.find_route(self._query_tokens(batch))

    def run_trunk(self, encoded: Encoded) -> Tensor:
        """The trunk's last hidden states [B, T, H], adapted as `passing` says."""
        model, options = self.backbone.model, {}
        if self.backbone.kind == "seq2seq":
            model = model.get_encoder()
        elif self.backbone.kind == "causal":
            model, options = model.base_model, {"use_cache": False}  # without the vocabulary's output layer
        out = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, **options)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def features(self, encoded: Encoded) -> Tensor:
        """Encoder-only: mean last hidden state over real tokens [B, H] float32, adapted as `passing` says."""
        return TrunkQuery.pool(self.run_trunk(encoded), encoded.attention_mask)
