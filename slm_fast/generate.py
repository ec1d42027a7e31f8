"""Writing answers with T5 and LLaMA: one loop for rows of all tasks, each on its own route.

Rows wait in a queue, the longest prompts first, and up to `at_once` of them run together. A row's first pass (its
prefill) finds its route, which is kept for the whole text. Keys and values lie in buffers of a fixed size: a place for
each row and a column for each token, all rows writing the same column at the same time. A row begins in whichever
column lets its prompt end where the others are now; what stands left of that is masked. A row that has ended gives its
place to the last one, and when enough places are free, waiting rows are prefilled together and join.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slm_fast.backbones import Encoded
from slm_fast.model import AdaptedModel, Passage, Report
from slm_fast.ops import Route
from slm_fast.router import NotFinite

# Settings of a checkpoint's own generation_config that this loop honours, or that `options` overrules. With any other
# (a repetition penalty, forced tokens, ...) transformers' generate is used.
_HONOURED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache"),
    *(
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "num_beams",
        "max_length",
        "max_new_tokens",
        "cache_implementation",
    ),
    *("_from_model_config", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores"),
}


@dataclass(frozen=True)
class Written:
    """Texts, the mean probability of each one's tokens, and the routes [N, K] they were written on. failed: rows whose
    query is not finite; their texts and routes are empty."""

    texts: list[str]
    scores: list[float]
    route: Route
    failed: list[int]


@torch.inference_mode()
def generate(
    model: AdaptedModel,
    encoded: Encoded,
    options: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    at_once: int,
    route: Route | None = None,
    slot_mask: Tensor | None = None,
    abstain: float | None = None,
    report: Report | None = None,
) -> Written:
    """Write an answer to each of N prompts.

    Args:
        encoded: [N, T], padded on the left for causal backbones.
        options: of transformers' generate: max_new_tokens, num_beams, do_sample, temperature, top_p, top_k (0).
        seeds: one for each row, so that what is sampled for it does not depend on the rows it runs with.
        at_once: how many rows run together.
        route: [N, K] found ahead; None: found in the prefill, among `slot_mask` [N, P], with `abstain`.
        report: told how many rows have just ended.
    """
    queue = _Queue(model, encoded, options, seeds, route, slot_mask, abstain, report)
    if options["num_beams"] == 1 and _is_plain(model, encoded.input_ids.shape[1] + options["max_new_tokens"]):
        _Loop(queue, at_once).run()
    else:
        while rows := queue.take(at_once):
            with queue.putting_back(rows):
                queue.write(rows)
    return queue.written()


def _is_plain(model: AdaptedModel, longest: int) -> bool:
    """Whether the loop below does for this checkpoint what transformers' generate would."""
    lm = model.backbone.model
    window = getattr(lm.config, "sliding_window", None)
    return (
        set(lm.generation_config.to_diff_dict()) <= _HONOURED
        and lm.config._attn_implementation in ("sdpa", "eager")
        and (window is None or longest <= window)
    )


