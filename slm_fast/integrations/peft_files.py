"""LoRA adapters in PEFT's format, read without PEFT. Those that cannot be imported are refused with advice."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError, WorkError, lacks_memory, one_line
from slm_fast.fields import TEXT, Unfit, check, list_of, or_null, read_json
from slm_fast.schema import ADAPTER
from slm_fast.task_file import tensors_of

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OWN, OWN_HEAD = "slm_fast.json", "slm_fast_head.safetensors"  # files that our exports add to PEFT's
PREFIX = "base_model.model."
MODELS = re.compile(r"(model|pytorch_model|consolidated)\b.*\.(safetensors|bin|pth|index\.json)|.*\.gguf")
TOKENIZER, VOCABULARIES = "tokenizer.json", ("vocab.json", "vocab.txt", "added_tokens.json")
UNREAD = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")  # vocabularies of SentencePiece
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
FILES_BESIDE = (*SETTINGS, TOKENIZER, *VOCABULARIES, *UNREAD)
OWN_FIELDS = {"labels": or_null(list_of(TEXT)), "prompt": ADAPTER["prompt"], "pooling": ADAPTER["pooling"]}
AGAIN = "save the adapter again, or download it again"

# Fields that are used, or only say how the adapter was trained. Modules and their ranks are taken from the weights.
USED = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("fan_in_fan_out", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save"),
    *("init_lora_weights", "eva_config", "runtime_config"),
}
# What PEFT writes for unused fields, unless it is null, false or empty.
DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}
MERGE = "merge the adapter into its base model with PEFT's merge_and_unload, or train it without this option"
REASONS = {
    "use_dora": f"DoRA scales the columns of the weight, too; {MERGE}",
    "use_qalora": f"QALoRA pools the inputs; {MERGE}",
    "use_bdlora": f"its matrices are block-diagonal; {MERGE}",
    "lora_bias": f"its increments have biases; {MERGE}",
    "alora_invocation_tokens": "it acts on some tokens only, those after its invocation; train it without this option",
    "layer_replication": "it repeats layers of its base; there is no such base here",
    "trainable_token_indices": "it trains embeddings; train the adapter without them",
    "target_parameters": f"it adapts parameters that are no linear layers; {MERGE}",
    "arrow_config": "it routes among adapters of its own; import those one by one",
    "kasa_config": f"KaSA changes the formula; {MERGE}",
    "loftq_config": f"LoftQ changed the base's weights; {MERGE}",
    "corda_config": f"CorDA changed the base's weights; {MERGE}",
    "lora_ga_config": f"LoRA-GA changed the base's weights; {MERGE}",
}
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that do not change the base
UNDONE_INITS = ("pissa", "olora", "corda", "lora_ga")  # those whose change PEFT can undo
UNDO = "save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), which undoes that"
TASK_TYPES = ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_ALPHA = 1e12
VIRTUAL = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
OTHERS = (  # pattern of a tensor's name -> what it is part of
    (r"lora_embedding_[AB]|embed|(^|\.)(shared|wte|wpe)\.", "trained embeddings"),
    (r"lora_magnitude_vector", "DoRA's magnitudes"),
    (r"lora_B(\.default)?\.bias", "biases of increments"),
    (r"(^|\.)lm_head\.|(^|\.)(embed_out|output_layer)\.", "a trained output layer"),
    (r"(?<!head\.)norm|(^|\.)ln_", "trained norms"),  # the norm of a head may be supported
    (r"lora_", "a variant of LoRA"),
)


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter as read from its folder.

    Attributes:
        source: the path or name it was requested by.
        folder: where its files are.
        config: content of adapter_config.json.
        lora: module name without PEFT's prefix -> (lora_A [r, I], lora_B [O, r]).
        saved: everything else that was trained with it, such as a head: name -> tensor.
        own: what an export of this package adds (slm_fast.json).
        digest: SHA-256 of its configuration and weights.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    lora: Mapping[str, tuple[Tensor, Tensor]]
    saved: Mapping[str, Tensor]
    own: Mapping[str, Any]
    digest: str

    def scaling(self, module: str) -> float:
        """Scaling factor of a module's increments: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        alpha, rank = self.config.get("lora_alpha", 8), self.lora[module][0].shape[0]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as in PEFT, the first match counts
                alpha = value
                break
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)

    @property
    def made_for(self) -> str:
        """The base it was made for, as a clause for error messages."""
        base = self.config.get("base_model_name_or_path")
        return f"the adapter was made for {base!r}" if base else "the adapter was made for another base"


