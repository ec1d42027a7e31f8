"""Passes of encoder-only backbones as CUDA graphs.

A GPU finishes a small batch before Python has launched its kernels. So a batch is padded to one of a few shapes
(`batching.few_shapes`). The first batch of a shape is captured, including the search for routes, and every later one is
launched at once.
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

MOST_SHAPES = 64  # graphs kept; the least recently used one is dropped


class EncoderOutput(NamedTuple):
    """Result of a pass: `model.Output`, and what heads read."""

    mean: Tensor  # [B, H] float32, mean of the last hidden states of real tokens
    hidden: Tensor | None  # [B, T, H], last hidden states; None if no head reads them
    query: Tensor | None  # [B, D]; None if the route was given or there are no tasks
    route: Route  # [B, K]
    checked: bool  # whether all queries are known to be finite


class Shape(NamedTuple):
    """Shape of a graph's inputs. picks: K of a given route, else 0. slots: width of a slot mask, else 0."""

    rows: int
    columns: int
    picks: int
    slots: int


@dataclass
class Buffers:
    """Inputs of a graph, on the device. Columns beyond the batch are padding. So are rows beyond it, except that their
    first token counts as real, so that nothing becomes NaN."""

    batch: Encoded
    route: Route | None
    slot_mask: Tensor | None

    @classmethod
    @torch.inference_mode(False)  # so that they can be filled in any mode
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
    """The graphs of one model, for its current tasks."""

    def __init__(self) -> None:
        self._pool: weakref.ref[Pool] | None = None  # weak, so that the values of a forgotten task are freed at once
        self.graphs: Graphs | None = None
        self.met: OrderedDict[Shape, tuple[Buffers, Step | None]] = OrderedDict()

    def forward(
        self, model: AdaptedModel, batch: Encoded, route: Route | None, slot_mask: Tensor | None
    ) -> EncoderOutput | None:
        """The result of the module's `forward`; None if a graph cannot compute it."""
        if self._pool is None or self._pool() is not model.pool:  # what graphs read of the last one may be freed
            self._pool, self.graphs = weakref.ref(model.pool), graphs_on(model.backbone.device)
            self.met.clear()
            return None  # the first pass prepares what all tasks share
        shape = self._shape(model, batch, route, slot_mask)
        if self.graphs is None or shape is None:
            return None
        padding = model.backbone.tokenization.tokenizer.pad_token_id or 0
        buffers, replay = self.met.get(shape) or (Buffers.of(shape, padding, model.backbone.device), None)
        buffers.fill(batch, padding, route, slot_mask)
        (rows, columns), step = batch.input_ids.shape, lambda: _pass(model, buffers)
        try:
            if replay is None:  # the trial also compiles kernels, which a capture cannot
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
        # Copied, because all graphs share memory.
        mean, ids, weights, *others = (part[:rows].clone() for part in found)
        hidden = others.pop()[:, :columns] if _reads_hidden(model) else None
        return EncoderOutput(mean, hidden, others.pop() if others else None, Route(ids, weights), route is not None)

    def _shape(
        self, model: AdaptedModel, batch: Encoded, route: Route | None, slot_mask: Tensor | None
    ) -> Shape | None:
        """The shape that the batch is padded to; None if a graph cannot or need not serve it."""
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
    """Whether the head of an imported task may read other features than the mean."""
    return model.pool.heads is not None and bool(model.pool.heads.imported)


def _pass(model: AdaptedModel, buffers: Buffers) -> tuple[Tensor, ...]:
    """The mean, the route and, if there are any, the query and the hidden states that heads read. (Hidden states are
    large, and a graph keeps all of its results.)"""
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
    """`AdaptedModel.forward` for prediction. Encoder-only backbones on a GPU use CUDA graphs.

    If the result is not `checked`, the caller must check that the queries are finite.
    """
    with model.lock:
        found = None
        if model.backbone.kind == "encoder":
            found = _graphs.setdefault(model, EncoderGraphs()).forward(model, batch, route, slot_mask)
        if found is not None:
            return found
        hidden, query, route = model.forward(batch, route, slot_mask=slot_mask)
    return EncoderOutput(TrunkQuery.pool(hidden, batch.attention_mask), hidden, query, route, True)
