"""Continuous batching: text generation with T5 and LLaMA, rows of all tasks together, each on its own route.

Requests wait in a queue. Up to `max_rows` of them run together, one token per step (kv_cache.py). A row's first pass
(its prefill) finds its route, which is kept for the whole text. When a row ends, the last row takes its place. Waiting
rows are prefilled together and join once there are enough of them, or they have waited long enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError, RowsFailed
from slm_fast.kv_cache import Decoder, row_bytes
from slm_fast.model import AdaptedModel
from slm_fast.ops import Route

ROW_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio (Weyl sequence): rows of nearby seeds share no seed
SEED_BITS = (1 << 63) - 1


def row_seed(seed: int, row: int) -> int:
    """The seed of a row of a call with this seed, so that a row's samples depend on nothing else; row 0 has `seed`."""
    return (seed + row * ROW_STRIDE) & SEED_BITS if row else seed


@dataclass(frozen=True)
class Sampling:
    """How to sample a row's next token (nucleus sampling, Holtzman et al. 2020), with a seed of its own."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Request:
    """A prompt to be answered.

    Attributes:
        ids: tokens of the prompt.
        max_new_tokens: maximum tokens of the answer.
        sampling: None for greedy decoding.
        route: ([K], [K]) slot ids and weights, if known. None: found in the prefill, among the slots that `slot_mask`
            [P] allows (None: all), with `abstain` as in `AdaptedModel.forward`.
        ends: further end tokens, besides the backbone's.
        on_token: called with each token and its probability as soon as it is known. `step` raises what it raises.
    """

    ids: list[int]
    max_new_tokens: int = 64
    sampling: Sampling | None = None
    route: Route | None = None
    slot_mask: Tensor | None = None
    abstain: float | None = None
    on_token: Callable[[int, float], None] | None = None
    ends: frozenset[int] = frozenset()


@dataclass
class Generated:
    """What has been generated for a request.

    Attributes:
        tokens: token ids, including the one that ends the text.
        probability: sum of the tokens' probabilities.
        route: ([K], [K]) slot ids and weights; None before the prefill.
        finish_reason: "stop" (the text ended), "length" (`max_new_tokens` reached), "error", "cancelled", or None while
            the row waits or runs.
        error: why the row has no text, if its query is not finite or its task cannot be read.
    """

    tokens: list[int] = field(default_factory=list)
    probability: float = 0.0
    route: Route | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def score(self) -> float:
        """Mean probability of the tokens."""
        return self.probability / max(len(self.tokens), 1)


class Scheduler:
    """Runs rows together, and gives the places of rows that end to waiting ones.

    Methods take the model's lock. The model's tasks must not change while rows run: the caller holds that lock until
    the texts have ended, or otherwise prevents changes.

    Args:
        max_rows: how many rows run together.
        max_prompt, max_new_tokens: maximum prompt tokens and new tokens of a request.
        cache_bytes: maximum size of the KV cache; `max_rows` is lowered to what fits once a prompt has been read.

    Raises:
        InputError: a size is below 1, or the backbone does not generate text here.
    """

    def __init__(
        self,
        model: AdaptedModel,
        *,
        max_rows: int,
        max_prompt: int,
        max_new_tokens: int,
        cache_bytes: int | None = None,
    ) -> None:
        for name, size in (("max_rows", max_rows), ("max_prompt", max_prompt), ("max_new_tokens", max_new_tokens)):
            if size < 1:
                raise InputError(f"{name}: expected at least 1, got {size}")
        if model.backbone.kind == "encoder":
            raise InputError("model: expected a backbone that writes texts, got an encoder-only one")
        if not model.backbone.family.loop:
            kind = model.backbone.model.config.model_type
            raise InputError(f"model: rows of a {kind} backbone cannot take turns; `ScalableLM.predict` writes with it")
        self.model, self.lm, self.device = model, model.backbone.model, model.backbone.device
        self.max_rows, self.max_prompt, self.max_new_tokens = max_rows, max_prompt, max_new_tokens
        self.cache_bytes = cache_bytes
        self.cache_rows: int | None = None  # how many rows `cache_bytes` holds, once known
        self.causal = model.backbone.kind == "causal"
        self.ends = set(model.backbone.end_tokens().tolist())
        self.generated: dict[int, Generated] = {}  # of waiting and running requests
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._ended: dict[int, Generated] = {}  # not returned yet because a callback failed
        self._next = 0
        self._waited = 0  # steps, summed over the rows that wait
        self._decoder: Decoder | None = None

    @property
    def unfinished(self) -> int:
        """The number of requests that wait or run."""
        return len(self._waiting) + len(self._running)

    def add_request(self, request: Request) -> int:
        """Queue a request and return its number. Raises InputError if it does not fit."""
        if not 1 <= len(request.ids) <= self.max_prompt:
            raise InputError(f"ids: expected 1..{self.max_prompt} tokens, got {len(request.ids)}")
        if not 1 <= request.max_new_tokens <= self.max_new_tokens:
            raise InputError(f"max_new_tokens: expected 1..{self.max_new_tokens}, got {request.max_new_tokens}")
        if request.route is None and self.model.config.query == "sentence" and self.model.pool.slots:
            raise InputError("route: needed with query='sentence'; `model.find_routes` finds it")
        chance = None
        if request.sampling is not None:
            chance = torch.Generator(self.device).manual_seed(request.sampling.seed)
        with self.model.lock:
            number, self._next = self._next, self._next + 1
            self.generated[number] = Generated()
            self._waiting.append(_Row(number, request, self.generated[number], chance))
        return number

    @torch.inference_mode()
    def cancel(self, number: int) -> bool:
        """Remove a waiting or running request. Returns False if there is none of this number (any more)."""
        with self.model.lock:
            found = self.generated.pop(number, None)
            if found is None:
                return False
            found.finish_reason = "cancelled"
            self._waiting = deque(row for row in self._waiting if row.number != number)
            self._drop([place for place, row in enumerate(self._running) if row.number == number])
            return True

    @torch.inference_mode()
    def step(self) -> dict[int, Generated]:
        """Prefill waiting rows if that pays, else generate one token for each running row. Returns what has just ended.

        If an error is raised, nothing is lost: rows being prefilled go back to the queue, and what had ended is
        returned by the next step.
        """
        with self.model.lock:
            self._advance()
            ended, self._ended = self._ended, {}
            return ended

    def _advance(self) -> None:
        free = self.max_rows - len(self._running)
        if self._pays(free):
            self._waited = 0
            self._prefill(self._take(free))
        elif self._running:
            assert self._decoder is not None
            self._waited += len(self._waiting)
            self._note(self._decoder.step(), 0)

    def _pays(self, free: int) -> bool:
        """Whether to prefill now. That reads all weights, as a step does, and running rows wait meanwhile: so not until
        there are many new rows, or they have together waited for half as many steps as there are running rows."""
        waiting, running = len(self._waiting), len(self._running)
        if not waiting or not running:
            return waiting > 0
        return 4 * min(waiting, free) >= self.max_rows or (waiting <= free and 2 * self._waited >= running)

    def close(self) -> None:
        """Free the buffers and drop all waiting and running requests."""
        for kept in (self._waiting, self._running, self._ended, self.generated):
            kept.clear()
        self._waited = 0
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    def _take(self, most: int) -> list[_Row]:
        """Take the first waiting rows, as many as can be prefilled together."""
        rows: list[_Row] = []
        while self._waiting and len(rows) < most:
            first, row = (rows or self._waiting)[0].request, self._waiting[0].request
            if (row.abstain, row.route is None) != (first.abstain, first.route is None):
                break
            rows.append(self._waiting.popleft())
        return rows

    def _prefill(self, rows: list[_Row]) -> None:
        """Pass the prompts of waiting rows through the backbone, and let the rows join those that run."""
        try:
            logits = self._joined(rows)
        except RowsFailed as error:  # the others go back to the queue
            failed = [rows[i] for i in error.rows]
            self._waiting.extendleft(row for row in reversed(rows) if row not in failed)
            for row in failed:
                row.generated.error = error.reason
            self._finish([(row, "error") for row in failed])
            return
        except BaseException:
            self._waiting.extendleft(reversed(rows))
            raise
        place = len(self._running)
        self._running += rows
        self._note(logits, place)

    def _joined(self, rows: list[_Row]) -> Tensor:
        """The first logits of new rows, [B, V], whose keys and values are now in the cache."""
        out, route, mask = self._first_pass(rows)
        if self._decoder is None:
            columns = self.max_new_tokens + (self.max_prompt if self.causal else 1)
            if self.cache_bytes is not None:
                one = row_bytes(out.past_key_values, self.causal, columns, self.max_prompt)
                self.cache_rows = max(1, self.cache_bytes // one)
                self.max_rows = max(len(rows), min(self.max_rows, self.cache_rows))
            self._decoder = Decoder(self.model, self.max_rows, columns, self.max_prompt, out.past_key_values)
        lengths = [len(row.request.ids) if self.causal else 1 for row in rows]
        self._decoder.join(out.past_key_values, lengths, route, None if self.causal else mask)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _first_pass(self, rows: list[_Row]) -> tuple[Any, Route, Tensor]:
        """The backbone's output for new rows, their routes [B, K], and their attention mask [B, T]."""
        tokenization = self.model.backbone.tokenization
        encoded = tokenization.collate([row.request.ids for row in rows], padding_side=tokenization.padding_side)
        encoded = encoded.to(self.device)
        mask = encoded.attention_mask
        inputs: dict[str, Any] = {"input_ids": encoded.input_ids, "attention_mask": mask, "use_cache": True}
        if self.causal:
            inputs |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "logits_to_keep": 1}
        else:
            start = self.model.backbone.start_token
            inputs["decoder_input_ids"] = torch.full((len(rows), 1), start, device=self.device)
        known = [self._whole(row.request.route) for row in rows if row.request.route is not None]
        masks, abstain = _stack([row.request.slot_mask for row in rows]), rows[0].request.abstain
        route = Route(*(torch.stack(part) for part in zip(*known, strict=True))) if known else None
        if route is None and self.model.ahead:
            route = self.model.find_routes(encoded, slot_mask=masks, abstain=abstain)
        out, _, route = self.model.call(
            lambda: self.lm(**inputs),
            mask,
            route,
            slot_mask=masks,
            abstain=abstain,
        )
        for place, row in enumerate(rows):
            row.generated.route = Route(route.slot_ids[place], route.weights[place])
        return out, route, mask

    def _whole(self, route: Route) -> Route:
        """Pad a row's route [k] to the number of slots the model retrieves, so that rows with any routes can run
        together."""
        missing = max(0, (self.model.config.k or 0) - len(route.slot_ids))
        pad = torch.nn.functional.pad
        return Route(pad(route.slot_ids, (0, missing), value=-1), pad(route.weights, (0, missing)))

    def _note(self, logits: Tensor, place: int) -> None:
        """Choose the next token of the rows from `place` on from their logits [B, V], and remove those that end."""
        assert self._decoder is not None
        rows, logits = self._running[place:], logits.float()
        tokens = choose(logits, [row.request.sampling for row in rows], [row.chance for row in rows])
        chance = (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)).exp()
        self._decoder.tokens[place : place + len(tokens), 0] = tokens
        ended, places = [], []
        new = list(zip(rows, tokens.tolist(), chance.tolist(), strict=True))
        for row, token, probability in new:
            written = row.generated
            written.tokens.append(token)
            written.probability += probability
            stops = token in self.ends or token in row.request.ends
            if stops or len(written.tokens) == row.request.max_new_tokens:
                ended.append((row, "stop" if stops else "length"))
                places.append(place)
            place += 1
        self._drop(places)
        self._finish(ended)
        for row, token, probability in new:
            if row.request.on_token is not None and row.generated.finish_reason != "cancelled":
                row.request.on_token(token, probability)

    def _finish(self, ended: list[tuple[_Row, str]]) -> None:
        for row, reason in ended:
            row.generated.finish_reason = reason
            self._ended[row.number] = self.generated.pop(row.number)

    def _drop(self, places: list[int]) -> None:
        """Fill the places of rows that have ended with the last rows."""
        if not places:
            return
        assert self._decoder is not None
        order = list(range(len(self._running)))  # the row that each place holds afterwards
        for place in reversed(places):
            order[place] = order[-1]
            order.pop()
        self._running = [self._running[i] for i in order]
        self._decoder.keep(order)


