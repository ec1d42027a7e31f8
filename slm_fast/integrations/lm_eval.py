"""A store as a model of lm-evaluation-harness (EleutherAI): a LLaMA answers benchmarks with its learned tasks.

Each request is routed by its context, as `predict` would route that text, and scored or continued on that route.
Requests are tokenised as in lm-eval's class for Hugging Face models (`hf`), so a model without tasks gets the same
numbers. Scores are computed in float32 from the last hidden states of the scored positions; logits over the vocabulary
are never held for whole batches.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from slm_fast.batching import length_buckets, token_budget
from slm_fast.data import Row
from slm_fast.errors import InputError, WorkError, some_of
from slm_fast.generate import generate, tail_of
from slm_fast.ops import Route
from slm_fast.options import LARGEST, PredictOptions
from slm_fast.progress import bar
from slm_fast.scheduler import row_seed
from slm_fast.slm import ScalableLM

BARE = "(bare)"  # in place of a task's name, for requests answered without slots
POSITIONS = 512  # positions whose logits over the vocabulary are held at a time
LONGEST = 2048  # tokens of a text for a backbone without a limit, as in lm-eval
Tokens = list[int]


class Piece(NamedTuple):
    """Tokens to score, and the context before them. `text`: index of its text among those that have routes."""

    text: int
    context: Tokens
    continuation: Tokens


@register_model("slm-fast")
class StoreLM(TemplateLM):
    """An lm-eval model that answers with a store.

    Args:
        store: path of the store.
        slm: an open model, instead of `store`.
        backbone, device, dtype: as for `ScalableLM.from_pretrained`.
        batch_size: maximum rows per batch. None or "auto": a token budget that suits the device.
        max_batch_size: ignored.
        max_length: maximum tokens of a text, of which the last are read. Default: the backbone's limit.
        max_gen_toks: maximum new tokens if a request does not say.
        bare: use the bare backbone.
        task: oracle task ID for all requests.
        seed: of sampling; each request draws its own samples.
        abstain: use the bare backbone for requests farther from their task than this fraction of its training rows
            (True: 0.99).

    Attributes:
        routed: for each of lm-eval's tasks, the number of requests that went to each learned task.

    Raises:
        InputError: an argument is invalid, or the backbone is not a decoder.
        WorkError: the store is damaged.
    """

    def __init__(
        self,
        store: str | None = None,
        *,
        slm: ScalableLM | None = None,
        backbone: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        bare: bool = False,
        task: str | None = None,
        abstain: bool | float = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (store is None) == (slm is None):
            raise InputError("store: expected the path of a store, or an open model as slm, one of both")
        if slm is None:
            slm = ScalableLM.from_pretrained(str(store), backbone=backbone, device=device, dtype=dtype)
        self.slm, self.model = slm, slm.model
        if self.model.backbone.kind != "causal":
            kind = self.model.backbone.kind
            raise InputError(f"lm-eval: expected a decoder-only backbone such as LLaMA, this one is {kind}")
        if task is not None and task not in self.model.pool.place:
            raise InputError(f"task {task!r}: not learned; tasks: {some_of(self.model.pool.names)}")
        rows = None if batch_size in (None, "auto") else int(batch_size or 0)
        self.options = PredictOptions(
            batch_size=rows, max_new_tokens=max_gen_toks, bare=bare, abstain=abstain, seed=seed
        )
        self.batch_size, self.task = rows, task
        self.max_length = max_length or self.model.backbone.max_positions() or LONGEST
        if self.max_length < 2:
            raise InputError(f"max_length: expected at least 2, got {self.max_length}")
        self.tokenizer = self.model.backbone.tokenizer
        self._device = self.model.backbone.device
        self.routed: dict[str, Counter[str]] = {}

    # Tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens: Tokens = self.tokenizer.encode(string, **more)
        return tokens

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat in the backbone's template. Raises InputError if its tokenizer has none."""
        if self.tokenizer.chat_template is None:
            raise InputError("chat template: the backbone's tokenizer has none; evaluate without it")
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # Called by lm-eval

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs: list[tuple[str, str]] = [request.args for request in requests]
        numbers, routes = self._routes(
            requests, [context or continuation for context, continuation in pairs], quiet=disable_tqdm
        )
        pieces = [Piece(text, *self._split(*pair)) for pair, text in zip(pairs, numbers, strict=True)]
        found = self._score(pieces, routes, "scoring", quiet=disable_tqdm)
        for pair, answer in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts: list[str] = [request.args[0] for request in requests]
        numbers, routes = self._routes(requests, texts, quiet=disable_tqdm)
        pieces: list[Piece] = []
        owners: list[int] = []
        for owner, (string, text) in enumerate(zip(texts, numbers, strict=True)):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pieces += [Piece(text, *make_disjoint_window(window)) for window in windows]
            owners += [owner] * (len(pieces) - len(owners))
        found = [0.0] * len(texts)
        for owner, (score, _) in zip(owners, self._score(pieces, routes, "scoring", quiet=disable_tqdm), strict=True):
            found[owner] += score
        for string, score in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), score)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        contexts: list[str] = [request.args[0] for request in requests]
        numbers, routes = self._routes(requests, contexts, quiet=disable_tqdm)
        groups: dict[str, list[int]] = {}  # requests with the same generation options
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        found = [""] * len(contexts)
        with bar("writing", len(contexts), False if disable_tqdm else None) as advance:
            for rows in groups.values():
                asked = requests[rows[0]].args[1]
                chosen = _rows(routes, [numbers[i] for i in rows])
                seeds = [row_seed(self.options.seed, i) for i in rows]
                texts = self._write([contexts[i] for i in rows], chosen, asked, seeds, advance)
                for i, text in zip(rows, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", (contexts[i], asked), text)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Score ((context, continuation), their tokens). Required by lm-eval's base class."""
        numbers, routes = self._routes([], [pair[0] or pair[1] for pair, _, _ in requests], quiet=True)
        pieces = [Piece(text, *tokens) for (_, *tokens), text in zip(requests, numbers, strict=True)]
        return self._score(pieces, routes, "scoring", quiet=True)

    def get_model_info(self) -> dict[str, Any]:
        """Kept by lm-eval with its results: the model's identity, and how requests were routed."""
        backbone, store = self.model.backbone, self.slm.store or self.slm.source
        return {
            "model_dtype": str(backbone.dtype).removeprefix("torch."),
            "backbone": backbone.name,
            "backbone_fingerprint": backbone.fingerprint,
            "store": None if store is None else store.where,
            "store_tasks": [] if self.options.bare else self.slm.tasks,
            "routed": self.shares(),
        }

    def shares(self) -> dict[str, dict[str, float]]:
        """For each of lm-eval's tasks, the fraction of its requests answered by each learned task, or by none
        (`BARE`)."""
        found = {}
        for name, count in self.routed.items():
            total = sum(count.values())
            found[name] = {task: count[task] / total for task in sorted(count, key=lambda task: (-count[task], task))}
        return found

    # Implementation

    def _split(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """The tokens of a context and its continuation, split as in lm-eval."""
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _buckets(self, lengths: Sequence[int]) -> list[list[int]]:
        backbone = self.model.backbone
        budget = LARGEST["batch_tokens"]
        if self.batch_size is None:
            budget = token_budget(backbone.device.type, backbone.kind, backbone.width)
        return length_buckets(lengths, budget, self.batch_size)

    @torch.inference_mode()
    def _routes(self, requests: Sequence[Any], texts: Sequence[str], *, quiet: bool) -> tuple[list[int], Route]:
        """The index of each text among the distinct ones, and the routes [N, K] of these. Counts requests in
        `routed`."""
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        numbers = [place[text] for text in texts]
        pool, share = self.model.pool, self.options.abstain_share
        route = self.model.empty_route(len(place))
        if pool.slots and not self.options.bare and place:
            readings = self.model.tokenize([Row(text) for text in place])
            mask = None if self.task is None else pool.slots_of(self.task)
            found: list[tuple[Tensor, Tensor] | None] = [None] * len(readings)
            with bar("routing", len(readings), False if quiet else None) as advance:
                for chosen in self._buckets([len(reading.ids) for reading in readings]):
                    batch = self.model.collate([readings[i] for i in chosen]).to(self._device)
                    allowed = None if mask is None else mask.expand(len(chosen), -1)
                    part = self.model.find_routes(batch, slot_mask=allowed, abstain=share)
                    for i, ids, weights in zip(chosen, part.slot_ids, part.weights, strict=True):
                        found[i] = ids, weights
                    advance(len(chosen))
            both = [one for one in found if one is not None]
            route = Route(torch.stack([ids for ids, _ in both]), torch.stack([weights for _, weights in both]))
        winners = pool.task_weights(route).argmax(1).tolist() if pool.slots and len(place) else []
        empty = (route.slot_ids < 0).all(1).tolist()
        names = [BARE if none else pool.names[winners[i]] for i, none in enumerate(empty)]
        for request, number in zip(requests, numbers, strict=False):
            self.routed.setdefault(request.task_name or "", Counter())[names[number]] += 1
        return numbers, route

    @torch.inference_mode()
    def _score(self, pieces: Sequence[Piece], routes: Route, doing: str, *, quiet: bool) -> list[tuple[float, bool]]:
        """For each continuation, the sum of its tokens' log-probabilities, and whether all of them are greedy."""
        found = [(0.0, True)] * len(pieces)
        passes: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # pieces that differ at most in their last token
        for i, piece in enumerate(pieces):
            if len(piece.continuation) > self.max_length:
                raise WorkError(
                    f"request {i + 1}: its continuation has {len(piece.continuation)} tokens, max_length is "
                    f"{self.max_length}"
                )
            if piece.continuation:
                read = (piece.context + piece.continuation)[-(self.max_length + 1) : -1]
                passes.setdefault((piece.text, tuple(read)), []).append(i)
        keys, tokenization = list(passes), self.model.backbone.tokenization
        with bar(doing, len(keys), False if quiet else None) as advance, self.model.lock:
            for chosen in self._buckets([len(read) for _, read in keys]):
                batch = tokenization.collate([keys[i][1] for i in chosen]).to(self._device)
                hidden = self.model.forward(batch, _rows(routes, [keys[i][0] for i in chosen])).hidden
                asked = [(row, i) for row, key in enumerate(chosen) for i in passes[keys[key]]]
                states, said = [], []
                for row, i in asked:
                    end, last = len(keys[chosen[row]][1]), pieces[i].continuation
                    states.append(hidden[row, end - len(last) : end])
                    said.append(torch.tensor(last, device=self._device))
                scores, greedy = self._scores(torch.cat(states), torch.cat(said))
                parts = [each.split([len(part) for part in said]) for each in (scores, greedy)]
                for (_, i), score, best in zip(asked, *parts, strict=True):
                    found[i] = float(score.sum()), bool(best.all())
                advance(len(chosen))
        return found

    def _scores(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] and the tokens [N] after them -> log-probabilities [N] float32, and which tokens are
        greedy."""
        scores, greedy = [], []
        for states, said in zip(hidden.split(POSITIONS), tokens.split(POSITIONS), strict=True):
            logits = self.model.backbone.logits(states).float()
            scores.append(logits.gather(1, said[:, None])[:, 0] - logits.logsumexp(1))
            greedy.append(logits.argmax(1) == said)
        return torch.cat(scores), torch.cat(greedy)

    def _write(
        self, contexts: Sequence[str], route: Route, asked: Mapping[str, Any], seeds: Sequence[int], advance: Any
    ) -> list[str]:
        """Continue the contexts, up to the first stop string."""
        options, until = _generation(asked, self.options)
        room = self.max_length - options.max_new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks: expected fewer than max_length ({self.max_length}), got {options.max_new_tokens}"
            )
        until = list(dict.fromkeys([*until, self.tokenizer.decode(self.eot_token_id)]))
        tokenization = self.model.backbone.tokenization
        tokens = [self.tok_encode(context)[-room:] for context in contexts]
        batch = tokenization.collate(tokens, padding_side=tokenization.padding_side).to(self._device)
        each = batch.input_ids.shape[1] + options.max_new_tokens
        rows = self.batch_size or max(1, token_budget(self._device.type, "causal", self.model.backbone.width) // each)
        tail = tail_of(until)

        def enough(written: Sequence[int]) -> bool:
            said = self.tokenizer.decode(written[-tail:])
            return any(word in said for word in until)

        written = generate(
            self.model, batch, options, seeds=seeds, max_rows=rows, route=route, report=advance, enough=enough
        )
        said = self.tokenizer.batch_decode(written.tokens, skip_special_tokens=True)
        return [postprocess_generated_text(text, until, None) for text in said]


def _rows(route: Route, chosen: Sequence[int]) -> Route:
    rows = torch.tensor(chosen, dtype=torch.int64, device=route.slot_ids.device)
    return Route(route.slot_ids[rows], route.weights[rows])


def _generation(asked: Mapping[str, Any], options: PredictOptions) -> tuple[PredictOptions, list[str]]:
    """How to generate a request's text, and its stop strings.

    Raises:
        InputError: an option is not supported and would change the text.
    """
    given = dict(normalize_gen_kwargs(dict(asked), options.max_new_tokens))
    until = given.pop("until", None) or []
    sample = bool(given.pop("do_sample", False))
    drawn = {"temperature": given.pop("temperature", None), "top_p": given.pop("top_p", None)}
    changes: dict[str, Any] = {"max_new_tokens": given.pop("max_gen_toks"), "beams": given.pop("num_beams", 1)}
    if sample:
        changes |= {"sample": True} | {name: value for name, value in drawn.items() if value is not None}
    neutral = {"top_k": (None, 0), "repetition_penalty": (None, 1), "num_return_sequences": (None, 1)}
    for name, value in given.items():
        if value not in neutral.get(name, ()) and (sample or name != "top_k"):
            raise InputError(
                f"generation_kwargs: {name!r} is not understood; until, max_gen_toks, do_sample, temperature, top_p "
                "and num_beams are"
            )
    found = PredictOptions(**{**{"seed": options.seed}, **changes})
    return found, [until] if isinstance(until, str) else [word for word in until if word]
