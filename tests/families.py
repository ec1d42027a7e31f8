"""Tiny configurations of the model families that models.py lacks: data only."""

from __future__ import annotations

from typing import Any

WIDTH, LAYERS, POSITIONS = 32, 3, 128
_GEMMA = {"head_dim": 8, "initializer_range": 0.2, "sliding_window": 64, "query_pre_attn_scalar": 8}

# Model type (a word after a colon names a variant) -> kind, class, settings of its configuration.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("causal", "Qwen3ForCausalLM", {"initializer_range": 0.2, "head_dim": 8}),
    "gemma3_text": (
        "causal",
        "Gemma3ForCausalLM",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma2": (
        "causal",
        "Gemma2ForCausalLM",
        {**_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "phi3": ("causal", "Phi3ForCausalLM", {"initializer_range": 0.2}),
    "gpt2": ("causal", "GPT2LMHeadModel", {"initializer_range": 0.2}),
    "distilbert": ("encoder", "DistilBertModel", {"initializer_range": 0.2}),
    "modernbert": (
        "encoder",
        "ModernBertModel",
        {"initializer_range": 0.2, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "deberta-v2": (
        "encoder",
        "DebertaV2Model",
        {
            **{
                "initializer_range": 0.2,
                "relative_attention": True,
                "position_buckets": 8,
                "norm_rel_ebd": "layer_norm",
            },
            **{"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        },
    ),
    "deberta-v2:conv": (
        "encoder",
        "DebertaV2Model",
        {
            **{"initializer_range": 0.2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
            **{"share_att_key": False, "conv_kernel_size": 3, "conv_act": "gelu"},
        },
    ),
    "electra": ("encoder", "ElectraModel", {"initializer_range": 0.2, "embedding_size": 16}),
    "mpnet": ("encoder", "MPNetModel", {"initializer_range": 0.2, "pad_token_id": 1}),
    "camembert": ("encoder", "CamembertModel", {"initializer_range": 0.2, "pad_token_id": 1}),
    "xlm-roberta": ("encoder", "XLMRobertaModel", {"initializer_range": 0.2, "pad_token_id": 1}),
    "smollm3": ("causal", "SmolLM3ForCausalLM", {"initializer_range": 0.2}),
    "olmo2": ("causal", "Olmo2ForCausalLM", {"initializer_range": 0.2}),
    "granite": (
        "causal",
        "GraniteForCausalLM",
        {"initializer_range": 0.2, "logits_scaling": 0.4, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "phi": ("causal", "PhiForCausalLM", {"initializer_range": 0.2}),
    "umt5": ("seq2seq", "UMT5ForConditionalGeneration", {"tie_word_embeddings": False}),
    "bart": (
        "seq2seq",
        "BartForConditionalGeneration",
        {"decoder_start_token_id": 1, "bos_token_id": 2, "forced_bos_token_id": None, "init_std": 0.2},
    ),
    "qwen3_moe": (
        "causal",
        "Qwen3MoeForCausalLM",
        {
            "initializer_range": 0.2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    ),
}

# Model types that are not in the table of families: layers found by structure, or model refused.
FOUND: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_neox": ("causal", "GPTNeoXForCausalLM", {"initializer_range": 0.2}),
    "opt": ("causal", "OPTForCausalLM", {"init_std": 0.2, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}),
    "xglm": (  # sinusoidal positions
        "causal",
        "XGLMForCausalLM",
        {"init_std": 0.2, "ffn_dim": 48, "attention_heads": 4, "pad_token_id": 0},
    ),
    "bloom": ("causal", "BloomForCausalLM", {"initializer_range": 0.2}),
    "deberta": (
        "encoder",
        "DebertaModel",
        {"initializer_range": 0.2, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "m2m_100": ("seq2seq", "M2M100ForConditionalGeneration", {"init_std": 0.2, "decoder_start_token_id": 0}),
    "pegasus": ("seq2seq", "PegasusForConditionalGeneration", {"init_std": 0.2, "decoder_start_token_id": 0}),
}
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert": ("encoder", "AlbertModel", {"embedding_size": 16}),  # one shared layer that runs three times
    "fnet": ("encoder", "FNetModel", {}),  # mixes padding with real tokens
    "longformer": ("encoder", "LongformerModel", {"attention_window": 8}),  # its layers see 16 tokens for 9
    "ibert": ("encoder", "IBertModel", {}),  # its linear layers take a scale, too
}
