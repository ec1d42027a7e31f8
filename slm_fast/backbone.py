"""The frozen models: one row of a table a family, and how to load, name and fingerprint one."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from slm_fast.errors import InputError, SlmError, WorkError, memory_for, one_line
from slm_fast.given import checked_tokenizer, unwrapped, without_head
from slm_fast.identity import fingerprint, generation, settings, tokens
from slm_fast.layers import use_onednn
from slm_fast.loading import choose_device, choose_dtype, loading, located, resolve, sha256_of, source_of
from slm_fast.surroundings import pinned
from slm_fast.tokenization import Tokenization


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


class Backbone:
    """A frozen model with its tokenizer.

    Attributes:
        name: a hub name, or the whole path of a folder.
        tokenizer: a copy of the one given, with an end and a padding token.
        fingerprint, tokens, settings: what makes it this backbone and no other (see identity.py).

    Its weights never change (but are held rounded while a task is learned with autocast). Its plain linear layers go
    through oneDNN where that is faster, and `AdaptedModel` puts adapted layers in the place of some.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, known_fingerprint: str | None = None) -> None:
        model = unwrapped(model)
        self.name = os.path.abspath(name) if name and os.path.isdir(name) else name
        self.family = family = _family(model.config.model_type)
        self.model = without_head(model, family.kind, family.layers, family.upper, family.auto_class)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = _load_tokenizer(tokenizer)
        self.tokenizer = checked_tokenizer(tokenizer, self.model, family.kind)
        if family.kind == "seq2seq" and self.model.config.decoder_start_token_id is None:
            raise InputError("backbone: its config names no decoder_start_token_id, with which answers begin; set it")
        self.model.eval().requires_grad_(False)
        use_onednn(self.model)
        if self.family.kind == "encoder":
            self.model.pooler = None  # answers come from the mean over tokens
        self.fingerprint = known_fingerprint or fingerprint(self.model, self.tokenizer)
        writes = self.kind != "encoder"
        self.tokens = tokens(self.tokenizer, writes=writes)
        self.settings = settings(self.model.config.to_dict(), self.kind)
        if writes:
            start = self.start_token if self.kind == "seq2seq" else None
            ends = self.end_tokens().tolist()
            self.settings["generation"] = generation(self.model.generation_config, ends, start)
        self.tokenization = Tokenization(self.tokenizer, self.kind, self.device, self.vocabulary)

    @classmethod
    def load(cls, name: str, *, dtype: str = "float32", device: str = "auto") -> Backbone:
        """Load a backbone by hub name, local path, or a name of `PACKAGED`.

        Of a GGUF file (the path of one, or a hub's `owner/name/file.gguf`) the weights are dequantised, and the
        fingerprint is its SHA-256.

        Args:
            dtype: "auto" is bfloat16 where the processor or GPU multiplies it, else float32. "float16" reads the files
                twice: numbers rounded to float16 would give another fingerprint.

        Raises:
            InputError: it cannot be found, its family is not in `FAMILIES`, or it cannot run in this dtype.
            WorkError: its files are damaged.
        """
        place = choose_device(device)
        number = choose_dtype(dtype, place)
        name = located(name)
        (path, gguf), known = source_of(name, resolve(name)), None
        try:
            with loading(), memory_for(f"backbone {name!r}"):
                config = transformers.AutoConfig.from_pretrained(path, **gguf)
                auto_class = getattr(transformers, _family(config.model_type).auto_class)
                tokenizer = transformers.AutoTokenizer.from_pretrained(path, **gguf)
                if gguf:
                    known = sha256_of(transformers.utils.cached_file(path, gguf["gguf_file"]))
                elif number == torch.float16:
                    first = auto_class.from_pretrained(path, dtype=torch.bfloat16)
                    if getattr(first, "_keep_in_fp32_modules", None):
                        raise InputError(f"dtype: float16 overflows in {config.model_type} models; use bfloat16")
                    known = cls(first, tokenizer, name).fingerprint
                    del first
                model = _dense(auto_class, path, config, number, gguf)
        except SlmError:
            raise
        except (OSError, ValueError, ImportError) as error:
            if gguf and isinstance(error, ValueError) and "not supported" not in str(error):
                raise WorkError(f"backbone {name!r}: damaged: {one_line(error)}") from None
            raise InputError(f"backbone {name!r}: cannot be loaded: {one_line(error)}") from None
        except Exception as error:
            raise WorkError(f"backbone {name!r}: damaged: {one_line(error)}") from None
        with pinned(), memory_for(f"backbone {name!r}"):
            return cls(model.to(place), tokenizer, name, known)

    @property
    def kind(self) -> str:
        return self.family.kind

    @property
    def vocabulary(self) -> int:
        """How many token ids the model reads."""
        return len(self.model.get_input_embeddings().weight)

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
    def needs_one_thread(self) -> bool:
        """Whether bits depend on the number of threads, as they do in models so small that a second one costs time:
        torch's scratch for a head of fewer than 16 features is aligned in the first thread only, and MKL sums products
        of a few rows by at most 128 columns in another order."""
        config = self.model.config
        heads = getattr(config, "num_attention_heads", None) or 1
        width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or self.width // heads
        return self.device.type == "cpu" and (width < 16 or self.width <= 128)

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
        return {name: widths[name] for name in names}

    def end_tokens(self) -> Tensor:
        """Ids of the tokens that end a generated text: the tokenizer's, and any others the model itself stops at."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        others = ends if isinstance(ends, list) else [ends]
        known = {end for end in (self.tokenizer.eos_token_id, *others) if end is not None}
        return torch.tensor(sorted(known), dtype=torch.int64, device=self.device)

    @property
    def start_token(self) -> int:
        """Id of the token that T5's decoder begins with."""
        start: int | None = self.model.generation_config.decoder_start_token_id
        return int(self.model.config.decoder_start_token_id) if start is None else start

    def logits(self, hidden: Tensor) -> Tensor:
        """Of a decoder-only backbone: the vocabulary's logits [..., V] after its last hidden states [..., H]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def max_positions(self) -> int | None:
        """The most positions the backbone can hold, where its positions are learned; else None."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is None or self.kind == "seq2seq":
            return None
        # RoBERTa's positions begin after the padding index.
        return int(limit) - (self.model.config.pad_token_id + 1 if "roberta" in self.model.config.model_type else 0)


