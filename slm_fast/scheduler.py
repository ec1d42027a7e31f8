"""Writing answers with T5 and LLaMA: one loop for rows of all tasks, each on its own route.

Rows wait in a queue, the longest prompts first, and up to `at_once` of them run together, a token a step (decode.py).
A row's first pass (its prefill) finds its route, which is kept for the whole text. A row that has ended gives its place
to the last one, and when enough places are free, waiting rows are prefilled together and join.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slm_fast.backbone import Encoded
from slm_fast.kv_cache import Decoder
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
    """A row that runs: its number, and its source of chance."""

    number: int
    generator: torch.Generator | None


class _Loop:
    """Rows that run together, and those that take the places of rows that have ended."""

    def __init__(self, queue: _Queue, at_once: int) -> None:
        self.queue, self.at_once = queue, min(at_once, max(len(queue.lengths), 1))
        self.model, self.lm = queue.model, queue.model.backbone.model
        self.device = self.model.backbone.device
        self.causal = self.model.backbone.kind == "causal"
        self.ends = set(self.model.backbone.end_tokens().tolist())
        self.longest: int = queue.options["max_new_tokens"]
        self.rows: list[_Row] = []
        self.decoder: Decoder | None = None

    def run(self) -> None:
        try:
            while self.queue.waiting or self.rows:
                free = self.at_once - len(self.rows)
                # Prefilling a few rows reads all weights, as a step of all rows does, so it waits until it pays.
                if self.queue.waiting and (not self.rows or 4 * free >= self.at_once):
                    rows = self.queue.take(free)
                    with self.queue.putting_back(rows):
                        self._join(rows)
                else:
                    assert self.decoder is not None
                    self._note(self.decoder.step(), 0)
        finally:
            if self.decoder is not None:
                self.decoder.close()

    def _join(self, numbers: list[int]) -> None:
        """Prefill rows that were waiting and let them run with the others."""
        ids, mask = self.queue.inputs(numbers)
        given: dict[str, Any]
        if self.causal:
            given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "logits_to_keep": 1}
        else:
            start = self.lm.generation_config.decoder_start_token_id
            start = self.lm.config.decoder_start_token_id if start is None else start
            given = {"decoder_input_ids": torch.full((len(numbers), 1), start, device=self.device)}
        out, route = self.queue.first_pass(numbers, input_ids=ids, attention_mask=mask, use_cache=True, **given)
        if self.decoder is None:
            longest = max(self.queue.lengths)
            columns = self.longest + (longest if self.causal else 1)
            self.decoder = Decoder(self.model, self.at_once, columns, longest, out.past_key_values)
        lengths = [self.queue.lengths[i] if self.causal else 1 for i in numbers]
        self.decoder.join(out.past_key_values, lengths, route, None if self.causal else mask)
        place, sample = len(self.rows), self.queue.options["do_sample"]
        for number in numbers:
            seed = self.queue.seeds[number]
            self.rows.append(_Row(number, torch.Generator(self.device).manual_seed(seed) if sample else None))
        self._note(out.logits[:, -1], place)

    def _note(self, logits: Tensor, place: int) -> None:
        """Take the next token of the rows from `place` on, by their logits [B, V], and let those that end go."""
        assert self.decoder is not None
        logits = logits.float()
        tokens = self._choose(logits, self.rows[place:])
        chance = (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)).exp()
        self.decoder.tokens[place : place + len(tokens), 0] = tokens
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
        assert self.decoder is not None
        order = list(range(len(self.rows)))  # which row each place holds afterwards
        for place in reversed(places):
            order[place] = order[-1]
            order.pop()
        self.rows = [self.rows[i] for i in order]
        self.decoder.keep(order)
