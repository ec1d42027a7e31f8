"""Text to tokens: encode, truncate, pad."""

from __future__ import annotations

import copy
import itertools
import threading
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_fast.errors import WorkError, one_line
from slm_fast.prefix import LEAST, PrefixReader


@dataclass(frozen=True)
class Encoded:
    """A tokenised batch.

    Attributes:
        input_ids, attention_mask: [B, T] int64.
        truncated: which texts were cut to fit.
        query_inputs: input for each row's query before the forward pass: tokens or, for an encoder with its own
            tokenizer, text. Empty if queries are found during the pass. See `AdaptedModel.tokenize`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    truncated: Sequence[bool] = ()
    query_inputs: Sequence[list[int] | str] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Encoded:
        if self.input_ids.device == device:
            return self
        ids, mask = (tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.attention_mask))
        return Encoded(ids, mask, self.truncated, self.query_inputs)

    def rows(self, chosen: Sequence[int]) -> Encoded:
        """A batch of some of its rows."""
        rows = list(chosen)
        return Encoded(
            self.input_ids[rows],
            self.attention_mask[rows],
            [self.truncated[i] for i in rows] if self.truncated else (),
            [self.query_inputs[i] for i in rows] if self.query_inputs else (),
        )


class Tokenization:
    """A backbone's tokenizer, as used for the model's inputs and outputs. Its methods are thread-safe.

    Attributes:
        padding_side: "left" for causal backbones, so that all prompts of a batch end together.
        separator: tokens that tell a causal backbone that the prompt ends and the answer begins.
        opening: tokens with which the backbone begins every generated answer (BART's forced_bos_token_id).
    """

    def __init__(self, tokenizer: Any, kind: str, device: torch.device, vocabulary: int | None = None) -> None:
        """vocabulary: number of ids that the model knows; special tokens beyond them are read as unknown."""
        self.tokenizer, self.device = tokenizer, device
        self.padding_side = "left" if kind == "causal" else "right"
        self.separator: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"] if kind == "causal" else []
        self.opening: list[int] = []
        # A tokenizer's settings cannot be changed while another thread uses it, so inputs have their own copy.
        self._reader = copy.deepcopy(tokenizer)
        self._reading = threading.Lock()
        known = tokenizer.get_vocab().values() if vocabulary is not None else ()
        self._beyond = {index for index in known if index >= (vocabulary or 0)}
        unknown = tokenizer.unk_token_id
        self._instead = tokenizer.pad_token_id if unknown is None or unknown in self._beyond else unknown
        self._prefixes: PrefixReader | None = None  # created for the first long text

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, so that an adapted model can be copied."""
        return {name: value for name, value in vars(self).items() if name != "_reading"} | {"_prefixes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _reading=threading.Lock())

    def encode(self, texts: Sequence[str], max_length: int, *, padding_side: str = "right") -> Encoded:
        """Tokenise, cut to `max_length` tokens (including a causal model's separator), and pad to the longest."""
        ids, cut = self.tokenize(texts, max_length)
        return self.collate(ids, cut, padding_side=padding_side).to(self.device)

    def tokenize(
        self, texts: Sequence[str], max_length: int, *, separator: bool = True
    ) -> tuple[list[list[int]], list[bool]]:
        """Tokens of each text, cut to `max_length` (including the separator, if wanted), and which texts were cut.

        Of a long text only as many characters are read as its first tokens need.
        """
        if not texts:
            return [], []
        ending = self.separator if separator else []
        room = max_length - len(ending)
        with self._reading:
            read = self._reader(
                [self._shorten(text, room) for text in texts],
                truncation=True,
                max_length=room,
                verbose=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            rows: list[list[int]] = read["input_ids"]
            if read.encodings is not None:
                cut = [len(row) >= room and bool(e.overflowing) for row, e in zip(rows, read.encodings, strict=True)]
            else:
                cut = [len(row) >= room and self._longer_than(t, room) for t, row in zip(texts, rows, strict=True)]
        if self._beyond:
            rows = [[self._instead if token in self._beyond else token for token in row] for row in rows]
        return [row + ending for row in rows] if ending else rows, cut

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's chat template; the default one if it has several."""
        found = self.tokenizer.chat_template
        found = found.get("default") if isinstance(found, dict) else found
        return found or None

    def tokenize_chat(
        self, system: str, turns: Sequence[tuple[str, str]], template: str, max_length: int
    ) -> tuple[list[int], bool]:
        """Tokens of a chat in a chat template, up to the beginning of the assistant's next turn, and whether something
        was left out to fit into `max_length` tokens: turns from the beginning on, up to one of the user's, and if the
        last turn alone does not fit, the end of its text.

        Args:
            system: text of the system turn; none if empty.
            turns: speaker ("user" or "assistant") and text of each turn. The last one is the user's.

        Raises:
            WorkError: the template cannot format the turns.
        """
        before = [{"role": "system", "content": system}] if system else []

        def written(turns: Sequence[tuple[str, str]]) -> list[int]:
            said = [{"role": speaker, "content": text} for speaker, text in turns]
            try:
                whole = self._reader.apply_chat_template(
                    [*before, *said], chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # templates may raise anything, also to refuse a system turn
                raise WorkError(f"chat_template: cannot write the turns: {one_line(error)}") from None
            return list(self._reader(whole, add_special_tokens=False, verbose=False)["input_ids"])

        with self._reading:
            ids = written(turns)
            if not ids:
                raise WorkError("chat_template: writes nothing for these turns")
            if len(ids) <= max_length:
                return ids, False
            starts = [i for i, (speaker, _) in enumerate(turns) if speaker == "user"]
            place = bisect(starts, False, key=lambda start: len(written(turns[start:])) <= max_length)
            if place < len(starts):
                return written(turns[starts[place] :]), True
            text = turns[-1][1]
            room = max(0, max_length - len(written([("user", "")])))
            kept = self._reader(text, add_special_tokens=False, verbose=False)["input_ids"][:room]
            return written([("user", self._reader.decode(kept))])[:max_length], True

    def shorten_text(self, text: str, tokens: int) -> str:
        """A text with the same first tokens as this one, and more if this one has more."""
        with self._reading:
            return self._shorten(text, tokens)

    def _shorten(self, text: str, tokens: int) -> str:
        """A text with the same first tokens, which is cut if this text would be."""
        if len(text) <= LEAST or self._reader.truncation_side != "right" or not self._reader.is_fast:
            return text
        if self._prefixes is None:
            self._prefixes = PrefixReader(self._reader.backend_tokenizer)
        return self._prefixes.shorten(text, tokens)

    def shorten(self, row: list[int], length: int) -> list[int]:
        """A tokenised text as if cut to `length` tokens when it was tokenised: tokens that end a text are still at its
        end."""
        if len(row) <= length:
            return row
        with self._reading:
            marks: list[int] = self._reader("a", return_special_tokens_mask=True)["special_tokens_mask"]
        ending = marks[::-1].index(0)
        return row[: length - ending] + row[len(row) - ending :]

    def collate(
        self,
        rows: Sequence[Sequence[int]],
        truncated: Sequence[bool] = (),
        query_inputs: Sequence[list[int] | str] = (),
        *,
        padding_side: str = "right",
    ) -> Encoded:
        """Rows of tokens as one batch, in CPU memory (pinned if a GPU will read it)."""
        ids, mask = pad(rows, self.tokenizer.pad_token_id, padding_side)
        if self.device.type == "cuda":
            ids, mask = ids.pin_memory(), mask.pin_memory()
        return Encoded(ids, mask, truncated, query_inputs)

    def chat(self, turns: Sequence[Mapping[str, str]]) -> list[int] | None:
        """Tokens of a chat (turns {"role", "content"}) in the backbone's own template, up to the beginning of the
        answer; None if it has no template.

        Raises:
            WorkError: the template refuses the chat, or writes nothing for it.
        """
        with self._reading:
            if getattr(self._reader, "chat_template", None) is None:
                return None
            try:
                text = self._reader.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
            except Exception as error:  # templates may raise anything
                raise WorkError(f"the backbone's chat template refuses the chat: {one_line(error)}") from None
            ids: list[int] = self._reader(text, add_special_tokens=False, verbose=False)["input_ids"]
            if not ids:
                raise WorkError("the backbone's chat template writes nothing for the chat")
            return ids

    def encode_answers(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of answers, including the tokens that begin and end them, or the first `max_length` of these
        (without an end) if there are more."""
        with self._reading:
            rows = self._reader(
                [self._shorten(text, max_length) for text in texts],
                truncation=True,
                max_length=max_length,
                add_special_tokens=False,
                verbose=False,
            )["input_ids"]
        whole = [[*self.opening, *row, self.tokenizer.eos_token_id] for row in rows]
        return [row if len(row) <= max_length else row[:max_length] for row in whole]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of generated tokens."""
        with self._reading:
            return [text.strip() for text in self._reader.batch_decode(list(rows), skip_special_tokens=True)]

    def written(self, texts: Sequence[str], max_length: int) -> list[str]:
        """How answers look when they are generated as these were learned: normalised, without what the tokenizer does
        not know."""
        return self.decode(self.encode_answers(texts, max_length)) if texts else []

    def label_words(self, labels: Sequence[str], max_length: int) -> dict[str, str]:
        """A task's labels by the texts that stand for them: as generated, then as given."""
        words: dict[str, str] = {}
        for text, label in [
            *zip(self.written(labels, max_length), labels, strict=True),
            *zip(labels, labels, strict=True),
        ]:
            words.setdefault(text, label)
        return words

    def _longer_than(self, text: str, length: int) -> bool:
        return len(self._reader(text, truncation=True, max_length=length + 1)["input_ids"]) > length


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad rows of token ids with `value`: ids [B, T] and their mask [B, T]."""
    length = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    width = int(length.max(initial=0))
    place = np.arange(width)
    mask = place < length[:, None] if side == "right" else place >= width - length[:, None]
    ids = np.full((len(rows), width), value, dtype=np.int64)
    ids[mask] = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=int(length.sum()))
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