def load_backbone(backbone: Any, tokenizer: Any, dtype: str, device: str, *, hint: str = "") -> Backbone:
    """A backbone from what users give: a path or name, or a model with its tokenizer.

    Raises InputError, with the hint at its end where nothing can be loaded from a path or name.
    """
    if isinstance(backbone, (str, Path)):
        if not str(backbone):
            raise InputError("backbone: expected a path, a name or a transformers model, got an empty name")
        if tokenizer is not None:
            raise InputError("tokenizer: goes with a backbone given as a model; a path or name brings its own")
        try:
            return Backbone.load(str(backbone), dtype=dtype, device=device)
        except InputError as error:
            raise InputError(f"{error}{hint if str(error).startswith('backbone') else ''}") from None
    backbone = unwrapped(backbone)
    if tokenizer is None:
        raise InputError("tokenizer: needed beside a backbone that is given as a model")
    if dtype != "float32" or device != "auto":
        raise InputError("dtype, device: a backbone given as a model keeps its own")
    return Backbone(backbone, tokenizer, getattr(backbone, "name_or_path", ""))


def _family(model_type: str) -> Family:
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise InputError(f"backbone: model type {model_type!r} is not supported; supported: {known}")


def _dense(auto_class: Any, path: str, config: Any, dtype: torch.dtype, gguf: Mapping[str, str]) -> Any:
    """A checkpoint's model. One read from a GGUF file is made an ordinary one, which may be trained and saved."""
    if not gguf:
        return auto_class.from_pretrained(path, dtype=dtype)
    more = {"config": config}  # which would take seconds to find again
    if hasattr(transformers, "GgufConfig"):  # versions that may keep weights packed
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        model = auto_class.from_pretrained(path, dtype=dtype, **gguf, **more)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model


def _load_tokenizer(name: str | Path) -> Any:
    try:
        path, gguf = source_of(str(name), resolve(located(str(name), "tokenizer")))
        with loading():
            return transformers.AutoTokenizer.from_pretrained(path, **gguf)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"tokenizer {str(name)!r}: cannot be loaded: {one_line(error)}") from None
