"""Passes of encoder-only backbones as CUDA graphs.

A GPU is done with a small batch sooner than Python has launched its kernels. So a batch is padded to one of a few
shapes (`batching.few_shapes`); the first of a shape is captured, the search for its routes included, and every later
one is launched at once.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast.batching import few_shapes
from slm_fast.cuda_graphs import Graphs, Step, graphs_on
from slm_fast.errors import one_line
from slm_fast.model import AdaptedModel
from slm_fast.ops import Route, dispatch
from slm_fast.pool import Pool
from slm_fast.query import TrunkQuery
from slm_fast.tokenization import Encoded

MOST_SHAPES = 64  # kept; the one that was not used for longest goes first


class EncoderOutput(NamedTuple):
    """What a pass gives: `model.Output`, and what heads read of it."""

    mean: Tensor  # [B, H] float32, of the last hidden states of real tokens
    hidden: Tensor | None  # [B, T, H], all of them; None where no head reads them
    query: Tensor | None  # [B, D]; None where the route was given or no task is known
    route: Route  # [B, K]
    checked: bool  # whether all queries are known to be finite


class Shape(NamedTuple):
    """What a graph is for. picks: of routes that are given, else 0. slots: of a mask of slots, else 0."""

    rows: int
    columns: int
    picks: int
    slots: int


@dataclass
class Buffers:
    """What a graph reads, on the device. Rows and columns beyond those of a batch hold nothing that could become a
    number which is none: rows one token of padding, columns padding."""

    batch: Encoded
    route: Route | None
    slot_mask: Tensor | None

    @classmethod
    @torch.inference_mode(False)  # so that they may be filled in any mode
    def of(cls, shape: Shape, padding: int, device: torch.device) -> Buffers:
        ids = torch.full((shape.rows, shape.columns), padding, device=device)
        batch = Encoded(ids, torch.zeros_like(ids))
        route = slot_mask = None
        if shape.picks:
            none = torch.full((shape.rows, shape.picks), -1, device=device)
            route = Route(none, torch.zeros(none.shape, device=device))
        if shape.slots:
            slot_mask = torch.ones(shape.rows, shape.slots, dtype=torch.bool, device=device)
        return cls(batch, route, slot_mask)

    def fill(self, batch: Encoded, padding: int, route: Route | None, slot_mask: Tensor | None) -> None:
        rows, columns = batch.input_ids.shape
        ids, mask = self.batch.input_ids, self.batch.attention_mask
        ids[:, columns:], mask[:, columns:] = padding, 0
        ids[rows:], mask[rows:] = padding, 0
        mask[rows:, :1] = 1
        ids[:rows, :columns], mask[:rows, :columns] = batch.input_ids, batch.attention_mask
        for own, given in zip(self.route or (), route or (), strict=True):
            own[:rows] = given
        if self.slot_mask is not None and slot_mask is not None:
            self.slot_mask[:rows] = slot_mask


class EncoderGraphs:
    """The graphs of one model, of the tasks that it knows now."""

    def __init__(self) -> None:
        self._pool: weakref.ref[Pool] | None = None  # weakly: the values of a task that is forgotten go at once
        self.graphs: Graphs | None = None
        self.met: OrderedDict[Shape, tuple[Buffers, Step | None]] = OrderedDict()

    def forward(
        self, model: AdaptedModel, batch: Encoded, route: Route | None, slot_mask: Tensor | None
    ) -> EncoderOutput | None:
        """What the module's `forward` gives; None where it is not by a graph."""
        if self._pool is None or self._pool() is not model.pool:  # what graphs read of the last one may be gone
            self._pool, self.graphs = weakref.ref(model.pool), graphs_on(model.backbone.device)
            self.met.clear()
            return None  # the first pass prepares what concerns all tasks
        shape = self._shape(model, batch, route, slot_mask)
        if self.graphs is None or shape is None:
            return None
        padding = model.backbone.tokenization.tokenizer.pad_token_id or 0
        buffers, replay = self.met.get(shape) or (Buffers.of(shape, padding, model.backbone.device), None)
        buffers.fill(batch, padding, route, slot_mask)
        (rows, columns), step = batch.input_ids.shape, lambda: _pass(model, buffers)
        try:
            if replay is None:  # the trial also compiles kernels, which a capture must not
                with self.graphs.trial():
                    found = step()
                replay = self.graphs.capture(step)
            else:
                found = replay()
        except RuntimeError as error:
            self.graphs = None
            warnings.warn(f"passes without CUDA graphs, which are slower: {one_line(error)}", stacklevel=2)
            return None
        self.met[shape] = buffers, replay
        self.met.move_to_end(shape)
        if len(self.met) > MOST_SHAPES:
            self.met.popitem(last=False)
        # Of all graphs in the same memory.
        mean, ids, weights, *others = (part[:rows].clone() for part in found)
        hidden = others.pop()[:, :columns] if _reads_hidden(model) else None
        return EncoderOutput(mean, hidden, others.pop() if others else None, Route(ids, weights), route is not None)

    def _shape(
        self, model: AdaptedModel, batch: Encoded, route: Route | None, slot_mask: Tensor | None
    ) -> Shape | None:
        """What the batch is padded to; None for one that cannot be captured, or need not."""
        ahead = bool(batch.query_inputs) or model.ahead or not isinstance(model.query, TrunkQuery)
        if route is None and ahead:
            return None
        if torch.is_grad_enabled() or model.known.most_rows is not None or not batch.input_ids.numel():
            return None
        if dispatch.is_forced() or torch.is_autocast_enabled(model.backbone.device.type):
            return None
        rows, columns = few_shapes(*batch.input_ids.shape)
        limit = model.backbone.max_positions()
        columns = max(min(columns, limit or columns), batch.input_ids.shape[1])
        picks, slots = (0 if route is None else route.slot_ids.shape[1]), (0 if slot_mask is None else len(slot_mask.T))
        return Shape(rows, columns, picks, slots)


def _reads_hidden(model: AdaptedModel) -> bool:
    """Whether a head of a task that was imported may read other features than the mean."""
    return model.pool.heads is not None and bool(model.pool.heads.imported)


def _pass(model: AdaptedModel, buffers: Buffers) -> tuple[Tensor, ...]:
    """The mean, the route, and where there are such the query and hidden states that are read. (What a graph gives
    stays its own, and hidden states are large.)"""
    batch = buffers.batch
    hidden, query, route = model.call(
        lambda: model.trunk(batch), batch.attention_mask, buffers.route, slot_mask=buffers.slot_mask, check=False
    )
    mean = TrunkQuery.pool(hidden, batch.attention_mask)
    return mean, *route, *(() if query is None else (query,)), *((hidden,) if _reads_hidden(model) else ())


_graphs: weakref.WeakKeyDictionary[AdaptedModel, EncoderGraphs] = weakref.WeakKeyDictionary()


def forward(
    model: AdaptedModel, batch: Encoded, route: Route | None = None, slot_mask: Tensor | None = None
) -> EncoderOutput:
    """`AdaptedModel.forward` for rows that wait for their answers; of an encoder-only backbone on a GPU by CUDA graphs.

    The caller has to look whether queries are finite if what it gets is not `checked`.
    """
    with model.lock:
        found = None
        if model.backbone.kind == "encoder":
            found = _graphs.setdefault(model, EncoderGraphs()).forward(model, batch, route, slot_mask)
        if found is not None:
            return found
        hidden, query, route = model.forward(batch, route, slot_mask=slot_mask)
    return EncoderOutput(TrunkQuery.pool(hidden, batch.attention_mask), hidden, query, route, True)
