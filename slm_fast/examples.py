"""Training rows prepared once: token ids, and the output of the frozen layers below the increments.

Nothing below the lowest layer with increments ever changes, so its output for a training row is computed once, in the
pass that computes the row's query, and kept for all epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slm_fast.data import Task
from slm_fast.errors import InputError, warn
from slm_fast.model import AdaptedModel, Report
from slm_fast.ops import Route
from slm_fast.query import TrunkQuery
from slm_fast.reading import prompts_of
from slm_fast.tokenization import Encoded, pad

STATES_BYTES = 2 << 30  # larger hidden states are not kept; the lower layers then run in every step


@dataclass(frozen=True)
class Examples:
    """N training rows.

    Attributes:
        sequences: token ids that the trunk reads. For a causal backbone they end with the answer.
        answers: token ids of the answers or, for heads, one label index each.
        states: for each row the input [T, H] of the lowest layer with increments, on the backbone's device; None if not
            kept.
        route: [N, K] on the CPU, once known.
    """

    sequences: list[list[int]]
    answers: list[list[int]]
    states: list[Tensor] | None
    route: Route | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(sequence) for sequence in self.sequences])

    def encoded(self, model: AdaptedModel, rows: Sequence[int]) -> Encoded:
        """Token ids and mask [B, T] of the given rows, padded on the right."""
        ids, mask = pad([self.sequences[i] for i in rows], model.backbone.tokenizer.pad_token_id)
        return Encoded(ids, mask).to(model.backbone.device)

    def states_of(self, rows: Sequence[int]) -> Tensor | None:
        """States [B, T, H] of the given rows, zero after a row's end; None if not kept."""
        return None if self.states is None else pad_sequence([self.states[i] for i in rows], batch_first=True)


def prepare(
    model: AdaptedModel, task: Task, labels: Sequence[str] | None, max_length: int, report: Report | None = None
) -> tuple[Examples, Tensor]:
    """Tokenise a task's rows and run the frozen lower layers on them.

    Args:
        labels: labels of an encoder-only backbone's head.
        max_length: maximum tokens read per input.
        report: called with the number of rows just done.

    Returns:
        The examples and their queries [N, D].
    """
    backbone, rows = model.backbone, task.rows
    prompts, cut = prompts_of(rows, backbone.tokenization, model.config, max_length)
    if any(cut):
        warn(f"{_of(task, cut)} inputs are longer than max_length={max_length} tokens and are read up to there")
    if backbone.kind == "encoder":
        index = {label: i for i, label in enumerate(labels or ())}
        answers = [[index[row.target or ""]] for row in rows]
    else:
        answers = backbone.tokenization.encode_answers([row.target or "" for row in rows], max_length)
        _warn_of_answers(model, task, answers, max_length)
    causal = backbone.kind == "causal"
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)] if causal else prompts
    _check_positions(model, task, sequences if causal else answers)
    examples = Examples(sequences, answers, None)
    if not fits(model, sequences):
        return examples, model.queries(rows, report=report)
    # The pass for the states also yields the queries, unless these come from other text or another model.
    alike = all(row.query_text(model.config.route_on) == row.prompt for row in rows) and not model.config.chat_template
    shared = alike and max_length == model.config.max_length and isinstance(model.query, TrunkQuery)
    queries = torch.empty(len(rows), model.query.width, device=backbone.device)
    states: list[Tensor] = [queries] * len(rows)
    for batch in examples.lengths.argsort(stable=True).split(32):
        chosen = batch.tolist()
        together = examples.encoded(model, chosen)
        read = torch.tensor([len(prompts[i]) for i in chosen], device=backbone.device)
        prompt_mask = torch.arange(together.input_ids.shape[1], device=backbone.device) < read[:, None]
        entering, query = model.lower_states(together, prompt_mask)
        for i, state in zip(chosen, entering, strict=True):
            states[i] = state[: len(sequences[i])].clone()
        if shared:
            assert query is not None
            queries[chosen] = query
            if report is not None:
                report(len(chosen))
    if not shared:
        queries = model.queries(rows, report=report)
    return Examples(sequences, answers, states), queries


def _check_positions(model: AdaptedModel, task: Task, written: Sequence[Sequence[int]]) -> None:
    """Raise InputError if a row, with its answer, has more tokens than a generating backbone has positions."""
    limit = model.backbone.learned_positions
    if model.backbone.kind == "encoder" or limit is None:
        return
    for number, tokens in enumerate(written, 1):
        if len(tokens) > limit:
            raise InputError(
                f"task {task.name!r}: row {number} has {len(tokens)} tokens to learn, its answer's included, and this "
                f"backbone {limit} positions; set a smaller max_length"
            )


def _of(task: Task, some: Sequence[bool]) -> str:
    return f"task {task.name!r}: {sum(some)} of {len(some)}"


def _warn_of_answers(model: AdaptedModel, task: Task, answers: Sequence[Sequence[int]], max_length: int) -> None:
    """Warn of answers that cannot be learned exactly."""
    tokenizer = model.backbone.tokenizer
    cut = [answer[-1:] != [tokenizer.eos_token_id] for answer in answers]
    if any(cut):
        warn(f"{_of(task, cut)} answers are longer than max_length={max_length} tokens and are learned up to there")
    if task.labels is not None:
        return
    ends = set(model.backbone.end_tokens().tolist())
    early = [not ends.isdisjoint(answer[:-1]) for answer in answers]
    if any(early):
        warn(f"{_of(task, early)} answers hold a token that ends texts, such as {_example(task, early)}")
    unknown = [tokenizer.unk_token_id in answer for answer in answers]
    if any(unknown):
        warn(f"{_of(task, unknown)} answers hold what the tokenizer cannot write, such as {_example(task, unknown)}")
    texts = model.backbone.tokenization.decode(answers)
    said = [any(faults) for faults in zip(early, unknown, cut, strict=True)]
    other = [
        not known and text != (row.target or "").strip()
        for known, text, row in zip(said, texts, task.rows, strict=True)
    ]
    if any(other):
        text = texts[other.index(True)][:60]
        warn(f"{_of(task, other)} answers are written otherwise: {_example(task, other)} as {text!r}")


def _example(task: Task, some: Sequence[bool]) -> str:
    """The beginning of the first answer among these rows."""
    return repr((task.rows[some.index(True)].target or "")[:60])


def fits(model: AdaptedModel, sequences: Sequence[Sequence[int]]) -> bool:
    """Whether there are frozen lower layers and their output is small enough to keep. This does not depend on free
    memory, so that a run is reproducible bit for bit."""
    size = sum(map(len, sequences)) * model.backbone.width * model.backbone.dtype.itemsize
    return bool(model.config.first_layer) and size <= STATES_BYTES
