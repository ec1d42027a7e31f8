"""How much of a long text must be tokenised to get the first tokens of the whole text.

A fast tokenizer splits a text at its added tokens, normalises the parts in between, splits them into words and each
word into tokens. All its components known here are local: their result at a position depends on a bounded number of
words around it. So if a prefix is cut where no character composes with the one before, all its words are final but the
last few. The tokens of a single word that fills the prefix depend on the model:

- BPE and Unigram tokenise from left to right in this sense: if the tokens of a word have a boundary at i, those before
  it are the tokens of word[:i]. (Viterbi's best path to i does not depend on what follows; merges on the two sides of a
  boundary that is never crossed do not interact, cf. Berglund & van der Merwe 2023.) A token has at most L characters,
  so one of word[:m - L + 1] ... word[:m] ends at a boundary, and the tokens with which all of these begin are final.
- WordPiece turns a word of more than 100 characters into one [UNK], as BPE and Unigram do with adjacent unknown
  characters. The middle of such a stretch is irrelevant, as is that of one that yields no tokens (spaces), so it is
  skipped: of a stretch only a thousand characters at both ends are kept, of a word of plain letters that WordPiece does
  not know only the beginning.

A tokenizer with an unknown component reads its texts whole.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence, Set
from itertools import islice, takewhile
from typing import Any

LETTERS, LEAST = 8, 2048  # characters first tried, per wanted token and at least
WORD = 8192  # characters searched, per wanted token, for words too long to be known
ENDS = 1024  # characters kept at the end of a skipped stretch
BLOCK = 1 << 16  # characters compared at once

COMPOSING = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Precompiled"}
NORMALIZERS = COMPOSING | {"Lowercase", "StripAccents", "Strip", "Prepend", "Nmt", "ByteLevel", "Replace"}
# These split at classes of characters, so what can be inside a word can be anywhere inside it.
BY_CLASS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Metaspace", "Punctuation", "Digits"}
# These leave the number of plain letters unchanged, and never split between them.
PLAIN = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"}
PLAIN |= {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation"}
PRE_TOKENIZERS = BY_CLASS | {"ByteLevel", "UnicodeScripts", "CharDelimiterSplit", "Split"}
# The only lookahead known to be local, GPT-2's: the last of the spaces before a word belongs to it.
LOCAL_LOOK = re.compile(re.escape(r"(?!\S)"))
CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")
FAR_LOOK = re.compile(r"\(\?<?[=!]|\\[bBzZAG1-9]|[$^]|\(\?P=")


class PrefixReader:
    """Shortens texts for one fast tokenizer. backend: its `tokenizers.Tokenizer`, which nothing else may be using."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        about = json.loads(backend.to_str())
        normalizers = _parts(about["normalizer"], "normalizers")
        splitters = _parts(about["pre_tokenizer"], "pretokenizers")
        self.local = _is_local(normalizers, splitters, about["model"])
        self.composes = any(part["type"] in COMPOSING for part in normalizers)
        self.by_class = all(part["type"] in BY_CLASS for part in splitters)
        self.added = [token["content"] for token in about["added_tokens"]]
        # Whether spaces before an added token may be lost, and how many of the last words or characters may still turn
        # out to be part of one.
        self.takes_spaces = any(token["lstrip"] for token in about["added_tokens"]) or any(
            part["type"] == "Strip" and part["strip_right"] for part in normalizers
        )
        self.margin = 3 + max((max(len(token), len(self._normal(token))) for token in self.added), default=0)
        vocabulary = backend.get_vocab(with_added_tokens=False)
        self.alphabet = set().union(*vocabulary)
        self.longest = max((len(piece) for piece in vocabulary if len(piece) <= 16), default=1)
        self.long_pieces = [piece for piece in vocabulary if len(piece) > 16]
        # Whether a token can span a space ("▁" in SentencePiece) that follows a letter.
        self.over_spaces = "▁" not in vocabulary or any(re.search("[^▁]▁", piece) for piece in vocabulary)
        model = about["model"]
        unknown = model.get("unk_token")
        self.unknown = backend.token_to_id(unknown) if unknown is not None else model.get("unk_id")
        self.whole_words = model["type"] in ("WordPiece", "WordLevel")  # unknown as a whole, not by character
        self.word_limit = model.get("max_input_chars_per_word") or max(map(len, vocabulary), default=1)
        # A word of plain letters that is too long to be known is cut to the shortest such length.
        self.long_word: re.Pattern[str] | None = None
        parts = {part["type"] for part in (*normalizers, *splitters)}
        inside = re.compile("[A-Za-z0-9]|.*[A-Za-z0-9]$", re.DOTALL)  # added tokens that may occur inside a word
        if self.whole_words and parts <= PLAIN and not any(map(inside.match, self.added)):
            self.long_word = re.compile(f"([A-Za-z0-9]{{{self.word_limit + 1}}})[A-Za-z0-9]+")

    def shorten(self, text: str, tokens: int) -> str:
        """A text with the same first `tokens` tokens as `text` (not counting a template's), and more exactly if `text`
        has more."""
        size = first = max(LEAST, LETTERS * tokens)
        if not self.local:
            return text
        long_word = self.long_word
        while len(text) > size:
            cut = _boundary(text, size) if self.composes else size
            head = text[: cut or size]
            read = self._encode(head)
            if cut and self._standing(head, read, tokens) > tokens:
                return head
            shorter = self._skip(text, head, read)
            if len(shorter) == len(text):
                size *= 2
                if long_word is not None and size == 8 * first:
                    begin, rest = text[: WORD * tokens], text[WORD * tokens :]
                    shorter, long_word = long_word.sub(r"\1", begin), None
                    if len(shorter) < len(begin):
                        text, size = shorter + rest, first
            else:
                text, size = shorter, max(first, size // 2)
        return text

    def _normal(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def _encode(self, text: str) -> Any:
        self.backend.no_truncation()
        self.backend.no_padding()
        return self.backend.encode(text, add_special_tokens=False)

    # Final tokens

    def _standing(self, head: str, read: Any, enough: int) -> int:
        """How many of the first tokens of `head` are final, whatever follows it (or any number above `enough`)."""
        words = read.word_ids
        if not words:
            return 0
        limit = len(head) - self.margin
        limit = len(head[:limit].rstrip()) if self.takes_spaces else limit
        tokens = zip(words, read.offsets, strict=True)
        last = words[-1] - self.margin
        standing = sum(
            1 for _ in takewhile(lambda token: token[0] <= last and token[1][1] <= limit, islice(tokens, enough + 1))
        )
        begin = words.index(words[-1])
        if standing > enough or len(words) - begin < self.margin or self.whole_words:
            return standing
        return max(standing, self._standing_of_last(head, read, begin))

    def _standing_of_last(self, head: str, read: Any, begin: int) -> int:
        """The same, if the last word, tokens from `begin` on, is a long one."""
        if head[-1].isspace():  # then the word must consist of all these spaces, and stay
            before = read.offsets[begin - 1][1] if begin else 0
            if self.takes_spaces or before > len(head.rstrip()):
                return 0
        ids = read.ids
        rest = head[max((head.rfind(token) + len(token) for token in self.added if token in head), default=0) :]
        splitter, model, rest = self.backend.pre_tokenizer, self.backend.model, self._normal(rest)
        words = [word for word, _ in splitter.pre_tokenize_str(rest)] if splitter is not None else [rest]
        word = words[-1] if words else ""
        if len(word) < LEAST // 4 or [token.id for token in model.tokenize(word)] != list(ids[begin:]):
            return 0
        space = None if self.over_spaces else list(re.finditer("[^▁](?=▁)", word[: -self.margin]))
        if space:
            return begin + len(model.tokenize(word[: space[-1].end()]))
        tail = word[-ENDS:]
        longest = max((len(piece) for piece in self.long_pieces if piece in tail), default=0)
        longest = max(self.longest, longest, self.margin)
        same = list(ids[begin:])
        for end in range(len(word) - longest, len(word)):
            other = model.tokenize(word[:end])
            same = [ours for ours, theirs in takewhile(_alike, zip(same, (token.id for token in other), strict=False))]
        return begin + len(same)

    # Skipped stretches

    def _skip(self, text: str, head: str, read: Any) -> str:
        """`text` without the middle of an irrelevant stretch that starts in the first half of `head`."""
        half = len(head) // 2
        over = [place for place, (start, end) in enumerate(read.offsets) if end > half and start < end]
        begin = read.offsets[over[0]][1] if over else len(head)  # characters after a word's last token may be dropped
        letters = set(head[half:begin])
        if len(over) > 1 or len(letters) > 64 or any(set(token) <= letters for token in self.added):
            return text
        if over:
            start = read.offsets[over[0]][0]
            if (
                start > half
                or len(head) - begin > self.margin
                or not self._stays_unknown(read.ids[over[0]], head[half:begin])
            ):
                return text
        elif not all(self._is_silent(letter) for letter in letters):
            return text
        end = _end_of(letters, text, begin) - ENDS
        return head + text[end:] if end > len(head) else text

    def _is_silent(self, letter: str) -> bool:
        """Whether any number of this character between letters is tokenised as nothing, or as one space."""
        alike = [self._encode(text).ids for text in ("aa", "a a")]
        return all(self._encode(f"a{letter * count}a").ids in alike for count in (1, 2, 3, ENDS))

    def _stays_unknown(self, token: int, stretch: str) -> bool:
        """Whether this token, of a stretch of a word, stands for a word that stays unknown however often its letters
        repeat."""
        if token != self.unknown or not self.by_class:
            return False
        if self.whole_words:
            return len(self._normal(stretch)) > 2 * self.word_limit
        return not (set(self._normal("a" + stretch)) - set(self._normal("a"))) & self.alphabet


def _end_of(letters: Set[str], text: str, begin: int) -> int:
    """Where a stretch of these letters that starts at `begin` ends."""
    block = text[begin : begin + BLOCK]
    if block and set(block) <= letters:  # a stretch is often one letter, and whole blocks compare faster
        while text.startswith(block, begin):
            begin += len(block)
    match = re.compile("[" + "".join(map(re.escape, letters)) + "]*").match(text, begin)
    return match.end() if match else begin


def _alike(pair: tuple[int, int]) -> bool:
    return pair[0] == pair[1]


def _parts(spec: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The components of a normaliser or pre-tokenizer, with sequences flattened."""
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [part for each in spec[inner] for part in _parts(each, inner)]
    return [spec]


def _is_local(
    normalizers: Sequence[Mapping[str, Any]], splitters: Sequence[Mapping[str, Any]], model: Mapping[str, Any]
) -> bool:
    if not {part["type"] for part in normalizers} <= NORMALIZERS:
        return False
    if not {part["type"] for part in splitters} <= PRE_TOKENIZERS:
        return False
    patterns = [part["pattern"]["Regex"] for part in (*normalizers, *splitters) if "Regex" in part.get("pattern", ())]
    if any(FAR_LOOK.search(CLASS.sub("", LOCAL_LOOK.sub("", pattern))) for pattern in patterns):
        return False
    if model["type"] == "BPE":  # with an end-of-word mark, a prefix has other tokens
        return not model.get("dropout") and not model.get("end_of_word_suffix")
    return model["type"] in ("WordPiece", "Unigram", "WordLevel")


def _boundary(text: str, size: int) -> int | None:
    """The last position up to `size` where no character composes with the one before; None if there is none in the
    upper half."""
    for place in range(size, size // 2, -1):
        if _stands_alone(text[place]):
            return place
    return None


def _stands_alone(letter: str) -> bool:
    """Whether normalisation never joins a character with the one before."""
    if letter < "\u0300":
        return True
    first = unicodedata.normalize("NFKD", letter)[0]
    joins = unicodedata.combining(first) or unicodedata.category(first) in ("Mn", "Mc", "Me", "Cn")
    return not joins and not "\u1160" <= first <= "\u11ff"  # Korean vowels and finals
