"""The adapted model: tokens -> query -> route -> frozen backbone with the route's increments -> hidden states."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_fast.backbone import Backbone
from slm_fast.configure import complete, complete_for, router_of
from slm_fast.covariance import ALIKE, NOTHING, Kept
from slm_fast.data import Row
from slm_fast.errors import InputError, WorkError
from slm_fast.injection import ForwardContext, Injection
from slm_fast.known import Known
from slm_fast.layers import Values
from slm_fast.ops import Route
from slm_fast.options import ModelConfig
from slm_fast.paging import pool_of
from slm_fast.pool import Pool, emptied
from slm_fast.query import DEFAULT_ENCODER, SentenceQuery, TrunkQuery
from slm_fast.reading import Reading, collated, read_rows
from slm_fast.router import Router
from slm_fast.schema import WHEN_SET, check_fits
from slm_fast.surroundings import PinnedLock
from slm_fast.tasks import LearnedTask
from slm_fast.tokenization import Encoded

Report = Callable[[int], None]  # called with the number of rows just done


class Output(NamedTuple):
    """Result of a forward pass."""

    hidden: Tensor  # [B, T, H], the trunk's last hidden states (for T5, the encoder's)
    query: Tensor | None  # [B, D]; None if the route was given or no task is known
    route: Route  # [B, K]


class AdaptedModel:
    """A backbone with increments in its linear layers, and the pool and router of the known tasks.

    Attributes:
        modules, widths: names of the linear layers with increments, and (in_features, out_features) of each.
        lock: held while running passes that belong together or changing the tasks; other threads wait. It is reentrant,
            and shields against torch settings of the thread that holds it.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig, device_memory: int | None = None) -> None:
        """device_memory: maximum bytes of tasks' values on the device (`slm_fast.paging`); None: no limit."""
        self.backbone, self._device_memory = backbone, device_memory
        self.config = complete(config, backbone)
        self._pinned = threading.local()
        self.lock = PinnedLock.of(backbone.model, one_thread=backbone.needs_one_thread)
        with self.lock:
            self._build(backbone)
        if isinstance(self.query, SentenceQuery):
            self.lock.models.append(self.query.encoder)
            weakref.finalize(self, self.lock.models.remove, self.query.encoder)  # a model may be used many times

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pinned": None, "_label_words": {}}  # a copy is not pinned and has other tasks

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pinned=threading.local())

    def _build(self, backbone: Backbone) -> None:
        self.query: TrunkQuery | SentenceQuery
        if self.config.taps is not None:
            maximum = self.config.features != 0
            self.query = TrunkQuery(self.config.taps, backbone.width, backbone.device, maximum=maximum)
        else:
            self.query = SentenceQuery(self.config.encoder or DEFAULT_ENCODER, backbone.device)
        self._shared = isinstance(self.query, SentenceQuery) and self.query.shares(backbone)
        self.config = complete_for(self.config, self.query.width)
        self._new_router = router_of(self.config, self.query, backbone.device)
        first_layer = self.config.first_layer or 0
        self.modules = backbone.find_linears(self.config.targets or (), first_layer)
        self.widths = backbone.widths(self.modules)
        trunk = self.query if isinstance(self.query, TrunkQuery) else None
        self._injection = Injection(backbone, self.modules, first_layer, trunk)
        self._label_words: dict[int, dict[str, str]] = {}  # by id of the task, as long as that exists
        self.set_tasks([])

    @property
    def about(self) -> dict[str, Any]:
        """What all tasks in a store of this model share. To open it, all of this but `backbone` must agree."""
        config = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.config).items()}
        config = {key: value for key, value in config.items() if value or key not in WHEN_SET}
        about = {"backbone": self.backbone.name, "fingerprint": self.backbone.fingerprint, "config": config}
        about |= {"shapes": self.shapes, "tokens": self.backbone.tokens, "settings": self.backbone.settings}
        if isinstance(self.query, SentenceQuery):
            about |= {f"encoder_{name}": getattr(self.query, name) for name in ("fingerprint", "tokens", "settings")}
        return about

    # Tasks

    @property
    def shapes(self) -> dict[str, Any]:
        """The shapes that a task's tensors must fit: a manifest's `shapes`."""
        hidden = self.backbone.width if self.backbone.kind == "encoder" else None
        layers = {name: list(widths) for name, widths in self.widths.items()}
        return {"layers": layers, "hidden": hidden, "query": self.query.width + (self.config.features or 0)}

    def check_fits(self, task: LearnedTask) -> None:
        """Raise WorkError unless a task fits this model."""
        check_fits(task, self.shapes, asdict(self.config))

    def set_tasks(self, tasks: Sequence[LearnedTask], kept: Kept = NOTHING) -> None:
        """Replace the known tasks. Pool and router change together, at the very end. kept: as for `Router.load`."""
        with self.lock:
            self.carry(tasks)
            pool = pool_of(tasks, self.backbone.device, self.backbone.dtype, self._device_memory, self.config.k or 1)
            self._known = Known(pool, self.new_router(pool.tasks, kept), self._device_memory)

    def carry(self, tasks: Sequence[LearnedTask]) -> None:
        """Put increments in those layers outside of `modules` that imported tasks adapt, if any."""
        known = set(self.modules)
        for task in tasks:
            new = [name for name in task.values if name not in known]
            if not new:
                continue
            with self.lock:  # no pass runs while layers are replaced
                there = self.backbone.widths(sorted(self.backbone.adaptable.intersection(new)))
                for name in new:
                    if there.get(name) != task.shape.widths[name]:
                        raise WorkError(
                            f"task {task.name!r}: values.{name}: the backbone has no such layer of such widths"
                        )
                self._injection.adapt(new)
            known.update(new)

    @property
    def ahead(self) -> bool:
        """Whether routes must be found before a pass, by one through the bare lower layers: because an imported task
        changes layers below the last tap, reads another prompt, or has a head although the backbone generates text."""
        pool = self.pool
        if pool.imported is None or self.config.taps is None:
            return False
        if pool.ahead is None:
            lower = tuple(f"{self.backbone.family.layers}.{i}." for i in range(self.config.taps[-1]))
            pool.ahead = self.backbone.kind == "causal" or any(name.startswith(lower) for name in pool.values)
        return pool.ahead

    @contextmanager
    def changing(self, *, add: Sequence[LearnedTask] = (), remove: Sequence[str] = ()) -> Iterator[Router]:
        """Add and remove tasks at the end of the block, if it succeeds, at the cost of those tasks alone. Yields the
        new router.

        Everything that can fail is done before the block, in which the change can be committed.

        Raises InputError if a name to add is taken, or one to remove is not there.
        """
        with self.lock:
            self.carry(add)
            known = self._known.changed(add=add, remove=remove)
            yield known.router
            self._known = known

    @contextmanager
    def pinned(self, known: Known | None = None) -> Iterator[None]:
        """Fix this thread's tasks to these, or the current ones, whatever other threads learn and forget meanwhile."""
        before = getattr(self._pinned, "known", None)
        self._pinned.known = known or before or self._known
        try:
            yield
        finally:
            self._pinned.known = before

    @property
    def known(self) -> Known:
        return getattr(self._pinned, "known", None) or self._known

    @property
    def pool(self) -> Pool:
        return self.known.pool

    @property
    def router(self) -> Router:
        return self.known.router

    def new_router(self, tasks: Sequence[LearnedTask] = (), kept: Kept = NOTHING) -> Router:
        """A configured router over these tasks' slots. kept: as for `Router.load`."""
        router = replace(self._new_router)
        router.load({task.name: task.router for task in tasks}, self.backbone.device, kept)
        return router

    def label_of(self, task: LearnedTask, text: str) -> str | None:
        """The task's label that a generated text stands for; None if there is none."""
        if task.labels is None:
            return None
        words = self._label_words.get(id(task))
        if words is None:
            longest = task.options.get("max_length") or self.config.max_length or 0
            words = self._label_words[id(task)] = self.backbone.tokenization.label_words(task.labels, longest)
            weakref.finalize(task, self._label_words.pop, id(task), None)
        return words.get(text)

    # From text to tokens

    def tokenize(self, rows: Sequence[Row]) -> list[Reading]:
        """Tokenise rows, each text once. One thread may call this while another uses the model."""
        return read_rows(rows, self.backbone.tokenization, self.query, self.config, shared=self._shared)

    def collate(self, readings: Sequence[Reading]) -> Encoded:
        """Rows as one batch, in CPU memory."""
        return collated(readings, self.backbone.tokenization)

    # Queries and routes

    @torch.no_grad()  # not inference_mode: training saves these queries for backward
    def queries(self, rows: Sequence[Row], *, batch_size: int = 32, report: Report | None = None) -> Tensor:
        """Queries [N, D] float32 of rows, without running the layers above the last tap."""
        texts = [row.query_text(self.config.route_on) for row in rows]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with self.lock:
            found = torch.empty(len(texts), self.query.width, device=self.backbone.device)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                found[chosen] = self._query_texts([texts[i] for i in chosen])
                if report is not None:
                    report(len(chosen))
        return found

    def find_queries(self, batch: Encoded) -> Tensor:
        """Queries [B, D] of a batch, through only the layers below the last tap, or the sentence encoder.

        Raises InputError for a batch of tokens if a sentence encoder needs texts.
        """
        inputs = batch.query_inputs
        if not inputs:
            if isinstance(self.query, SentenceQuery) and not self._shared:
                raise InputError(
                    "batch: a sentence query is found from texts; make the batch with `tokenize`, `collate`"
                )
            return self._query_tokens(batch)
        if isinstance(inputs[0], str):
            return self._query_texts([text for text in inputs if isinstance(text, str)])
        tokens = [ids for ids in inputs if not isinstance(ids, str)]
        return self._query_tokens(self.backbone.tokenization.collate(tokens).to(self.backbone.device))

    def find_routes(self, batch: Encoded, *, slot_mask: Tensor | None = None, abstain: float | None = None) -> Route:
        """Routes [B, K] of a batch, through only the layers below the last tap, or the sentence encoder.

        Args and errors: as for `forward`.
        """
        with self.lock:
            if self.pool.slots == 0:
                return self.empty_route(len(batch))
            return self.route(self.find_queries(batch), slot_mask, abstain)

    def route(
        self, query: Tensor, slot_mask: Tensor | None = None, abstain: float | None = None, *, check: bool = True
    ) -> Route:
        """The route of queries [B, D]. `slot_mask`, `abstain`: as for `forward`. `check`: as for `Router.route`; raises
        NotFinite, which names the row, if a query is not finite."""
        with self.lock:
            route = self.pool.settled(self.router.route(query, slot_mask, check=check))
            return route if abstain is None else emptied(route, self.distance(query, route) > abstain)

    def distance(self, query: Tensor, route: Route) -> Tensor:
        """Distances of queries [B, D] from the tasks of their best slots, [B] float32 (see `Router.distance`)."""
        rounding = max(ALIKE, torch.finfo(self.backbone.dtype).eps)
        with self.lock:
            return self.router.distance(query, route.slot_ids[:, 0].clamp(min=0), rounding).to(query.device)

    def empty_route(self, batch: int) -> Route:
        """A route without increments: the bare backbone."""
        ids = torch.full((batch, 1), -1, device=self.backbone.device)
        return Route(ids, torch.zeros(batch, 1, device=ids.device))

    def _query_texts(self, texts: Sequence[str]) -> Tensor:
        with self.lock:
            if isinstance(self.query, SentenceQuery):
                return self.query.encode(texts).to(self.backbone.device)
        return self._query_tokens(self.backbone.tokenization.encode(texts, self.config.max_length or 0))

    def _query_tokens(self, batch: Encoded) -> Tensor:
        with self.lock:
            if isinstance(self.query, SentenceQuery):
                return self.query.encode_tokens(batch)
            context = ForwardContext(batch.attention_mask, {}, stop="query")
            self._injection.run(lambda: self.trunk(batch), context)
        assert context.query is not None
        return context.query

    # Through the backbone

    def forward(
        self,
        batch: Encoded,
        route: Route | None = None,
        *,
        slot_mask: Tensor | None = None,
        abstain: float | None = None,
        values: Values | None = None,
        states: Tensor | None = None,
    ) -> Output:
        """The trunk's last hidden states of a batch of mixed tasks, each row adapted by its own route.

        Args:
            batch: on the backbone's device.
            route: [B, K]. None: found during the pass (or before it, if the batch or a task needs that).
            slot_mask: [B, P] bool, allowed slots, for an oracle task ID.
            abstain: rows farther from their task than this fraction of its training rows get an empty route (ids -1).
            values: LoRA matrices that the ids of a given route refer to. Default: the pool's.
            states: [B, T, H] from `lower_states`, to skip the frozen lower layers; only with a given route.

        Raises:
            NotFinite: a row's query is not finite; it names the row.
            InputError: the batch is one of tokens, but a sentence encoder needs texts.
        """
        with self.lock:
            if route is None and (batch.query_inputs or self.ahead or isinstance(self.query, SentenceQuery)):
                route = self.find_routes(batch, slot_mask=slot_mask, abstain=abstain)
            result, query, found = self.call(
                lambda: self.trunk(batch),
                batch.attention_mask,
                route,
                slot_mask=slot_mask,
                abstain=abstain,
                values=values,
                states=states,
            )
        return Output(result, query, found)

    def call(
        self,
        function: Callable[[], Any],
        mask: Tensor,
        route: Route | None = None,
        *,
        slot_mask: Tensor | None = None,
        abstain: float | None = None,
        values: Values | None = None,
        states: Tensor | None = None,
        check: bool = True,
    ) -> tuple[Any, Tensor | None, Route]:
        """`forward` for any call of the backbone, such as one with a cache or of `generate`.

        Args:
            function: calls the backbone.
            mask: [B, T], real tokens of its (first) pass. It may repeat rows for beams; a route found then does, too.
            route, slot_mask, abstain, values, states, check: as for `forward` and `route`.

        Returns:
            The function's result, the query, and the route.
        """
        with self.lock:
            pool = self.pool
            if route is None and pool.slots == 0:
                route = self.empty_route(len(mask))
            if route is None and (self.ahead or isinstance(self.query, SentenceQuery)):
                what = "query='sentence'" if self.config.query == "sentence" else "the tasks imported here"
                raise InputError(f"route: needed with {what}; `find_routes` finds it")

            def find_route(query: Tensor) -> Route:
                beams = len(query) // len(mask)
                allowed = None if slot_mask is None else slot_mask.repeat_interleave(beams, 0)
                return self.route(query, allowed, abstain, check=check)

            context = ForwardContext(mask, pool.values if values is None else values, route)
            if values is None:
                context.rows = pool.rows
            if route is None:
                context.find_route = find_route
            result = self._injection.run(function, context, states)
        assert context.route is not None
        return result, context.query, context.route

    @torch.no_grad()
    def lower_states(self, batch: Encoded, query_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of the lowest layer with increments, [B, T, H], and, with a trunk query, the queries [B, D], pooled
        over `query_mask` [B, T] on the way."""
        context = ForwardContext(query_mask, {}, stop="states")
        with self.lock:
            self._injection.run(lambda: self.trunk(batch), context)
        assert context.states is not None
        return context.states, context.query

    def trunk(self, batch: Encoded) -> Tensor:
        """The last hidden states [B, T, H], adapted inside `call`."""
        model, options = self.backbone.model, self.backbone.positions(batch.attention_mask)
        if self.backbone.kind == "seq2seq":
            model = model.get_encoder()
        elif self.backbone.kind == "causal":
            model, options = model.base_model, options | {"use_cache": False}  # without the output layer
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        hidden: Tensor = out.last_hidden_state
        return hidden