def read_adapter(source: str | Path) -> PeftAdapter:
    """Read a LoRA adapter from a folder, or from the hub by its name.

    Raises:
        InputError: there is none, or it cannot be imported. The message names the field and what to do, in one line.
        WorkError: its files are damaged, or hold numbers that are not finite.
    """
    source = str(source)
    if not source:
        raise InputError("adapter: empty path; name its folder, or its name on the hub")
    folder, names = _folder(source)
    file = folder / CONFIG
    models = sorted(name for name in names if MODELS.fullmatch(name))
    if not file.exists():
        what = f"; {models[0]} there is a full model, which is a backbone" if models else ""
        raise InputError(f"adapter {source!r}: no {CONFIG}{what}; expected a folder that PEFT's save_pretrained wrote")
    if models:
        raise InputError(
            f"adapter {source!r}: holds a full model ({models[0]}) and an adapter; put them in two folders"
        )
    config = _json(file)
    check_config(config, file)
    if not (folder / WEIGHTS).exists():
        pickled = f"; {PICKLED} is pickled: load it with PEFT and save it again" if PICKLED in names else ""
        raise InputError(f"adapter {source!r}: no {WEIGHTS}{pickled}")
    lora, saved = _sorted_out(_tensors(folder / WEIGHTS), folder / WEIGHTS)
    own = _json(folder / OWN) if (folder / OWN).exists() else {}
    check_own(own, folder / OWN)
    if (folder / OWN_HEAD).exists():
        saved |= _tensors(folder / OWN_HEAD)
    digest = hashlib.sha256()
    for part in (CONFIG, WEIGHTS, OWN, OWN_HEAD):
        if (folder / part).exists():
            digest.update(hashlib.sha256((folder / part).read_bytes()).digest())
    return PeftAdapter(source, folder, config, lora, saved, own, digest.hexdigest())


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise InputError for the first field of an adapter's configuration that requires more than LoRA."""
    kind = config.get("peft_type")
    if kind in VIRTUAL:
        raise InputError(
            f"{file}: peft_type {kind}: it trains virtual tokens, not layers; train a LoRA adapter instead"
        )
    if kind != "LORA":
        raise InputError(f"{file}: peft_type: expected LORA, got {kind!r}; train a LoRA adapter instead")
    task, mapping = config.get("task_type"), config.get("auto_mapping")  # PEFT writes the latter if there is no task
    if task and task not in TASK_TYPES:
        wanted = f"{', '.join(TASK_TYPES[:-1])} or {TASK_TYPES[-1]}"
        raise InputError(f"{file}: task_type: expected {wanted}, got {task!r:.80}; train an adapter that answers texts")
    trained = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    if trained.endswith(OTHER_HEADS):
        raise InputError(
            f"{file}: auto_mapping: trained as {trained:.80}, whose head does not answer texts; train it as SEQ_CLS"
        )
    if config.get("bias", "none") != "none":
        why = ": it trains biases" if config["bias"] in ("all", "lora_only") else ""
        raise InputError(f"{file}: bias: expected 'none', got {config['bias']!r:.80}{why}; {MERGE}")
    init = config.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in PLAIN_INITS):
        hint = UNDO if isinstance(init, str) and init.startswith(UNDONE_INITS) else MERGE
        raise InputError(f"{file}: init_lora_weights {init!r}: may have changed the base's weights; {hint}")
    for field, value in config.items():
        idle = value is None or value is False or value in ("", [], {}) or value == DEFAULTS.get(field)
        if field not in USED and not idle:
            reason = REASONS.get(field, f"not known, and may change what the adapter does; {MERGE}")
            raise InputError(f"{file}: {field}: {reason}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{file}: alpha_pattern: expected numbers by module, got {patterns!r:.80}; {AGAIN}")
    for alpha in (config.get("lora_alpha", 8), *patterns.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= LARGEST_ALPHA:
            most = f"expected numbers up to {LARGEST_ALPHA:g}"
            raise InputError(f"{file}: lora_alpha, alpha_pattern: {most}, got {alpha!r:.80}; {AGAIN}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{file}: alpha_pattern: {pattern!r} is no regular expression: {error}") from None


def check_own(own: Mapping[str, Any], file: Path) -> None:
    """Raise WorkError unless the fields that our exports add are as they write them."""
    try:
        for field, kind in OWN_FIELDS.items():
            if field in own:
                check(own[field], field, kind)
    except Unfit as error:
        raise WorkError(f"{file}: {error}; {AGAIN}") from None
    ranks = own.get("ranks", {})  # numbers by the layers of fused modules
    modules = ranks.values() if isinstance(ranks, dict) else [None]
    counts = [count for parts in modules for count in (parts.values() if isinstance(parts, dict) else [None])]
    if not all(isinstance(count, int) and 0 <= count <= 2**20 for count in counts):
        raise WorkError(f"{file}: ranks: expected numbers by module and layer, got {ranks!r:.80}; {AGAIN}")


def _folder(source: str) -> tuple[Path, set[str]]:
    """The folder of an adapter's files, and the names of all files that the adapter has there or on the hub."""
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return path, {file.name for file in path.iterdir()}
    if path.exists():
        raise InputError(f"adapter {source!r}: is a file, expected a folder with {CONFIG}")
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.parent.is_dir():
        raise InputError(f"adapter {source!r}: no such folder")
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS, OWN, OWN_HEAD, *FILES_BESIDE]))
    except Exception as error:  # whatever the hub's client raises for a name, a network, a permission
        raise InputError(f"adapter {source!r}: cannot be downloaded from the hub: {one_line(error)}") from None
    try:
        return folder, set(list_repo_files(source))
    except Exception:  # offline, with the files in the client's cache
        return folder, {file.name for file in folder.iterdir()}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise WorkError(f"{file}: cannot be read: {one_line(error)}; {AGAIN}") from None
    if not isinstance(content, dict):
        raise WorkError(f"{file}: expected a JSON object, got {type(content).__name__}; {AGAIN}")
    return content


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return tensors_of(file.read_bytes())
    except Exception as error:  # the library raises various errors for a corrupt header
        if lacks_memory(error):
            raise
        raise WorkError(f"{file}: damaged: {one_line(error)}; {AGAIN}") from None