class _Queue:
    """The rows, what is known of each, and how passes of some of them begin."""

    def __init__(
        self,
        model: AdaptedModel,
        encoded: Encoded,
        options: Mapping[str, Any],
        seeds: Sequence[int],
        route: Route | None,
        slot_mask: Tensor | None,
        abstain: float | None,
        report: Report | None,
    ) -> None:
        self.report = report or (lambda _: None)
        self.model, self.encoded, self.options, self.seeds = model, encoded, options, seeds
        self.ahead, self.slot_mask, self.abstain = route, slot_mask, abstain
        self.lengths: list[int] = encoded.attention_mask.sum(1).tolist()
        self.waiting = deque(sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]))
        self.failed: list[int] = []
        self.tokens: list[list[int]] = [[] for _ in self.lengths]
        self.probability = [0.0] * len(self.lengths)  # summed over tokens
        self.routes: list[tuple[Tensor, Tensor] | None] = [None] * len(self.lengths)

    def take(self, most: int) -> list[int]:
        return [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]

    @contextmanager
    def putting_back(self, rows: list[int]) -> Iterator[None]:
        """A row that fails inside the block is noted, and the others wait again."""
        try:
            yield
        except NotFinite as error:
            beams = self.options["num_beams"] if self.model.backbone.kind == "causal" else 1  # T5's encoder knows none
            failed = rows[error.row // beams]
            self.failed.append(failed)
            self.report(1)
            self.waiting.extendleft(row for row in reversed(rows) if row != failed)

    def inputs(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Token ids and mask of rows, [B, T] with T their longest."""
        width = max(self.lengths[i] for i in rows)
        causal = self.model.backbone.kind == "causal"
        real = slice(self.encoded.input_ids.shape[1] - width, None) if causal else slice(width)
        return self.encoded.input_ids[rows, real], self.encoded.attention_mask[rows, real]

    def first_pass(self, rows: list[int], **inputs: Any) -> tuple[Any, Route]:
        """The backbone's output for rows that begin, and their route [B, K]."""
        mask = inputs["attention_mask"]
        passage = Passage(mask, None if self.slot_mask is None else self.slot_mask[rows], self.abstain)
        route = self.ahead and Route(self.ahead.slot_ids[rows], self.ahead.weights[rows])
        lm, call = self.model.backbone.model, inputs.pop("call", None)
        with self.model.passing(passage, self.model.pool.values, route):
            out = (call or lm)(**inputs)
        found = passage.route
        assert found is not None
        beams = len(found.slot_ids) // len(rows)
        found = Route(found.slot_ids[::beams], found.weights[::beams])
        for place, row in enumerate(rows):
            self.routes[row] = (found.slot_ids[place], found.weights[place])
        return out, found

    def write(self, rows: list[int]) -> None:
        """Rows from beginning to end with transformers' generate: for beams and unusual settings."""
        lm, tokenizer = self.model.backbone.model, self.model.backbone.tokenizer
        ids, mask = self.inputs(rows)
        sample = self.options["do_sample"]
        with torch.random.fork_rng(enabled=sample):
            if sample:
                torch.manual_seed(self.seeds[min(rows)])
            out, _ = self.first_pass(
                rows,
                call=lm.generate,
                input_ids=ids,
                attention_mask=mask,
                return_dict_in_generate=True,
                output_logits=True,
                pad_token_id=tokenizer.pad_token_id,
                **self.options,
            )
        beams = getattr(out, "beam_indices", None)
        log_probability = lm.compute_transition_scores(out.sequences, out.logits, beams, normalize_logits=True)
        steps = log_probability.shape[1]
        causal = self.model.backbone.kind == "causal"
        tokens = out.sequences[:, -steps:] if causal else out.sequences[:, 1 : 1 + steps]
        ends = set(self.model.backbone.end_tokens().tolist())
        for row, words, chances in zip(rows, tokens.tolist(), log_probability.exp().tolist(), strict=True):
            for token, chance in zip(words, chances, strict=True):
                self.note(row, token, chance)
                if token in ends:
                    break
        self.report(len(rows))

    def note(self, row: int, token: int, probability: float) -> int:
        """Keep a row's next token and its probability; how many tokens the row has now."""
        self.tokens[row].append(token)
        self.probability[row] += probability
        return len(self.tokens[row])

    def written(self) -> Written:
        texts = self.model.backbone.tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
        scores = [total / max(len(words), 1) for total, words in zip(self.probability, self.tokens, strict=True)]
        empty = self.model.empty_route(1)
        known = next((route for route in self.routes if route is not None), (empty.slot_ids[0], empty.weights[0]))
        none = torch.full_like(known[0], -1), torch.zeros_like(known[1])
        routes = [route or none for route in self.routes]
        route = self.model.empty_route(0)
        if routes:
            route = Route(torch.stack([ids for ids, _ in routes]), torch.stack([weights for _, weights in routes]))
        return Written([text.strip() for text in texts], scores, route, sorted(self.failed))


@dataclass
class _Row:
    """A row that runs: its number, the column its prompt begins in, and its source of chance."""

    number: int
    start: int
    generator: torch.Generator | None


class _Columns:
    """One layer's keys and values, [places, heads, columns, width] each: of what is written, or (T5) of what was read.

    `serve` lets a layer of transformers' cache give attention what is used of them: the rows that run, from the first
    column still in use to the one written now.
    """

    def __init__(self, loop: _Loop, layer: Any, columns: int, *, written: bool) -> None:
        self.loop, self.written = loop, written
        keys, values = layer.keys, layer.values
        self.buffers = [part.new_zeros(loop.at_once, part.shape[1], columns, part.shape[3]) for part in (keys, values)]

    @property
    def used(self) -> slice:
        return slice(self.loop.first, self.loop.end) if self.written else slice(self.loop.input_width)

    def serve(self, layer: Any) -> None:
        layer.update, layer.get_seq_length, layer.get_mask_sizes = self.update, self.length, self.mask_sizes
        layer.keys, layer.values = self.view(self.used)

    def view(self, columns: slice) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[: len(self.loop.rows), :, columns] for buffer in self.buffers)
        return keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.loop.end
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[: len(new), :, end : end + 1] = new
        return self.view(slice(self.loop.first, end + 1))

    def length(self) -> int:
        return self.used.stop - (self.used.start or 0)

    def mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length() + query_length, 0

    def join(self, place: int, column: int, keys: Tensor, values: Tensor) -> None:
        """Put the keys and values of new rows, [B, heads, T, width], from a place and a column on."""
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[place : place + new.shape[0], :, column : column + new.shape[2]] = new

    def replace(self, place: int, last: int) -> None:
        for buffer in self.buffers:
            buffer[place, :, self.used] = buffer[last, :, self.used]

    def move(self, by: int) -> None:
        live, first, end = len(self.loop.rows), self.loop.first, self.loop.end
        for buffer in self.buffers:
            buffer[:live, :, first + by : end + by] = buffer[:live, :, first:end].clone()


class _Loop:
    """Rows that run together. `first` and `end` bound the columns in use; `input_width` those of T5's inputs."""

    def __init__(self, queue: _Queue, at_once: int) -> None:
        self.queue, self.at_once = queue, min(at_once, max(len(queue.lengths), 1))
        self.model, self.lm = queue.model, queue.model.backbone.model
        self.device = self.model.backbone.device
        self.causal = self.model.backbone.kind == "causal"
        self.ends = set(self.model.backbone.end_tokens().tolist())
        self.longest: int = queue.options["max_new_tokens"]
        self.widest = self.longest + (max(queue.lengths, default=0) if self.causal else 1)
        self.capacity = self.widest + self.widest // 2  # so that columns are moved back only now and then
        self.rows: list[_Row] = []
        self.first = self.end = self.input_width = 0
        self.layers: list[_Columns] = []
        self.cache: Any = None
        self.tokens = torch.zeros(self.at_once, dtype=torch.int64, device=self.device)  # the last of each row
        self.route = self.model.empty_route(0)
        self.input_mask = torch.empty(0)
        # Of the rows that run, from `first` on: where each begins, and the mask of what stands to the left of it.
        self.starts = self.mask = torch.empty(0)

    def run(self) -> None:
        while self.queue.waiting or self.rows:
            free = self.at_once - len(self.rows)
            # Prefilling a few rows reads all weights, as a step of all rows does, so it waits until it pays.
            if self.queue.waiting and (not self.rows or 4 * free >= self.at_once):
                rows = self.queue.take(free)
                with self.queue.putting_back(rows):
                    self._join(rows)
            else:
                self._step()
        self.layers, self.cache = [], None  # they refer to this loop, which would keep the buffers alive

    def _join(self, numbers: list[int]) -> None:
        """Prefill rows that were waiting and let them run with the others."""
        ids, mask = self.queue.inputs(numbers)
        if self.causal:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            out, route = self.queue.first_pass(
                numbers,
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
            )
            width = ids.shape[1]
        else:
            start = self.lm.generation_config.decoder_start_token_id
            start = self.lm.config.decoder_start_token_id if start is None else start
            given = torch.full((len(numbers), 1), start, device=self.device)
            out, route = self.queue.first_pass(
                numbers, input_ids=ids, attention_mask=mask, decoder_input_ids=given, use_cache=True
            )
            width = 1
        if not self.rows:
            self.first, self.end = 0, width
        elif width > self.end:
            self._move(width - self.end)
        if self.cache is None:
            self._allocate(out.past_key_values)
        place = len(self.rows)
        for columns, layer in zip(self.layers, self._layers(out.past_key_values), strict=True):
            columns.join(place, self.end - width if columns.written else 0, layer.keys, layer.values)
        if not self.causal:
            self.input_mask[place : place + len(numbers)] = torch.finfo(self.input_mask.dtype).min
            self.input_mask[place : place + len(numbers), ..., : ids.shape[1]].masked_fill_(
                mask[:, None, None].bool(), 0.0
            )
        both = [(self.route, place), (route, len(numbers))] if place else [(route, len(numbers))]
        self.route = Route(
            torch.cat([part.slot_ids[:n] for part, n in both]), torch.cat([part.weights[:n] for part, n in both])
        )
        for number in numbers:
            chance = None
            if self.queue.options["do_sample"]:
                chance = torch.Generator(self.device).manual_seed(self.queue.seeds[number])
            start_column = self.end - (self.queue.lengths[number] if self.causal else 1)
            self.rows.append(_Row(number, start_column, chance))
        self._look_again()
        self._note(out.logits[:, -1], place)

    def _layers(self, past: Any) -> list[Any]:
        """The layers of transformers' cache: those of what is written, then (T5) those of what was read."""
        if self.causal:
            return list(past.layers)
        return [*past.self_attention_cache.layers, *past.cross_attention_cache.layers]

    def _allocate(self, past: Any) -> None:
        """Buffers like the keys and values of a first prefill; its cache object hands them to the model from now on."""
        layers, widest = self._layers(past), max(self.queue.lengths)
        own = len(layers) if self.causal else len(layers) // 2
        self.layers = [_Columns(self, layer, self.capacity, written=True) for layer in layers[:own]]
        self.layers += [_Columns(self, layer, widest, written=False) for layer in layers[own:]]
        self.input_mask = torch.zeros(self.at_once, 1, 1, widest, dtype=self.lm.dtype, device=self.device)
        self.cache = past

    def _step(self) -> None:
        """One token more for each row that runs."""
        live = len(self.rows)
        if self.end == self.capacity:
            self._move(-self.first)
        used = self.end - self.first
        mask = self.mask[..., : used + 1]
        tokens = self.tokens[:live, None]
        inputs: dict[str, Any]
        if self.causal:
            inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": used - self.starts}
        else:
            # The layers have the keys and values of the inputs, and ask the encoder's output for nothing but its shape.
            shape = (live, self.input_width, self.model.backbone.width)
            inputs = {
                "decoder_input_ids": tokens,
                "decoder_attention_mask": mask,
                "encoder_outputs": (torch.zeros(1, 1, 1, dtype=mask.dtype, device=self.device).expand(shape),),
                "attention_mask": self.input_mask[:live, ..., : self.input_width],
            }
        with self.model.passing(Passage(mask), self.model.pool.values, self.route):
            logits = self.lm(**inputs, past_key_values=self.cache, use_cache=True).logits
        self.end += 1
        self._note(logits[:, -1], 0)

    def _note(self, logits: Tensor, place: int) -> None:
        """Take the next token of the rows from `place` on, by their logits [B, V], and let those that end go."""
        logits = logits.float()
        tokens = self._choose(logits, self.rows[place:])
        chance = (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)).exp()
        self.tokens[place : place + len(tokens)] = tokens
        ended = []
        for row, token, probability in zip(self.rows[place:], tokens.tolist(), chance.tolist(), strict=True):
            words = self.queue.note(row.number, token, probability)
            if token in self.ends or words == self.longest:
                ended.append(place)
            place += 1
        if ended:
            self.queue.report(len(ended))
            self._drop(ended)

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> Tensor:
        """Token ids [B]: the likeliest, or each row's own draw (nucleus sampling, Holtzman et al. 2020)."""
        options = self.queue.options
        if not options["do_sample"]:
            return logits.argmax(1)
        scaled = logits / options["temperature"]
        if options["top_p"] < 1:
            ordered, token = scaled.sort(1)
            rare = ordered.softmax(1).cumsum(1) <= 1 - options["top_p"]
            rare[:, -1] = False
            scaled = scaled.masked_fill(rare.scatter(1, token, rare), -torch.inf)
        drawn = [
            torch.multinomial(chances, 1, generator=row.generator)
            for chances, row in zip(scaled.softmax(1), rows, strict=True)
        ]
        return torch.cat(drawn)

    def _drop(self, places: list[int]) -> None:
        """Give the places of rows that have ended to the last ones."""
        order = list(range(len(self.rows)))  # which row each place holds afterwards
        for place in reversed(places):
            last = len(self.rows) - 1
            if place != last:
                for layer in self.layers:
                    layer.replace(place, last)
                order[place], self.rows[place] = order[last], self.rows[last]
                if not self.causal:
                    self.input_mask[place] = self.input_mask[last]
            order.pop()
            self.rows.pop()
        self.tokens[: len(order)] = self.tokens[order]
        self.route = Route(self.route.slot_ids[order], self.route.weights[order])
        self._look_again()

    def _look_again(self) -> None:
        """Columns that no row uses any more are not read any more."""
        if self.rows:
            self.first = min(row.start for row in self.rows)
            self.starts = torch.tensor([[row.start - self.first] for row in self.rows], device=self.device)
            places = torch.arange(self.capacity + 1, device=self.device)
            self.mask = torch.zeros(len(self.rows), 1, 1, len(places), dtype=self.lm.dtype, device=self.device)
            self.mask.masked_fill_((places < self.starts)[:, None, None], torch.finfo(self.mask.dtype).min)
            self.input_width = 0 if self.causal else max(self.queue.lengths[row.number] for row in self.rows)
            for columns, layer in zip(self.layers, self._layers(self.cache), strict=True):
                columns.serve(layer)

    def _move(self, by: int) -> None:
        """Move all columns in use to the right, or to the left."""
        for layer in self.layers:
            if layer.written:
                layer.move(by)
        self.first, self.end = self.first + by, self.end + by
        for row in self.rows:
            row.start += by
