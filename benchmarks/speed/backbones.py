"""Backbones of well-known shapes with random weights, for timing without a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from slm_fast.loading import loading, resolve

# Shape -> model class, its configuration but for the number of layers.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("BertModel", {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}),
    "t5-large": ("T5ForConditionalGeneration", {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_heads": 16}),
    "llama-2-7b": ("LlamaForCausalLM", {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}),
}
Load = Callable[[], tuple[Any, Any]]  # a transformers model and its tokenizer, which the caller may change

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = {"minilm": 6, "bert-base": 12, "t5-large": 24, "llama-2-7b": 32}


def pretrained(
    shape: str, layers: int, dtype: torch.dtype = torch.float32, *, decoder_layers: int | None = None
) -> tuple[Any, Any]:
    """A model on the GPU if there is one, and MiniLM's tokenizer, which serves all shapes.

    MiniLM is the real one. Other shapes are transformers models with random weights and `layers` layers (T5: in the
    encoder and, unless `decoder_layers` is given, as many in the decoder).
    """
    path = resolve("minilm")
    with loading():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if shape == "minilm":
            return transformers.AutoModel.from_pretrained(path, dtype=dtype).eval().to(DEVICE), tokenizer
    class_name, sizes = SHAPES[shape]
    model_class = getattr(transformers, class_name)
    tokenizer.eos_token = tokenizer.sep_token
    special: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if shape == "t5-large":
        special |= {"decoder_start_token_id": 0, "num_layers": layers, "num_decoder_layers": decoder_layers or layers}
    else:
        special |= {"num_hidden_layers": layers}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(DEVICE):  # creates large models faster
                model = model_class(model_class.config_class(**sizes, **special))
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval(), tokenizer


def sharing(model: nn.Module) -> Any:
    """A copy of a model that shares its parameters, so that many ways to use it fit in memory."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def copies(model: Any, tokenizer: Any) -> Load:
    """A function that copies a model, sharing its parameters, and its tokenizer."""
    return lambda: (sharing(model), copy.deepcopy(tokenizer))


def finished(call: Callable[[], object]) -> Callable[[], object]:
    """A call that returns only when the GPU is done."""
    if DEVICE == "cpu":
        return call

    def until_done() -> None:
        call()
        torch.cuda.synchronize()

    return until_done
