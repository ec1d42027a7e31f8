"""Rows as the model reads them: the tokens of their prompts, and what their queries are found from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from slm_fast.data import Row
from slm_fast.errors import WorkError
from slm_fast.options import ModelConfig
from slm_fast.query import SentenceQuery, TrunkQuery
from slm_fast.tasks import Adapter
from slm_fast.tokenization import Encoded, Tokenization


class Reading(NamedTuple):
    """A row as the model reads it: the tokens of its prompt, and whether they were cut to fit.

    query_input: what its query has to be found from before the forward pass (tokens, or the text for an encoder with a
    tokenizer of its own); None where it is found on the way. A sentence encoder's query always goes ahead, the trunk's
    when an instruction stands in the prompt, because in the pass itself the input's tokens attend to it.
    """

    ids: list[int]
    truncated: bool
    query_input: list[int] | str | None


def read_rows(
    rows: Sequence[Row],
    tokenization: Tokenization,
    query: TrunkQuery | SentenceQuery,
    config: ModelConfig,
    *,
    shared: bool,
) -> list[Reading]:
    """Rows as tokens, each text tokenised once. shared: a sentence encoder reads the same tokens as the backbone."""
    longest = config.max_length or 0
    texts, queries = [row.prompt for row in rows], [row.query_text(config.route_on) for row in rows]
    if isinstance(query, SentenceQuery) and shared and texts == queries and not config.chat_template:
        encoder_longest = query.longest or longest
        ids, cut = tokenization.tokenize(texts, max(longest, encoder_longest))
        return [
            Reading(tokenization.shorten(row, longest), lost or len(row) > longest, short)
            for row, lost, short in zip(
                ids, cut, (tokenization.shorten(row, encoder_longest) for row in ids), strict=True
            )
        ]
    inputs: dict[int, list[int] | str]
    if isinstance(query, SentenceQuery):
        inputs = dict(enumerate(queries))
    else:
        # Of a chat only the input's own words are looked at.
        other = [i for i, text in enumerate(texts) if queries[i] != text or config.chat_template]
        inputs = dict(zip(other, tokenization.tokenize([queries[i] for i in other], longest)[0], strict=True))
    ids, cut = prompts_of(rows, tokenization, config, longest)
    return [Reading(row, lost, inputs.get(i)) for i, (row, lost) in enumerate(zip(ids, cut, strict=True))]


def prompts_of(
    rows: Sequence[Row], tokenization: Tokenization, config: ModelConfig, max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """The tokens of rows' prompts, cut to `max_length`, and which were cut."""
    if not isinstance(config.chat_template, str):
        return tokenization.tokenize([row.prompt for row in rows], max_length)
    found = [_chat(row, tokenization, config.chat_template, max_length) for row in rows]
    return [ids for ids, _ in found], [cut for _, cut in found]


def _chat(row: Row, tokenization: Tokenization, template: str, max_length: int) -> tuple[list[int], bool]:
    """A row as a user's turn. Its instruction is the system's or, where there is no text or no such turn in the
    template, stands in the user's."""
    if row.instruction and row.text:
        with suppress(WorkError):
            return tokenization.tokenize_chat(row.instruction, row.text, template, max_length)
    return tokenization.tokenize_chat("", row.prompt, template, max_length)


def collated(readings: Sequence[Reading], tokenization: Tokenization) -> Encoded:
    """Rows as one batch, still in the processor's memory."""
    inputs: list[list[int] | str] = []
    if any(reading.query_input is not None for reading in readings):
        inputs = [reading.ids if reading.query_input is None else reading.query_input for reading in readings]
    ids, truncated = [reading.ids for reading in readings], [reading.truncated for reading in readings]
    return tokenization.collate(ids, truncated, inputs, padding_side=tokenization.padding_side)


def reread(
    rows: Sequence[Row],
    adapters: Sequence[Adapter | None],
    batch: Encoded,
    tokenization: Tokenization,
    max_length: int,
) -> Encoded:
    """A causal backbone's batch of rows, where those of an imported task read the prompt of its adapter; the others,
    whose adapter is None, what the batch has."""
    if not any(adapters):
        return batch
    ids = [
        row[real.bool()].tolist() for row, real in zip(batch.input_ids.cpu(), batch.attention_mask.cpu(), strict=True)
    ]
    cut = list(batch.truncated) or [False] * len(rows)
    for i, (row, adapter) in enumerate(zip(rows, adapters, strict=True)):
        if adapter is not None:
            ids[i], cut[i] = prompt_of(row, adapter, tokenization, max_length)
    return tokenization.collate(ids, cut, padding_side=tokenization.padding_side).to(batch.input_ids.device)


def prompt_of(row: Row, adapter: Adapter, tokenization: Tokenization, max_length: int) -> tuple[list[int], bool]:
    """The tokens that an imported task's adapter reads of a row, and whether they were cut to fit."""
    if adapter.chat_template is not None:
        return tokenization.tokenize_chat(row.instruction, row.text, adapter.chat_template, max_length)
    ids, cut = tokenization.tokenize([row.prompt], max_length, separator=adapter.prompt == "separator")
    return ids[0], cut[0]
