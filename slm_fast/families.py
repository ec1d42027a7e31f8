"""Table of model families: where a model's layers are, and which modules in a layer the users' words stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_TARGETS = ("query", "value", "out", "up", "down")


@dataclass(frozen=True)
class Family:
    """What differs between model families.

    Attributes:
        kind: "encoder" (answers with heads), "seq2seq" or "causal" (generate their answers).
        model_types: the `model_type`s in transformers' configurations.
        auto_class: the class of transformers that loads a model.
        layers: the trunk's layers, which the query's taps read.
        linears: word -> pattern of its modules inside one layer. A fused projection has several words, joined by "+" in
            the order of its output features.
        upper: layers entirely above the trunk (a decoder), if any.
        loop: whether this package's generation loop supports its KV cache; else transformers' `generate` is used.
        found: whether it was found by structure (structure.py) rather than in the table.
    """

    kind: str
    model_types: tuple[str, ...]
    auto_class: str
    layers: str
    linears: Mapping[str, str]
    upper: str | None = None
    loop: bool = True
    found: bool = False

    @property
    def words(self) -> list[str]:
        """Words of all layers that can be adapted."""
        return [word for key in self.linears for word in key.split("+")]

    @property
    def targets(self) -> tuple[str, ...]:
        """Words of the layers that are adapted by default."""
        return tuple(self.words if self.found else [word for word in DEFAULT_TARGETS if word in self.words])

    def pattern(self, word: str) -> tuple[str, tuple[str, ...]]:
        """The pattern of a word's modules, and the words that share them (only this one if they are not fused)."""
        return next((p, tuple(key.split("+"))) for key, p in self.linears.items() if word in key.split("+"))


_BERT = {
    "query": r"attention\.self\.query",
    "key": r"attention\.self\.key",
    "value": r"attention\.self\.value",
    "out": r"attention\.output\.dense",
    "up": r"intermediate\.dense",
    "down": r"output\.dense",
}
_ATTENTION = {
    "query": r"self_attn\.q_proj",
    "key": r"self_attn\.k_proj",
    "value": r"self_attn\.v_proj",
    "out": r"self_attn\.o_proj",
}
_GATED = {"gate": r"mlp\.gate_proj", "up": r"mlp\.up_proj", "down": r"mlp\.down_proj"}
_CAUSAL = "AutoModelForCausalLM"
_SEQ2SEQ = "AutoModelForSeq2SeqLM"

FAMILIES = (
    Family("encoder", ("bert", "roberta", "xlm-roberta", "camembert", "electra"), "AutoModel", "encoder.layer", _BERT),
    Family(
        "encoder",
        ("distilbert",),
        "AutoModel",
        "transformer.layer",
        {
            "query": r"attention\.q_lin",
            "key": r"attention\.k_lin",
            "value": r"attention\.v_lin",
            "out": r"attention\.out_lin",
            "up": r"ffn\.lin1",
            "down": r"ffn\.lin2",
        },
    ),
    Family(
        "encoder",
        ("modernbert",),
        "AutoModel",
        "layers",
        # The activated half of Wi corresponds to LLaMA's gate, although ModernBERT gives the other half this name.
        {"query+key+value": r"attn\.Wqkv", "out": r"attn\.Wo", "gate+up": r"mlp\.Wi", "down": r"mlp\.Wo"},
    ),
    Family(
        "encoder",
        ("deberta-v2",),
        "AutoModel",
        "encoder.layer",
        _BERT | {word: rf"attention\.self\.{word}_proj" for word in ("query", "key", "value")},
    ),
    Family(
        "encoder",
        ("mpnet",),
        "AutoModel",
        "encoder.layer",
        _BERT
        | {
            "query": r"attention\.attn\.q",
            "key": r"attention\.attn\.k",
            "value": r"attention\.attn\.v",
            "out": r"attention\.attn\.o",
        },
    ),
    Family(
        "seq2seq",
        ("t5", "mt5", "umt5"),
        _SEQ2SEQ,
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
        "seq2seq",
        ("bart",),
        _SEQ2SEQ,
        "model.encoder.layers",
        {
            "query": r"\w+_attn\.q_proj",
            "key": r"\w+_attn\.k_proj",
            "value": r"\w+_attn\.v_proj",
            "out": r"\w+_attn\.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
        upper="model.decoder.layers",
        loop=False,  # its decoder counts positions of all rows from the same start
    ),
    Family(
        "causal",
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"),
            *("smollm3", "olmo2", "granite"),
        ),
        _CAUSAL,
        "model.layers",
        _ATTENTION | _GATED,
    ),
    Family("causal", ("qwen3_moe",), _CAUSAL, "model.layers", _ATTENTION),  # its experts are not linear layers
    Family(
        "causal",
        ("phi",),
        _CAUSAL,
        "model.layers",
        _ATTENTION | {"out": r"self_attn\.dense", "up": r"mlp\.fc1", "down": r"mlp\.fc2"},
    ),
    Family(
        "causal",
        ("phi3",),
        _CAUSAL,
        "model.layers",
        {
            "query+key+value": r"self_attn\.qkv_proj",
            "out": r"self_attn\.o_proj",
            "gate+up": r"mlp\.gate_up_proj",
            "down": r"mlp\.down_proj",
        },
    ),
    Family(
        "causal",
        ("gpt2",),
        _CAUSAL,
        "transformer.h",
        {"query+key+value": r"attn\.c_attn", "out": r"attn\.c_proj", "up": r"mlp\.c_fc", "down": r"mlp\.c_proj"},
    ),
)


def family_of(model_type: str) -> Family | None:
    """The family of a model type; None if it is not in the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
