"""Random LoRA adapters made by PEFT on the tiny backbones of `models.py`, and reference outputs for them."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from models import KNOWN, make_model, make_slm, make_tokenizer, sentence
from torch import Tensor, nn

from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.integrations.peft_check import twin

TINY = {
    "bert": ("query", "value", "intermediate.dense"),
    "roberta": ("query", "key", "output.dense"),
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen2": ("k_proj", "o_proj", "gate_proj"),
    "t5": ("q", "v", "wo"),
    "phi3": ("qkv_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "camembert": ("query", "value"),
    "mpnet": ("q", "v"),
    "electra": ("query", "value"),
    "distilbert": ("q_lin", "v_lin", "lin1"),
    "deberta-v2": ("query_proj", "value_proj"),
    "modernbert": ("Wqkv", "Wo", "Wi"),
    "xlm-roberta": ("query", "value", "output.dense"),
    **dict.fromkeys(("mistral", "qwen3", "gemma2"), ("q_proj", "v_proj", "up_proj")),
    **dict.fromkeys(("gemma3_text", "smollm3", "olmo2", "granite"), ("k_proj", "o_proj", "gate_proj", "down_proj")),
    "qwen3_moe": ("q_proj", "k_proj", "o_proj"),
    "phi": ("q_proj", "dense", "fc2"),
    **dict.fromkeys(("mt5", "umt5"), ("q", "o", "wi_1")),
    "bart": ("q_proj", "out_proj", "fc1"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h"),
    "opt": ("q_proj", "v_proj", "out_proj"),
}


def base_of(name: str, labels: int | None = None) -> Any:
    """The base model that PEFT adapts: a backbone of `models.py`; with `labels`, in its sequence classification class
    with a random head of fixed seed."""
    if labels is None:
        return make_model(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return twin(make_slm(name).model.backbone, labels)


def write_adapter(
    folder: Path, name: str, *, labels: int | None = None, seed: int = 0, scale: float = 0.3, **config: Any
) -> Any:
    """Let PEFT save a random adapter to a folder; returns the PEFT model."""
    encoder = KNOWN[name][0] == "encoder"
    labels = 3 if encoder and labels is None else labels
    config = {"r": 4, "target_modules": list(TINY.get(name, ())), **config}
    if labels is not None:
        config["task_type"] = "SEQ_CLS"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_of(name, labels), peft.LoraConfig(**config)).eval()
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = scale * torch.randn(parameter.shape, generator=generator)
            elif "modules_to_save" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return model


def loaded(folder: Path, name: str, labels: int | None = None) -> Any:
    """The adapter in a folder, loaded by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base_of(name, labels), str(folder)).eval()


@torch.no_grad()
def logits_of(model: nn.Module, name: str, text: str) -> Tensor:
    """Logits of a transformers model for one unpadded text."""
    ids = torch.tensor([make_tokenizer(name)(text)["input_ids"]])
    start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.int64)} if KNOWN[name][0] == "seq2seq" else {}
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **start).logits
    return logits


@torch.no_grad()
def written_by(model: Any, name: str, text: str, *, beams: int = 1, tokens: int = 6) -> str:
    """Text that a transformers model generates for a prompt."""
    tokenizer = make_tokenizer(name)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    settings = {"max_new_tokens": tokens, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    new = out[0, ids.shape[1] if KNOWN[name][0] == "causal" else 1 :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def texts(topic: str, count: int = 24, seed: int = 0) -> list[str]:
    rng = random.Random(f"{topic}/{seed}")
    return [sentence(topic, rng) for _ in range(count)]


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply `change` to an adapter's configuration file."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@torch.no_grad()
def our_logits(slm: ScalableLM, text: str, task: str) -> Tensor:
    """Logits of an adapted generative backbone for one text, routed to a task, without a separator after the prompt."""
    model = slm.model
    rows = slm.model.backbone.tokenization.tokenize([Row(text).prompt], 128, separator=False)[0]
    encoded = model.backbone.tokenization.collate(rows)
    route = model.find_routes(encoded, slot_mask=model.pool.slots_of(task))
    inputs = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
    if model.backbone.kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.int64)
    out, _, _ = model.call(lambda: model.backbone.model(**inputs), encoded.attention_mask, route)
    logits: Tensor = out.logits
    return logits


def probabilities(slm: ScalableLM, rows: Sequence[str], task: str | None = None) -> Tensor:
    """Probabilities [N, C] from `predict`, labels in alphabetical order."""
    found = slm.predict(rows, top_k=None, task=task)
    words = sorted({word for one in found for word in one.probabilities or {}})
    return torch.tensor([[(one.probabilities or {}).get(word, 0.0) for word in words] for one in found])