def _sorted_out(
    tensors: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Split tensors into increments by module, and everything else that was saved."""
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{file}: {key}: expected numbers in float16, bfloat16 or float32, got {dtype}; {AGAIN}")
        if not tensor.isfinite().all():
            raise WorkError(f"{file}: {key}: holds a number that is not finite; {AGAIN}")
        name = key.removeprefix(PREFIX)
        if match := HALF.fullmatch(name):
            halves.setdefault(match["module"], {})[match["half"]] = tensor
            continue
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
        for pattern, what in OTHERS:
            if re.search(pattern, name, re.IGNORECASE if what == "trained norms" else 0):
                raise InputError(f"{file}: {key}: {what}, which cannot be imported; train the adapter without that")
        saved[name] = tensor
    lora = {}
    for module, found in sorted(halves.items()):
        if found.keys() != {"A", "B"}:
            raise WorkError(
                f"{file}: {module}: has lora_{next(iter(found))} alone, expected lora_A and lora_B; {AGAIN}"
            )
        lora_a, lora_b = found["A"], found["B"]
        if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
            shapes = f"{list(lora_a.shape)} and {list(lora_b.shape)}"
            raise WorkError(f"{file}: {module}: expected lora_A [r, I] and lora_B [O, r], got {shapes}; {AGAIN}")
        if lora_a.shape[0] == 0:
            raise WorkError(f"{file}: {module}: rank 0, expected at least 1; {AGAIN}")
        lora[module] = lora_a, lora_b
    if not lora:
        raise InputError(f"{file}: no increments (lora_A and lora_B) in it; expected a LoRA adapter")
    return lora, saved


# Files beside an adapter


def check_vocabulary(folder: Path, known: Mapping[str, int]) -> None:
    """Compare the vocabulary beside an adapter, if any, with the backbone's, `known`.

    Raises:
        InputError: one of its tokens has another id in the backbone, or none.
        WorkError: its file is damaged.
    """
    for name in (TOKENIZER,) if (folder / TOKENIZER).exists() else VOCABULARIES:
        file = folder / name
        for word, index in (_tokens_of(file) if file.exists() else {}).items():
            if known.get(word) != index:
                has, advice = "no such token", "if its texts do without that token, delete the file"
                if word in known:
                    has, advice = f"id {known[word]}", "open the backbone it was trained on"
                raise InputError(
                    f"{file}: token {word!r} has id {index}, the backbone has {has}; the adapter is for another "
                    f"vocabulary: {advice}"
                )


def _tokens_of(file: Path) -> dict[str, Any]:
    """The tokens in one of a tokenizer's files, with their ids. Raises WorkError if it is damaged."""
    if file.suffix == ".txt":  # a token in each line
        try:
            lines = file.read_text("utf-8").removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise WorkError(f"{file}: cannot be read: {one_line(error)}; {AGAIN}") from None
        return {word: i for i, word in enumerate(lines)}
    content = _json(file)
    if file.name != TOKENIZER:
        return content
    try:
        words = (content.get("model") or {}).get("vocab") or {}
        found = dict(words) if isinstance(words, Mapping) else {str(word): i for i, (word, *_) in enumerate(words)}
        return found | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise WorkError(f"{file}: is not as the tokenizers library writes it; {AGAIN}") from None


def unread_vocabulary(folder: Path) -> str | None:
    """A file with the only vocabulary beside an adapter, if it is in a format that is not read here."""
    if any((folder / name).exists() for name in (TOKENIZER, *VOCABULARIES)):
        return None
    return next((name for name in UNREAD if (folder / name).exists()), None)


def chat_template(folder: Path) -> str | None:
    """The chat template in an adapter's folder, if any. Raises WorkError if it cannot be read."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text("utf-8") or None
        except (OSError, ValueError) as error:
            raise WorkError(f"{file}: cannot be read: {one_line(error)}; {AGAIN}") from None
    file = folder / "tokenizer_config.json"
    found = _json(file).get("chat_template") if file.exists() else None
    if isinstance(found, list):  # several, by name
        named = [one for one in found if isinstance(one, dict)]
        found = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return found if isinstance(found, str) and found else None


def generation_settings(folder: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The content of an adapter's own generation_config.json, if it has one, and the end tokens in it. Raises WorkError
    if it is damaged."""
    file = folder / "generation_config.json"
    found = _json(file) if file.exists() else {}
    given = found.get("eos_token_id")
    ends = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise WorkError(f"{file}: eos_token_id: expected ids of tokens, got {given!r:.80}; {AGAIN}")
    return found, tuple(sorted(set(ends)))


def labels_of(folder: Path, count: int) -> list[str] | None:
    """The labels that a config.json beside an adapter names, if there are `count` of them."""
    file = folder / "config.json"
    names = _json(file).get("id2label") if file.exists() else None
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(count)}:
        return None
    found = [str(name) if type(name) is int else name for name in (names[str(i)] for i in range(count))]
    if not list_of(TEXT)[1](found):
        raise WorkError(f"{file}: id2label: expected words, got {names!r:.80}; name the labels with labels= (--labels)")
    return found


def as_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
