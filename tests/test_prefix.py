"""`PrefixReader.shorten`: a shortened text starts with the same tokens as the whole one, for any kind of tokenizer."""

from __future__ import annotations

import functools

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from slm_fast import prefix
from slm_fast.prefix import PrefixReader

CORPUS = [
    "the parcel is late again",
    "good bad fine poor star",
    "aa ab abc aaaa",
    "1 22 333 1/2",
    "正面 负面",
    "a  b   c",
    "x\ny\n\n",
]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SQUEEZE = normalizers.Replace(Regex(" {2,}"), " ")
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BERT = {"unk_token": "[UNK]", "max_input_chars_per_word": 20}
SPLITS = {
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt4": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT4), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "metaspace": pre_tokenizers.Metaspace(),
    "metaspace unsplit": pre_tokenizers.Metaspace(split=False),
    "bert": pre_tokenizers.BertPreTokenizer(),
    "words": pre_tokenizers.Whitespace(),
    "each space": pre_tokenizers.Split(" ", "isolated"),
    "none": None,
}
# Name -> model, key of the pre-tokenizer in SPLITS, and normalizer.
KINDS = {
    "wordpiece": ("WordPiece", "bert", normalizers.BertNormalizer()),
    "wordpiece cased": ("WordPiece", "bert", normalizers.BertNormalizer(lowercase=False, strip_accents=False)),
    "wordpiece composed": ("WordPiece", "words", normalizers.NFC()),
    "byte-level bpe": ("BPE", "bytes", None),
    "byte-level bpe of another pattern": ("BPE", "gpt4", normalizers.NFC()),
    "bpe of whole texts": (
        "BPE",
        "none",
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "bpe of each space": ("BPE", "each space", normalizers.Strip()),
    "unigram": ("Unigram", "metaspace", normalizers.Sequence([normalizers.NFKC(), SQUEEZE])),
    "unigram stripped": (
        "Unigram",
        "metaspace",
        normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(left=False), SQUEEZE]),
    ),
    "unigram of whole texts": ("Unigram", "metaspace unsplit", normalizers.NFKD()),
    "unigram of bare texts": ("Unigram", "none", normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "words": ("WordLevel", "bert", normalizers.Lowercase()),
}


