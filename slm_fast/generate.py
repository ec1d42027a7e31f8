"""Text generation for many prompts: a loop over the scheduler, or transformers' own `generate`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError, RowsFailed
from slm_fast.identity import OVERRULED
from slm_fast.model import AdaptedModel, Report
from slm_fast.ops import Route
from slm_fast.options import PredictOptions
from slm_fast.scheduler import Generated, Request, Sampling, Scheduler
from slm_fast.tokenization import Encoded


@dataclass(frozen=True)
class Written:
    """Generated answers to N prompts.

    Attributes:
        texts, tokens: generated text of each row, and its token ids.
        scores: mean probability of each row's tokens.
        finish_reasons: "stop" or "length" (see `Generated`), or "error", of each row.
        route: [N, K] that the rows were generated with.
        failed: rows without an answer, and why. Their texts and routes are empty.
    """

    texts: list[str]
    tokens: list[list[int]]
    scores: list[float]
    finish_reasons: list[str | None]
    route: Route
    failed: dict[int, str]


def tail_of(stops: Sequence[str]) -> int:
    """How many of the last tokens can hold a stop string: a letter may take four (its bytes), and a string may begin
    within a token. Reading all tokens after each would be quadratic."""
    return 4 * max(map(len, stops), default=0) + 8


@torch.inference_mode()
def generate(
    model: AdaptedModel,
    batch: Encoded,
    options: PredictOptions,
    *,
    seeds: Sequence[int],
    max_rows: int,
    route: Route | None = None,
    slot_mask: Tensor | None = None,
    ends: Sequence[Collection[int]] = (),
    report: Report | None = None,
    enough: Callable[[Sequence[int]], bool] | None = None,
) -> Written:
    """Generate an answer to each of N prompts.

    Args:
        batch: [N, T], left-padded for causal backbones.
        seeds: one per row, so that its samples do not depend on the rows it runs with.
        max_rows: how many rows run together.
        route: [N, K], if known. None: found in the prefill, among `slot_mask` [N, P], with `options.abstain`.
        ends: further end tokens of each row, besides the backbone's; () for none.
        report: called with the number of rows that have just ended.
        enough: called with a row's tokens so far; stops the row if it returns True. Not called for rows that go to
            transformers' `generate`.

    Raises:
        InputError: the answers may need more positions than the backbone embeds.
    """
    report = report or (lambda _: None)
    limit, before = model.backbone.learned_positions, 1
    if model.backbone.kind == "causal":
        before = int(batch.attention_mask.sum(1).max()) if len(batch) else 1
    if limit is not None and before + options.max_new_tokens > limit:
        raise InputError(
            f"max_new_tokens: expected at most {limit - before} (this backbone has {limit} positions, of which the "
            f"longest prompt takes {before}), got {options.max_new_tokens}"
        )
    with model.lock:
        if options.beams == 1 and is_plain(model, batch.input_ids.shape[1] + options.max_new_tokens):
            found = _scheduled(model, batch, options, seeds, max_rows, route, slot_mask, ends, report, enough)
        else:
            found = _with_transformers(model, batch, options, seeds, max_rows, route, slot_mask, ends, report)
    tokens = [row.tokens for row in found]
    texts = model.backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Written(
        [text.strip() for text in texts],
        tokens,
        [row.score for row in found],
        [row.finish_reason for row in found],
        _together(model, [row.route for row in found]),
        {i: row.error for i, row in enumerate(found) if row.error is not None},
    )


def is_plain(model: AdaptedModel, longest: int) -> bool:
    """Whether the scheduler generates what transformers' `generate` would for this checkpoint.

    It supports only generation_config settings that are overridden anyway (no repetition penalty, no forced tokens).
    """
    lm = model.backbone.model
    window = getattr(lm.config, "sliding_window", None)
    return (
        model.backbone.family.loop
        and set(lm.generation_config.to_diff_dict()) <= OVERRULED
        and lm.config._attn_implementation in ("sdpa", "eager")
        and (window is None or longest <= window)
    )


def _longest_first(batch: Encoded) -> tuple[list[int], list[int]]:
    """The lengths of the rows, and the rows in order of decreasing length."""
    lengths: list[int] = batch.attention_mask.sum(1).tolist()
    return lengths, sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _scheduled(
    model: AdaptedModel,
    batch: Encoded,
    options: PredictOptions,
    seeds: Sequence[int],
    max_rows: int,
    route: Route | None,
    slot_mask: Tensor | None,
    ends: Sequence[Collection[int]],
    report: Report,
    enough: Callable[[Sequence[int]], bool] | None,
) -> list[Generated]:
    lengths, order = _longest_first(batch)
    rows, real = batch.input_ids.tolist(), batch.attention_mask.bool().tolist()
    scheduler = Scheduler(
        model,
        max_rows=min(max_rows, max(len(rows), 1)),
        max_prompt=max(lengths, default=1),
        max_new_tokens=options.max_new_tokens,
    )
    number = {}
    for i in order:
        request = Request(
            [token for token, is_real in zip(rows[i], real[i], strict=True) if is_real],
            options.max_new_tokens,
            Sampling(options.temperature, options.top_p, seeds[i]) if options.sample else None,
            None if route is None else Route(route.slot_ids[i], route.weights[i]),
            None if slot_mask is None else slot_mask[i],
            options.abstain_share,
            ends=frozenset(ends[i]) if ends else frozenset(),
        )
        number[scheduler.add_request(request)] = i
    found = [Generated() for _ in rows]
    try:
        while scheduler.unfinished:
            ended = scheduler.step()
            if enough is not None:
                for running, row in list(scheduler.generated.items()):
                    if row.tokens and enough(row.tokens) and scheduler.cancel(running):
                        ended[running] = replace(row, finish_reason="stop")
            for request_number, written in ended.items():
                found[number[request_number]] = written
            if ended:
                report(len(ended))
    finally:
        scheduler.close()
    return found


def _with_transformers(
    model: AdaptedModel,
    batch: Encoded,
    options: PredictOptions,
    seeds: Sequence[int],
    max_rows: int,
    route: Route | None,
    slot_mask: Tensor | None,
    ends: Sequence[Collection[int]],
    report: Report,
) -> list[Generated]:
    """Generate whole rows with transformers' `generate`: for beam search, unusual settings, and families that the
    scheduler does not support."""
    lengths, order = _longest_first(batch)
    found, waiting = [Generated() for _ in lengths], deque(order)
    most = 1 if options.sample else max_rows  # transformers samples a whole batch with one generator
    while waiting:
        rows = [waiting.popleft() for _ in range(min(most, len(waiting)))]
        width, causal = max(lengths[i] for i in rows), model.backbone.kind == "causal"
        real = slice(batch.input_ids.shape[1] - width, None) if causal else slice(width)
        encoded = Encoded(batch.input_ids[rows, real], batch.attention_mask[rows, real])
        known = route and Route(route.slot_ids[rows], route.weights[rows])
        allowed = None if slot_mask is None else slot_mask[rows]
        try:
            own = [ends[i] for i in rows] if ends else [()] * len(rows)
            written = _generated(model, encoded, options, seeds[min(rows)], known, allowed, own)
        except RowsFailed as error:  # the others go back to the queue
            failed = [rows[i] for i in error.among(len(rows))]
            for i in failed:
                found[i] = Generated(finish_reason="error", error=error.reason)
            waiting.extendleft(row for row in reversed(rows) if row not in failed)
            report(len(failed))
            continue
        for row, one in zip(rows, written, strict=True):
            found[row] = one
        report(len(rows))
    return found


def _generated(
    model: AdaptedModel,
    batch: Encoded,
    options: PredictOptions,
    seed: int,
    route: Route | None,
    slot_mask: Tensor | None,
    own_ends: Sequence[Collection[int]],
) -> list[Generated]:
    lm, tokenizer, kind = model.backbone.model, model.backbone.tokenizer, model.backbone.kind
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "num_beams": options.beams}
    settings["do_sample"] = options.sample
    if options.sample:  # NaN logits show in the score and must not break sampling
        settings |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        settings |= {"remove_invalid_values": True}
    with torch.random.fork_rng(enabled=options.sample):
        if options.sample:
            torch.manual_seed(seed)
        out, _, found = model.call(
            lambda: lm.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                return_dict_in_generate=True,
                output_logits=True,
                pad_token_id=tokenizer.pad_token_id,
                **settings,
            ),
            batch.attention_mask,
            route,
            slot_mask=slot_mask,
            abstain=options.abstain_share,
        )
    beams = getattr(out, "beam_indices", None)
    log_probability = lm.compute_transition_scores(out.sequences, out.logits, beams, normalize_logits=True)
    steps = log_probability.shape[1]
    tokens = out.sequences[:, -steps:] if kind == "causal" else out.sequences[:, 1 : 1 + steps]
    ends, repeated = set(model.backbone.end_tokens().tolist()), len(found.slot_ids) // len(batch)
    rows = []
    for i, (words, chances) in enumerate(zip(tokens.tolist(), log_probability.exp().tolist(), strict=True)):
        row = Generated(route=Route(found.slot_ids[i * repeated], found.weights[i * repeated]), finish_reason="length")
        for token, chance in zip(words, chances, strict=True):
            row.tokens.append(token)
            row.probability += chance
            if token in ends or token in own_ends[i]:
                row.finish_reason = "stop"
                break
        rows.append(row)
    return rows


def _together(model: AdaptedModel, routes: Sequence[Route | None]) -> Route:
    """Stack the rows' routes to [N, K], with an empty route for rows that have none."""
    if not routes:
        return model.empty_route(0)
    empty = model.empty_route(1)
    known = next((route for route in routes if route is not None), Route(empty.slot_ids[0], empty.weights[0]))
    none = Route(torch.full_like(known.slot_ids, -1), torch.zeros_like(known.weights))
    found = [route or none for route in routes]
    return Route(torch.stack([route.slot_ids for route in found]), torch.stack([route.weights for route in found]))
