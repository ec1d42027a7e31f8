"""A frozen model with its tokenizer: loading, naming, fingerprinting, and finding its linear layers."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from slm_fast.collection import without_collection
from slm_fast.errors import InputError, SlmError, SlmWarning, WorkError, memory_for, one_line, warn
from slm_fast.families import Family, family_of
from slm_fast.given import checked_tokenizer, unwrapped, without_head
from slm_fast.identity import fingerprint, generation, settings, tokens
from slm_fast.layers import use_onednn
from slm_fast.loading import (
    checkpoint,
    choose_device,
    choose_dtype,
    dtype_word,
    kind_of,
    load_tokenizer,
    loading,
    located,
    parsed_once,
    resolve,
    sha256_of,
    source_of,
)
from slm_fast.structure import find_family
from slm_fast.surroundings import pinned
from slm_fast.tokenization import Tokenization


class Backbone:
    """A frozen model with its tokenizer.

    Attributes:
        name: a hub name, or the absolute path of a folder.
        tokenizer: a copy of the given one, with a padding token and, unless it is an encoder, an end token.
        fingerprint, tokens, settings: the backbone's identity (see identity.py).

    The weights never change (but are kept rounded while a task is learned with autocast). Plain linear layers use
    oneDNN where that is faster, and `AdaptedModel` replaces some of them by adapted layers.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, known_fingerprint: str | None = None) -> None:
        model = unwrapped(model)
        self.name = os.path.abspath(name) if name and os.path.isdir(name) else name
        self.family, self.model = _family(model)
        family = self.family
        if isinstance(tokenizer, (str, Path)):
            tokenizer = _load_tokenizer(tokenizer)
        self.tokenizer = checked_tokenizer(tokenizer, self.model, family.kind)
        if family.kind == "seq2seq" and self.model.config.decoder_start_token_id is None:
            raise InputError("backbone: its config names no decoder_start_token_id, with which answers begin; set it")
        self.pooler: Any = None
        self.model.eval().requires_grad_(False)
        use_onednn(self.model)
        if hasattr(self.model, "pooler"):
            # Heads read the mean over tokens, but imported ones may need the pooler.
            self.pooler, self.model.pooler = self.model.pooler, None
        self.fingerprint = known_fingerprint or fingerprint(self.model, self.tokenizer)
        writes = self.kind != "encoder"
        self.tokens = tokens(self.tokenizer, writes=writes)
        self.settings = settings(self.model.config.to_dict(), self.kind)
        if writes:
            start = self.start_token if self.kind == "seq2seq" else None
            ends = self.end_tokens().tolist()
            self.settings["generation"] = generation(self.model.generation_config, ends, start)
        self.tokenization = Tokenization(self.tokenizer, self.kind, self.device, self.vocabulary)
        if self.kind == "seq2seq" and (first := self.model.generation_config.forced_bos_token_id) is not None:
            self.tokenization.opening = [int(first)]

    @classmethod
    def load(cls, name: str, *, dtype: str | torch.dtype = "float32", device: str = "auto") -> Backbone:
        """Load a backbone.

        Args:
            name: a hub name, a local path, a name of `PACKAGED`, or a GGUF file (a path, or `owner/name/file.gguf` on
                the hub). A GGUF file's weights are dequantised, and its SHA-256 is the fingerprint.
            dtype: "auto" means bfloat16 if the CPU or GPU can multiply it, else float32. "float16" reads the files
                twice, because numbers rounded to float16 would change the fingerprint.

        Raises:
            InputError: it cannot be found or adapted, or cannot run in this dtype.
            WorkError: its files are damaged.
        """
        place = choose_device(device)
        number = choose_dtype(dtype, place)
        name = located(name)
        (path, gguf), known = source_of(name, resolve(name)), None
        try:
            with loading(), parsed_once(gguf), memory_for(f"backbone {name!r}"):
                config = transformers.AutoConfig.from_pretrained(path, **gguf)
                auto_class = getattr(transformers, kind_of(config)[1])
                tokenizer = load_tokenizer(path, gguf, f"backbone {name!r}")
                if gguf:
                    known = sha256_of(transformers.utils.cached_file(path, gguf["gguf_file"]))
                elif number == torch.float16:
                    first = auto_class.from_pretrained(path, dtype=torch.bfloat16)
                    if getattr(first, "_keep_in_fp32_modules", None):
                        raise InputError(f"dtype: float16 overflows in {config.model_type} models; use bfloat16")
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", SlmWarning)  # the model itself warns
                        known = cls(first, tokenizer, name).fingerprint
                    del first
                model = checkpoint(auto_class, path, config, number, gguf)
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
        """Number of token ids that the model accepts."""
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
        """Whether results depend on the number of threads, which is so on a CPU for models too small to gain from a
        second one: torch aligns its scratch for heads of fewer than 16 features in the first thread only, and MKL sums
        products of a few rows by at most 128 columns in another order."""
        config = self.model.config
        heads = getattr(config, "num_attention_heads", None) or 1
        width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or self.width // heads
        return self.device.type == "cpu" and (width < 16 or self.width <= 128)

    @property
    def layers(self) -> nn.ModuleList:
        """The trunk's layers, which the query's taps read."""
        layers: nn.ModuleList = self.model.get_submodule(self.family.layers)
        return layers

    def all_layers(self) -> list[nn.Module]:
        """The trunk's layers and any above it, such as those of T5's decoder."""
        upper = self.model.get_submodule(self.family.upper) if self.family.upper else ()
        return [*self.layers, *upper]

    def find_linears(self, words: Sequence[str], first_layer: int) -> list[str]:
        """Names of the linear layers that `words` stand for, in the trunk from `first_layer` on and in all layers above
        the trunk: module names, or "module[word]" if the word stands for some of a fused module's output features.

        Raises InputError if a word matches no module.
        """
        prefixes = [f"{self.family.layers}.{i}." for i in range(first_layer, len(self.layers))]
        if self.family.upper:
            prefixes += [f"{self.family.upper}.{i}." for i in range(len(self.model.get_submodule(self.family.upper)))]
        outer = re.compile("|".join(map(re.escape, prefixes)))
        found = []
        for word in words:
            if word not in self.family.words:
                raise InputError(f"targets: {word!r} matches no layer; choose from {', '.join(self.family.words)}")
            pattern, together = self.family.pattern(word)
            matches = [
                name if len(together) == 1 else f"{name}[{word}]"
                for name, _ in self.model.named_modules()
                if (at := outer.match(name)) and re.fullmatch(pattern, name[at.end() :])
            ]
            if not matches:
                raise InputError(f"targets: {word!r} matches no layer from {first_layer} on in this {self.kind} model")
            found += matches
        return sorted(set(found))

    @property
    def adaptable(self) -> set[str]:
        """Names of all linear layers that the family's words stand for, in every layer."""
        found: set[str] = set()
        for word in self.family.words:
            with suppress(InputError):  # only some models of the family have layers of this word
                found.update(self.find_linears([word], 0))
        return found

    def parts(self, names: Sequence[str]) -> dict[str, dict[str, slice]]:
        """The modules of these linear layers, and for each fused one the layers it consists of and their output
        features. Empty for a module that is not fused."""
        modules: dict[str, tuple[str, ...]] = {}
        for name in names:
            module, _, word = name.rstrip("]").partition("[")
            modules[module] = self.family.pattern(word)[1] if word else ()
        widths = self._module_widths([module for module, words in modules.items() if words])
        config, parts = self.model.config, {}
        heads = getattr(config, "num_attention_heads", None) or 1
        shares = dict.fromkeys(("key", "value"), getattr(config, "num_key_value_heads", None) or heads)
        for module, words in modules.items():
            sizes = [shares.get(word, heads) for word in words]
            ends = [widths[module][1] * sum(sizes[:i]) // sum(sizes) for i in range(len(words) + 1)] if words else []
            parts[module] = {f"{module}[{word}]": slice(*ends[i : i + 2]) for i, word in enumerate(words)}
        return parts

    def widths(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of linear layers. Where attributes do not tell, one token is passed through."""
        parts = self.parts(names)
        whole = self._module_widths(list(parts))
        found = {module: widths for module, widths in whole.items() if not parts[module]}
        for module, slices in parts.items():
            found |= {name: (whole[module][0], part.stop - part.start) for name, part in slices.items()}
        return {name: found[name] for name in names}

    def _module_widths(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        modules = {name: self.model.get_submodule(name) for name in names}
        widths = {
            name: (int(getattr(module, features_in)), int(getattr(module, features_out)))
            for name, module in modules.items()
            for features_in, features_out in (("in_features", "out_features"), ("nx", "nf"))  # nn.Linear, GPT-2
            if hasattr(module, features_in) and hasattr(module, features_out)
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
        """Ids of the tokens that end a generated text: the tokenizer's, and those of the model's generation config."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        others = ends if isinstance(ends, list) else [ends]
        known = {end for end in (self.tokenizer.eos_token_id, *others) if end is not None}
        return torch.tensor(sorted(known), dtype=torch.int64, device=self.device)

    @property
    def start_token(self) -> int:
        """Id of the token that the decoder of a seq2seq model begins with."""
        start: int | None = self.model.generation_config.decoder_start_token_id
        return int(self.model.config.decoder_start_token_id) if start is None else start

    def decoder_inputs(self, labels: Tensor) -> Tensor:
        """Input tokens [B, T] of a seq2seq decoder for answers [B, T], in which negative numbers are padding."""
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            inputs: Tensor = self.model.prepare_decoder_input_ids_from_labels(labels)
            return inputs
        start = labels.new_full((len(labels), 1), self.start_token)
        shifted = torch.cat([start, labels[:, :-1]], 1)
        return shifted.masked_fill(shifted < 0, self.tokenizer.pad_token_id)

    @cached_property
    def learned_positions(self) -> int | None:
        """Number of embedded positions; None if positions are not embedded."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and re.search(r"\b(embed_positions|position_embeddings?|wpe)$", name):
                # RoBERTa's positions begin after the padding index, BART's at an offset.
                before = 0 if module.padding_idx is None else module.padding_idx + 1
                return len(module.weight) - before - int(getattr(module, "offset", 0))
        return None

    def max_positions(self) -> int | None:
        """Maximum number of positions: those embedded, else (not for seq2seq) the configuration's limit, if any."""
        if self.learned_positions is not None or self.kind == "seq2seq":
            return self.learned_positions
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def positions(self, mask: Tensor) -> dict[str, Any]:
        """Keyword arguments with the positions [B, T] of real tokens, padded on either side, for a causal model that
        embeds positions, or may do so since it is not in the table. Others need none: rotary positions are relative."""
        if self.kind != "causal" or (self.learned_positions is None and not self.family.found):
            return {}
        if "position_ids" not in inspect.signature(self.model.base_model.forward).parameters:
            return {}  # the model derives them from the mask
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of a causal model for last hidden states [N, H] of its trunk. The model itself computes them,
        since it may do more than multiply (a soft cap, a scale)."""
        lm, trunk, name = self.model, self.model.base_model, self.model.base_model_prefix
        options = {"output_router_logits": False} if hasattr(lm.config, "output_router_logits") else {}
        tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        setattr(lm, name, _Known(hidden[None]))
        try:
            logits: Tensor = lm(input_ids=tokens, use_cache=False, **options).logits
        finally:
            setattr(lm, name, trunk)
        return logits[0]


class _Known(nn.Module):
    """Replaces a trunk whose last hidden states are known (and the decoder inside it, which OPT has)."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.output = _Output(hidden)

    def forward(self, *_: Any, **__: Any) -> _Output:
        return self.output

    def __getattr__(self, name: str) -> _Known:
        return self


class _Output:
    """A trunk's output: its last hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


@without_collection()
def load_backbone(backbone: Any, tokenizer: Any, dtype: str | torch.dtype, device: str, *, hint: str = "") -> Backbone:
    """Make a Backbone from a path or name, or from a model with its tokenizer. A Backbone is returned as it is.

    Raises InputError. `hint` is appended to its message if a path or name cannot be loaded.
    """
    if isinstance(backbone, Backbone):
        return backbone
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
        raise InputError("tokenizer: required with a backbone given as a model; pass its transformers tokenizer")
    if dtype_word(dtype) != "float32" or device != "auto":
        raise InputError("dtype, device: a backbone given as a model keeps its own")
    return Backbone(backbone, tokenizer, getattr(backbone, "name_or_path", ""))


def _family(model: Any) -> tuple[Family, Any]:
    """The family of a model, and the part of the model that is used."""
    family, (kind, auto_class) = family_of(model.config.model_type), kind_of(model.config)
    if family is not None:
        used = without_head(model, kind, family.layers, family.upper, auto_class)
        if not family.loop:
            warn(f"backbone: model type {model.config.model_type!r}: answers are written by transformers' generate")
        return family, used
    model = without_head(model, kind, "", None, auto_class)
    with pinned():
        return find_family(model.eval(), kind, auto_class), model


def _load_tokenizer(name: str | Path) -> Any:
    try:
        path, gguf = source_of(str(name), resolve(located(str(name), "tokenizer")))
        with loading():
            return load_tokenizer(path, gguf, f"tokenizer {str(name)!r}")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"tokenizer {str(name)!r}: cannot be loaded: {one_line(error)}") from None