@functools.cache
def make(kind: str) -> Tokenizer:
    model, split, normalizer = KINDS[kind]
    unknown = {} if kind.startswith("byte") else {"unk_token": "[UNK]"}
    made = {
        "WordPiece": lambda: models.WordPiece(**BERT),
        "BPE": lambda: models.BPE(fuse_unk=True, **unknown),
        "Unigram": lambda: models.Unigram(),
        "WordLevel": lambda: models.WordLevel(unk_token="[UNK]"),
    }[model]()
    tokenizer = Tokenizer(made)
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split], decoders.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    options = {"vocab_size": 400 if unknown else 330, "show_progress": False, "special_tokens": ["[UNK]", "</s>"]}
    if model == "Unigram":
        options["unk_token"] = "[UNK]"
    if kind.startswith("byte"):
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS * 20, getattr(trainers, f"{model.replace('BPE', 'Bpe')}Trainer")(**options))
    tokenizer.add_special_tokens(["[SEP]", AddedToken("<mask>", lstrip=True)])
    tokenizer.add_tokens(["late½again", AddedToken("ab c", normalized=True, single_word=True)])
    return tokenizer


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the thresholds, so that texts of a hundred characters exercise what otherwise needs thousands."""
    monkeypatch.setattr(prefix, "LEAST", 64)
    monkeypatch.setattr(prefix, "LETTERS", 2)
    monkeypatch.setattr(prefix, "ENDS", 48)


PIECES = st.sampled_from(
    [
        *("a", "b", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\x00", "\u200d", "é", "e\u0301", "\u0301", "\u0316", "½"),
        *("ﬁ", "\uff21", "正", "面", "!", "?", ".", "1", "22", "😀", "👨\u200d👩", "🇩🇪", "ﾞ", "한", "\u1161", "Σ", "▁"),
        *("the ", "parcel ", "late", "[SEP]", "<mask>", "<ma", "</s>", "late½again", "ab c", "ab", "'s"),
    ]
)
RUNS = st.builds(lambda run, times: "".join(run) * times, st.lists(PIECES, min_size=1, max_size=3), st.integers(1, 120))
TEXTS = st.lists(RUNS | PIECES, min_size=1, max_size=8).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS, tokens=st.integers(1, 40))
@example(text="a" + " " * 500 + "<mask>", tokens=5)
@example(text="a" * 500 + " b", tokens=2)
@example(text="e" + "\u0301" * 400 + "\u0316b c", tokens=2)
@example(text="!?" * 300, tokens=30)
@example(text="😀" * 300 + " the", tokens=2)
def test_the_first_tokens_are_those_of_the_whole_text(kind: str, text: str, tokens: int) -> None:
    tokenizer = make(kind)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    shortened = tokenizer.encode(PrefixReader(tokenizer).shorten(text, tokens), add_special_tokens=False).ids
    assert shortened[:tokens] == whole[:tokens]
    assert (len(shortened) > tokens) == (len(whole) > tokens)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("wordpiece", "!?" * 2000),
        ("wordpiece", "a" * 3000 + " b"),
        ("wordpiece", "a" + " \n" * 2000 + "b"),
        ("wordpiece", "e" + "\u0301" * 3000 + "b"),
        ("wordpiece composed", "e\u0301" * 2000 + " b"),
        ("byte-level bpe", "a" * 3000),
        ("byte-level bpe", "正面" * 1000),
        ("bpe of whole texts", "the parcel is late " * 100),
        ("unigram", "😀" * 3000 + " the"),
        ("unigram stripped", "a" + " " * 3000 + "b c"),
        ("unigram of whole texts", "the parcel is late " * 100),
    ],
)
def test_little_of_a_long_text_is_read(kind: str, text: str) -> None:
    assert len(PrefixReader(make(kind)).shorten(text, 5)) < 400


@pytest.mark.parametrize("kind", ["wordpiece", "words"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    words=st.lists(st.sampled_from(["a" * 300, "B1" * 90, "late", "a" * 20, "a" * 21, "正", "!", "é", "\u0301", " "])),
    joint=st.sampled_from([" ", "", "-"]),
    times=st.integers(1, 30),
    tokens=st.integers(1, 30),
)
def test_of_long_words_as_much_is_read_as_makes_them_unknown(kind, words, joint, times, tokens) -> None:
    tokenizer = Tokenizer(make(kind).model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = make(kind).normalizer, make(kind).pre_tokenizer
    tokenizer.add_special_tokens(["[SEP]"])
    reader, text = PrefixReader(tokenizer), joint.join(words * times)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    shortened = tokenizer.encode(reader.shorten(text, tokens), add_special_tokens=False).ids
    assert shortened[:tokens] == whole[:tokens]
    assert (len(shortened) > tokens) == (len(whole) > tokens)
    assert len(reader.shorten(("ab" * 2000 + " ") * 50, 20)) < 3000


def test_a_tokenizer_with_a_part_that_is_not_known_reads_its_texts_whole() -> None:
    text = "aa b " * 500
    for change in (
        {"pre_tokenizer": pre_tokenizers.Split(Regex(r"\d{1,3}(?=(\d{3})*\b)"), "isolated")},
        {"model": models.BPE({"a": 0, "b": 1}, [], end_of_word_suffix="</w>")},
    ):
        tokenizer = Tokenizer(models.WordLevel({"aa": 0, "b": 1}, unk_token="aa"))
        assert len(PrefixReader(tokenizer).shorten(text, 5)) < len(text)
        for part, value in change.items():
            setattr(tokenizer, part, value)
        assert PrefixReader(tokenizer).shorten(text, 5) == text
