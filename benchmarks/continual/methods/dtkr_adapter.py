"""DTKR + Adapter: what DTKR retrieves is prefix keys and values for each attention layer, behind a gate that begins at
zero.

The paper's ablation (SLM, ICLR 2024, Section 4.4 and A.5): adapters (Li & Liang, Prefix-Tuning, 2021) in place of
weight increments, with the gate of Zhang et al., LLaMA-Adapter, 2023 (the paper's Eq. 11). A layer's output becomes

    softmax(q K' / sqrt(d)) V + tanh(g) softmax(q K_p' / sqrt(d)) V_p

with one gate a head. The prefixes of the retrieved slots are softmaxed together, and each vector's share is scaled by
the gate of its own slot; weights of the route have no part in it. What it shares with all values of DTKR, and where
that departs from the paper, is in `dtkr.py`.

Ten vectors a slot and the rate 9e-3, as LLaMA-Adapter. Departures from it: keys and values are learned themselves, as
in prefix-tuning but without its MLP, not vectors that pass through the layer's frozen projections; all layers have a
prefix, not the upper 30 of 32; schedule, batches and weight decay are those of all rivals here. T5 is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.continual.methods.common import Classifier, Writer
from benchmarks.continual.methods.dtkr import SLOTS, Dtkr, Query
from benchmarks.continual.methods.method import Setup
from slm_fast.backbone import Backbone
from slm_fast.data import Row

LENGTH = 10
LEARNING_RATE = 9e-3


class Prefix(NamedTuple):
    """Of a batch, in one layer: keys and values [B, L, G, D] for G key-value heads, gate [B, L, N] for N heads."""

    keys: Tensor
    values: Tensor
    gate: Tensor


def prefix_attention(query: Tensor, prefix: Prefix, scaling: float) -> Tensor:
    """What prefixes add to the attention's output: query [B, N, T, D] -> [B, T, N, D]."""
    repeats = query.shape[1] // prefix.keys.shape[2]
    keys, values = (each.repeat_interleave(repeats, 2) for each in (prefix.keys, prefix.values))
    share_BNTL = (scaling * torch.einsum("bntd,blnd->bntl", query.float(), keys)).softmax(-1)
    share_BNTL = share_BNTL * prefix.gate.tanh().transpose(1, 2).unsqueeze(2)
    return torch.einsum("bntl,blnd->btnd", share_BNTL, values).to(query.dtype)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' own attention, and what the module's `prefix` adds to it, if it has one."""
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    prefix = getattr(module, "prefix", None)
    return (output if prefix is None else output + prefix_attention(query, prefix, options["scaling"])), None


ALL_ATTENTION_FUNCTIONS.register("gated_prefix", attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("gated_prefix", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class DtkrAdapter(Dtkr):
    """A `Method`. A slot's values: "keys" and "values" [layers, L, G, D], "gate" [layers, N]."""

    def __init__(self, setup: Setup, *, length: int = LENGTH, query: Query | None = None) -> None:
        backbone = Backbone.load(setup.backbone)
        super().__init__(setup, replace(setup.options, learning_rate=LEARNING_RATE), backbone, query)
        self.length = length
        backbone.model.set_attn_implementation("gated_prefix")
        encoder = backbone.kind == "encoder"
        self.attentions: list[Any] = [
            layer.get_submodule("attention.self" if encoder else "self_attn") for layer in backbone.layers
        ]

    def new_values(self, seed: int) -> dict[str, Tensor]:
        config, generator = self.backbone.model.config, torch.Generator().manual_seed(seed)
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or self.backbone.width // heads
        shape, device = (SLOTS, len(self.attentions), self.length, groups, width), self.backbone.device
        return {
            "keys": torch.randn(shape, generator=generator).to(device),
            "values": torch.randn(shape, generator=generator).to(device),
            "gate": torch.zeros(SLOTS, len(self.attentions), heads, device=device),
        }

    def new_model(self, labels: Sequence[str], seed: int) -> Classifier | Writer:
        if self.backbone.kind == "encoder":
            return PrefixedClassifier(self, labels, seed)
        return PrefixedWriter(self)

    @contextmanager
    def prefixed(self) -> Iterator[None]:
        """Inside the block the backbone's attention reads the prefixes of the batch's route."""
        keys, values = self.gather("keys"), self.gather("values")  # [B, K, layers, L, G, D]
        gate = self.gather("gate").unsqueeze(3).expand(-1, -1, -1, self.length, -1)  # [B, K, layers, L, N]
        try:
            for i, attention in enumerate(self.attentions):
                attention.prefix = Prefix(*(each[:, :, i].flatten(1, 2) for each in (keys, values, gate)))
            yield
        finally:
            for attention in self.attentions:
                attention.prefix = None


class PrefixedClassifier(Classifier):
    """A classifier whose backbone reads the prefixes of the batch's route."""

    def __init__(self, method: DtkrAdapter, labels: Sequence[str], seed: int) -> None:
        super().__init__(method.backbone, labels, method.setup.max_length, seed)
        self.method = method

    def features(self, rows: Sequence[Row]) -> Tensor:
        with self.method.prefixed():
            return super().features(rows)


class PrefixedWriter(Writer):
    """A writer whose backbone reads the prefixes of the batch's route."""

    def __init__(self, method: DtkrAdapter) -> None:
        super().__init__(method.backbone, method.setup.max_length, method.setup.max_new_tokens)
        self.method = method

    def losses(self, rows: Sequence[Row]) -> Tensor:
        with self.method.prefixed():
            return super().losses(rows)

    def answers(self, rows: Sequence[Row]) -> list[str]:
        with self.method.prefixed():
            return super().answers(rows)
