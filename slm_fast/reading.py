"""Rows as the model reads them: tokens of their prompts, and inputs for their queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from slm_fast.data import Row
from slm_fast.errors import RowsFailed, WorkError
from slm_fast.options import ModelConfig
from slm_fast.query import SentenceQuery, TrunkQuery
from slm_fast.tasks import Adapter
from slm_fast.tokenization import Encoded, Tokenization


class Reading(NamedTuple):
    """A row as the model reads it.

    Attributes:
        ids: tokens of its prompt.
        truncated: whether they were cut to fit.
        query_input: input for its query before the forward pass: tokens, or text for an encoder with its own tokenizer.
            None if the query is found during the pass. A sentence encoder's query is always found before it; a trunk
            query is if the prompt has an instruction, because during the pass the input's tokens would attend to it.
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
    """Tokenise rows, each text once. shared: whether a sentence encoder reads the same tokens as the backbone."""
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
        # In a chat the query is that of the input alone.
        other = [i for i, text in enumerate(texts) if queries[i] != text or config.chat_template]
        inputs = dict(zip(other, tokenization.tokenize([queries[i] for i in other], longest)[0], strict=True))
    ids, cut = prompts_of(rows, tokenization, config, longest)
    return [Reading(row, lost, inputs.get(i)) for i, (row, lost) in enumerate(zip(ids, cut, strict=True))]


def prompts_of(
    rows: Sequence[Row], tokenization: Tokenization, config: ModelConfig, max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """Tokens of the rows' prompts, cut to `max_length`, and which were cut."""
    if not isinstance(config.chat_template, str):
        return tokenization.tokenize([row.prompt for row in rows], max_length)
    found = [_chat(row, tokenization, config.chat_template, max_length) for row in rows]
    return [ids for ids, _ in found], [cut for _, cut in found]


def _chat(row: Row, tokenization: Tokenization, template: str, max_length: int) -> tuple[list[int], bool]:
    """A row as the turns of a chat: those that it has, or one of the user's. Its instruction is the system turn.

    If there is no text or the template has no system turn, the instruction is part of the first user turn. If the
    template refuses the turns, such as two of one speaker in succession, they are lines of one user turn.
    """
    *others, last = _ways(row)
    for system, turns in others:
        with suppress(WorkError):
            return tokenization.tokenize_chat(system, turns, template, max_length)
    return tokenization.tokenize_chat(*last, template, max_length)


def _ways(row: Row) -> Iterator[tuple[str, Sequence[tuple[str, str]]]]:
    """Ways to write a row as a chat, best first: the text of a system turn ("" for none), and the other turns."""
    if row.turns and row.instruction:
        yield row.instruction, row.turns
    if row.turns:
        first = [speaker for speaker, _ in row.turns].index("user")
        merged = "\n".join(filter(None, (row.instruction, row.turns[first][1])))
        yield "", [*row.turns[:first], ("user", merged), *row.turns[first + 1 :]]
    if row.instruction and row.text:
        yield row.instruction, [("user", row.text)]
    yield "", [("user", row.prompt)]


def collated(readings: Sequence[Reading], tokenization: Tokenization) -> Encoded:
    """Rows as one batch, in CPU memory."""
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
    """A causal backbone's batch in which rows of an imported task have its adapter's prompt. Rows whose adapter is None
    keep their tokens.

    Raises RowsFailed for the first row that a chat template cannot write.
    """
    if not any(adapters):
        return batch
    ids = [
        row[real.bool()].tolist() for row, real in zip(batch.input_ids.cpu(), batch.attention_mask.cpu(), strict=True)
    ]
    cut = list(batch.truncated) or [False] * len(rows)
    for i, (row, adapter) in enumerate(zip(rows, adapters, strict=True)):
        if adapter is not None:
            try:
                ids[i], cut[i] = prompt_of(row, adapter, tokenization, max_length)
            except WorkError as error:
                raise RowsFailed(str(error), [i], len(rows)) from None
    return tokenization.collate(ids, cut, padding_side=tokenization.padding_side).to(batch.input_ids.device)


def prompt_of(row: Row, adapter: Adapter, tokenization: Tokenization, max_length: int) -> tuple[list[int], bool]:
    """Tokens that an imported task's adapter reads of a row, and whether they were cut to fit."""
    if adapter.chat_template is not None:
        return _chat(row, tokenization, adapter.chat_template, max_length)
    ids, cut = tokenization.tokenize([row.prompt], max_length, separator=adapter.prompt == "separator")
    return ids[0], cut[0]
