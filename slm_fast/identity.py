"""Identity of a backbone: its weights, vocabulary, tokenizer rules and settings.

A store's manifest keeps each of them, to recognise the backbone that the store was created with. Only what affects
answers is compared: not a model's location, the precision it is loaded in, or library versions.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slm_fast.errors import WorkError

# Texts on which tokenizers with different rules differ: case, accents, widths, spaces, lines, digits, signs, scripts.
PROBES = (
    "",
    "The quick brown fox, doesn't it?",
    "ÀÉÎõü Straße İstanbul e\u0301a\u0308 \ufb01ne ½ \uff21\uff22\uff43 \uff11\uff12",
    "  leading, double  and trailing   ",
    "one\ntwo\r\nthree\n\n\nfour\tfive\u3000six\u00a0seven\u200beight\x00nine",
    "1234567 3.14 1,000,000 2024-01-31 v1.2.3 x=3+4",
    "!?!?... --- *** (a) [b] {c} <d> \"e\" 'f' `g` #h @i $5 50% a_b c/d",
    "正面负面 日本語テスト 한국어 ภาษาไทย العربية русский",
    "😀 👨\u200d👩\u200d👧 🇩🇪 ❤️",
    "unbelievablyantidisestablishmentarianism " + "x" * 200,
)

# Configuration settings that do not affect answers, or that show in the weights and vocabulary.
_NEITHER = re.compile(
    r"(_model)?_?name_or_path|architectures|(torch_)?dtype|transformers_version|"
    r"(id2label|label2id|quantization_config)(\..*)?|num_labels|problem_type|.*dropout.*|initializer_.*|output_.*|"
    r"return_dict.*|use_(return_dict|cache)|chunk_size_feed_forward|pretraining_tp|finetuning_task|"
    r"task_specific_params(\..*)?|max_position_embeddings|(bos|eos|sep)_token_id|_attn_implementation.*|"
    r".*experts_implementation.*|gradient_checkpointing"
)

# Settings of a generation_config that this package sets itself or keeps elsewhere.
OVERRULED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache"),
    *("do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens"),
    *("cache_implementation", "_from_model_config", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores"),
}


def fingerprint(model: nn.Module, tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and of each tensor's name, shape and up to 1,024 evenly spaced elements (rounded to
    bfloat16, so that the precision a model is loaded in does not matter).

    Raises WorkError, which names the tensor, if one of these elements of a weight is not finite.
    """
    digest = hashlib.sha256()
    # Adapted layers hold the original layer as "base", which the state dictionary omits from names.
    weights = {name.replace(".base.", ".") for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):  # a quantised layer's packed parameters
            continue
        if hasattr(type(tensor), "__tensor_flatten__"):  # torchao's quantised tensors have no plain elements
            tensor = tensor.dequantize()
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // 1024))]
        if name in weights and sample.is_floating_point() and not sample.isfinite().all():
            raise WorkError(f"backbone: weight {name} holds a number that is not finite")
        sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample.to(torch.int64)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(sample.cpu().numpy()).tobytes())
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index} {token}\n".encode())
    return digest.hexdigest()


def tokens(tokenizer: Any, *, writes: bool = False) -> str:
    """SHA-256 of the token ids that a tokenizer gives for `PROBES` and its special tokens, and of its truncation side.
    writes: also of the texts that it decodes from these ids and some others."""
    special = sorted({str(token) for token in tokenizer.all_special_tokens})
    texts = [*PROBES, " ".join(special), "".join(f"a{token} b" for token in special)]
    rows = [list(map(int, tokenizer(text, truncation=False, verbose=False)["input_ids"])) for text in texts]
    seen: list[Any] = [rows, tokenizer.truncation_side]
    if writes:
        known = sorted(tokenizer.get_vocab().values())
        some = [int(index) for index in known[:: max(1, len(known) // 256)]]
        seen.append(tokenizer.batch_decode([*rows, some], skip_special_tokens=True))
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def generation(config: Any, ends: Sequence[int], start: int | None) -> str:
    """What determines generation, as JSON: the end tokens, the decoder's start token, and other settings of the
    `generation_config`. (One string, so that an absent penalty counts as absent rather than unknown.)"""
    asked = {} if config is None else config.to_diff_dict()
    asked = {name: value for name, value in asked.items() if name not in OVERRULED and value is not None}
    return json.dumps({"ends": list(ends), "start": start, **dict(_flat(asked, ""))})


def settings(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Settings of a configuration (`to_dict()`) that affect answers: name -> JSON scalar, or a list of them.

    Names of nested settings are joined by dots. Settings that are None are omitted (libraries fill them in), except a
    sliding window, for which None means that there is none.
    """
    found = {}
    for name, value in _flat(config, ""):
        if _NEITHER.fullmatch(name) or (kind == "causal" and name == "pad_token_id"):
            continue
        if value is not None or name == "sliding_window":
            found[name] = value
    return found


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in sorted(values.items(), key=lambda item: str(item[0])):
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield name, [_scalar(each) for each in value]
        else:
            yield name, _scalar(value)


def _scalar(value: Any) -> Any:
    """Convert to a JSON scalar that keeps every bit of a float."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)