@dataclass(eq=False)
class _Row:
    """A request with its number, its output so far and its random generator."""

    number: int
    request: Request
    generated: Generated
    chance: torch.Generator | None


def _stack(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Stack slot masks to [B, P], all True for rows without one. None if no row has one."""
    some = next((mask for mask in masks if mask is not None), None)
    if some is None:
        return None
    return torch.stack([torch.ones_like(some) if mask is None else mask for mask in masks])


def choose(logits: Tensor, sampling: Sequence[Sampling | None], chance: Sequence[torch.Generator | None]) -> Tensor:
    """The next token of each row [B] from logits [B, V]: greedy, or sampled with the row's own generator."""
    tokens = logits.argmax(1)
    drawn = [i for i, options in enumerate(sampling) if options is not None]
    if not drawn:
        return tokens
    options = [one for one in sampling if one is not None]
    scaled = logits if len(drawn) == len(logits) else logits[drawn]
    scaled = scaled / logits.new_tensor([[one.temperature] for one in options])
    if any(one.top_p < 1 for one in options):
        ordered, token = scaled.sort(1)
        rare = ordered.softmax(1).cumsum(1) <= logits.new_tensor([[1 - one.top_p] for one in options])
        rare[:, -1] = False
        scaled = scaled.masked_fill(rare.scatter(1, token, rare), -torch.inf)
    # NaN logits show in the score; they must not break sampling, and with it other rows.
    for row, chances in zip(drawn, scaled.softmax(1).nan_to_num(nan=1.0), strict=True):
        tokens[row] = torch.multinomial(chances, 1, generator=chance[row])[0]
    return tokens
