"""One step of generation: the logits after the last token of each running row.

The KV cache is static: key and value states are in buffers of a fixed size, with a place for each row and a column for
each token. All rows write the same column at the same time. A row begins in the column that lets its prompt end where
the others are now; columns to the left of it are masked.

On a CPU a step reads exactly what is in use. On a GPU its kernels finish faster than Python can launch them, so there
steps have few different shapes: places and columns in use are rounded up, unused ones are masked, and everything that
changes between steps is in buffers. The second step of each shape is captured as a CUDA graph, which is replayed from
then on.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_fast.batching import rounded
from slm_fast.cuda_graphs import Step, graphs_on
from slm_fast.errors import one_line
from slm_fast.memory import zeros
from slm_fast.model import AdaptedModel
from slm_fast.ops import Route

COLUMNS = 64  # columns are rounded up to a multiple of this or, if larger, of an eighth of the next power of two


class Shape(NamedTuple):
    """What a step reads: of the first `places`, columns `first` to `stop` - 1 of what is written, and the first
    `inputs` columns of T5's inputs."""

    places: int
    first: int
    stop: int
    inputs: int


class KVCacheLayer:
    """One layer's key and value states, [places, heads, columns, width] each: of what is written or (T5) of what was
    read.

    A layer of transformers' cache passes them to attention.
    """

    def __init__(self, decoder: Decoder, layer: Any, columns: int, *, written: bool) -> None:
        self.decoder, self.written = decoder, written
        states = layer.keys, layer.values
        self.buffers = [
            zeros(decoder.places, x.shape[1], columns, x.shape[3], device=x.device, dtype=x.dtype) for x in states
        ]
        layer.update, layer.get_seq_length = self.update, decoder.columns_before

    def serve(self, layer: Any, shape: Shape) -> None:
        """Point the cache's layer at the buffers: at all columns that are written, or at the T5 inputs that this shape
        reads."""
        columns = slice(None) if self.written else slice(shape.inputs)
        layer.keys, layer.values = (buffer[: shape.places, :, columns] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the key and value states [places, heads, 1, width] of this step, and return all that attention
        reads."""
        shape, column = self.decoder.shape, self.decoder.column
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            if self.decoder.rounded:
                buffer[: shape.places].index_copy_(2, column, new)
            else:
                buffer[: shape.places, :, shape.stop - 1 : shape.stop] = new
        key_states, value_states = (buffer[: shape.places, :, shape.first : shape.stop] for buffer in self.buffers)
        return key_states, value_states

    def join(self, place: int, column: int, key_states: Tensor, value_states: Tensor) -> None:
        """Write the key and value states of new rows, [B, heads, T, width], at a place and a column."""
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            # A step multiplies masked values by zero, which a NaN left by this place's previous row would survive.
            buffer[place : place + len(new)] = 0
            buffer[place : place + len(new), :, column : column + new.shape[2]] = new

    def keep(self, order: Sequence[int]) -> None:
        for place, row in enumerate(order):
            if place != row:
                for buffer in self.buffers:
                    buffer[place] = buffer[row]

    def move(self, live: int, used: slice, by: int) -> None:
        for buffer in self.buffers:
            buffer[:live, :, used.start + by : used.stop + by] = buffer[:live, :, used].clone()


def layers_of(past: Any, causal: bool) -> list[Any]:
    """The layers of transformers' cache: those of what is written, then (T5) those of what was read."""
    if causal:
        return list(past.layers)
    return [*past.self_attention_cache.layers, *past.cross_attention_cache.layers]


def capacity_of(columns: int) -> int:
    """Columns of the buffers for rows of at most `columns`, so many that they rarely have to be moved back."""
    return columns + columns // 2


def row_bytes(past: Any, causal: bool, columns: int, input_columns: int) -> int:
    """Bytes of one row's buffers. Args: as for `Decoder`."""
    layers, size = layers_of(past, causal), 0
    for i, layer in enumerate(layers):
        written = causal or i < len(layers) // 2
        for x in (layer.keys, layer.values):
            size += x.shape[1] * x.shape[3] * x.itemsize * (capacity_of(columns) if written else input_columns)
    return size


class Decoder:
    """Rows that run together, at most `places`.

    Columns `first` to `end` - 1 are in use, and all rows write column `end` next. The first `inputs` columns of T5's
    inputs are in use.
    """

    def __init__(self, model: AdaptedModel, places: int, columns: int, input_columns: int, past: Any) -> None:
        """Create buffers like the key and value states of a first prefill. Its cache object will pass them to the
        model.

        Args:
            columns: maximum columns of a row.
            input_columns: maximum length of T5's inputs.
            past: cache of a pass with use_cache=True.
        """
        self.model, self.lm = model, model.backbone.model
        self.places, self.input_capacity, self.past = places, input_columns, past
        self.capacity = capacity_of(columns)
        self.causal, self.device = model.backbone.kind == "causal", model.backbone.device
        # Paged values need Python in every step.
        self.graphs = graphs_on(self.device) if model.known.most_rows is None else None
        self.starts: list[int] = []  # first column of each running row
        self.input_lengths: list[int] = []  # and the length of its T5 input
        self.first = self.end = self.inputs = 0
        self.shape = Shape(0, 0, 0, 0)

        dtype = self.lm.dtype
        self.tokens = torch.zeros(places, 1, dtype=torch.int64, device=self.device)  # last token of each row
        self.begins = torch.zeros(places, 1, dtype=torch.int64, device=self.device)  # `starts`
        self.numbers = torch.arange(self.capacity, device=self.device)  # column numbers
        self.column = torch.zeros(1, dtype=torch.int64, device=self.device)  # `end`
        self.masked = torch.finfo(dtype).min
        # For the columns before a row's first, and for T5's inputs.
        self.mask = torch.zeros(places, 1, 1, self.capacity, dtype=dtype, device=self.device)
        self.input_mask = torch.full((places, 1, 1, input_columns), self.masked, dtype=dtype, device=self.device)
        self.route = Route(torch.empty(0), torch.empty(0))  # [places, K]; ids are -1 where no row runs
        layers = layers_of(past, self.causal)
        own = len(layers) if self.causal else len(layers) // 2
        self.layers = [KVCacheLayer(self, layer, self.capacity, written=True) for layer in layers[:own]]
        self.layers += [KVCacheLayer(self, layer, input_columns, written=False) for layer in layers[own:]]
        self.replays: dict[Shape, Step | None] = {}  # captured step of each shape met so far

    def close(self) -> None:
        """Release the buffers, which would otherwise live until Python's next collection of cycles."""
        self.layers, self.past = [], None
        self.replays.clear()

    @property
    def live(self) -> int:
        return len(self.starts)

    @property
    def rounded(self) -> bool:
        """Whether steps have rounded shapes."""
        return self.graphs is not None

    def columns_before(self, *_: Any) -> int | Tensor:
        """Number of columns that a step reads before the one it writes."""
        return self.column if self.rounded else self.end - self.shape.first

    # Adding and removing rows

    def join(self, past: Any, lengths: Sequence[int], route: Route, inputs: Tensor | None = None) -> None:
        """Let prefilled rows run with the others, in the next free places.

        Args:
            past: cache of their prefill.
            lengths: number of tokens of each; for T5, of its decoder (1).
            route: [B, K].
            inputs: mask [B, T] of T5's inputs.
        """
        place, width, live = self.live, max(lengths), self.live + len(lengths)
        if not place:
            self.end = width
        elif width > self.end:
            self._move(width - self.end)
        for columns, layer in zip(self.layers, layers_of(past, self.causal), strict=True):
            columns.join(place, self.end - width if columns.written else 0, layer.keys, layer.values)
        if inputs is not None:
            mask = self.input_mask[place:live]
            mask.fill_(self.masked)[..., : inputs.shape[1]].masked_fill_(inputs[:, None, None].bool(), 0.0)
            self.input_lengths += inputs.sum(1).tolist()
        if self.route.slot_ids.numel() == 0:
            ids, weights = (part.new_zeros(self.places, part.shape[1]) for part in route)
            self.route = Route(ids.fill_(-1), weights)
        for buffer, new in zip(self.route, route, strict=True):
            buffer[place:live] = new
        self.starts += [self.end - length for length in lengths]
        self._look_again()

    def keep(self, order: Sequence[int]) -> None:
        """Rows have ended: move the row of place order[i], which is i or a place beyond those that stay, to place i."""
        live = len(order)
        for layer in self.layers:
            layer.keep(order)
        for buffer in (self.tokens, self.input_mask, *self.route):
            buffer[:live] = buffer[order]
        self.route.slot_ids[live:], self.route.weights[live:] = -1, 0.0
        self.starts = [self.starts[i] for i in order]
        self.input_lengths = self.input_lengths and [self.input_lengths[i] for i in order]
        self._look_again()

    def _look_again(self) -> None:
        """Recompute which columns are in use, so that no others are read."""
        self.first, self.inputs = min(self.starts, default=0), max(self.input_lengths, default=0)
        begins = self.starts + [self.first] * (self.places - self.live)
        self.begins.copy_(torch.tensor(begins)[:, None])
        self.mask.zero_().masked_fill_((self.numbers < self.begins)[:, None, None], self.masked)

    def _move(self, by: int) -> None:
        """Move all columns in use right by `by`, or left if negative."""
        used = slice(self.first, self.end)
        for layer in self.layers:
            if layer.written:
                layer.move(self.live, used, by)
        self.starts = [start + by for start in self.starts]
        self.end += by
        self._look_again()

    # Steps

    def step(self) -> Tensor:
        """Logits [live, V] after the last token of each row, whose key and value states are written to the next
        column."""
        if self.end == self.capacity or self._saves_by_moving():
            self._move(-self.first)
        logits = self._logits()
        self.end += 1
        return logits[: self.live, -1]

    def _shape(self) -> Shape:
        if not self.rounded:
            return Shape(self.live, self.first, self.end + 1, self.inputs)
        places = min(1 << (self.live - 1).bit_length(), self.places)
        stop = min(round_up(self.end + 1), self.capacity)
        return Shape(places, 0, stop, min(round_up(self.inputs), self.input_capacity))

    def _saves_by_moving(self) -> bool:
        """Whether a step of a rounded shape reads fewer columns if those in use are moved left first."""
        return self.rounded and round_up(self.end + 1 - self.first) < min(round_up(self.end + 1), self.capacity)

    def _logits(self) -> Tensor:
        before, self.shape = self.shape, self._shape()
        if (self.shape.places, self.shape.inputs) != (before.places, before.inputs):
            for columns, layer in zip(self.layers, layers_of(self.past, self.causal), strict=True):
                columns.serve(layer, self.shape)
        step = functools.partial(self._forward, self.shape)
        if self.graphs is None:
            return step()
        self.column.fill_(self.end)
        try:
            if self.shape not in self.replays:  # this also compiles kernels, which must not happen in a capture
                self.replays[self.shape] = None
                with self.graphs.trial():
                    return step()
            replay = self.replays[self.shape] = self.replays[self.shape] or self.graphs.capture(step)
        except RuntimeError as error:
            self.graphs = None
            warnings.warn(f"writing without CUDA graphs, which is slower: {one_line(error)}", stacklevel=2)
            return self._logits()  # a repeated step overwrites what it wrote
        return replay()

    def _forward(self, shape: Shape) -> Tensor:
        """Logits [places, 1, V]. Everything that changes between steps of one shape is in buffers, and nothing waits
        for the device, so this can be captured."""
        places, now = shape.places, self.column if self.rounded else self.end
        mask = self.mask[:places, ..., shape.first : shape.stop]
        if self.rounded:
            mask = mask.masked_fill(self.numbers[: shape.stop] > now, self.masked)
        inputs: dict[str, Any]
        if self.causal:
            inputs = {"input_ids": self.tokens[:places], "attention_mask": mask}
            inputs["position_ids"] = now - self.begins[:places]
        else:
            # The layers have the states of the inputs, and use only the shape of the encoder's output.
            states = torch.zeros(1, 1, 1, dtype=mask.dtype, device=self.device)
            inputs = {
                "decoder_input_ids": self.tokens[:places],
                "decoder_attention_mask": mask,
                "encoder_outputs": (states.expand(places, shape.inputs, self.model.backbone.width),),
                "attention_mask": self.input_mask[:places, ..., : shape.inputs],
            }
        route = Route(self.route.slot_ids[:places], self.route.weights[:places])
        if not self.rounded and self.device.type == "cpu" and not bool((route.slot_ids >= 0).any()):
            route = Route(route.slot_ids[:, :0], route.weights[:, :0])  # the bare model's rows alone
        out, _, _ = self.model.call(lambda: self.lm(**inputs, past_key_values=self.past, use_cache=True), mask, route)
        logits: Tensor = out.logits
        return logits


def round_up(columns: int) -> int:
    """Round a number of columns up by less than COLUMNS or less than a quarter, so that few shapes cover many
    lengths."""
    return rounded(columns, COLUMNS, 8)
