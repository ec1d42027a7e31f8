"""DTKR + Adapter: DTKR retrieves prefix keys and values for each attention layer, behind a gate that starts at zero.

Sources: the paper's ablation (SLM, ICLR 2024, Section 4.4 and A.5), with adapters (Li & Liang, Prefix-Tuning, 2021) in
place of weight increments, gated as in Zhang et al., LLaMA-Adapter, 2023 (the paper's Eq. 11). A layer's output becomes

    softmax(q K' / sqrt(d)) V + tanh(g) softmax(q K_p' / sqrt(d)) V_p

with one gate per head. One softmax runs over the prefixes of all retrieved slots, and the share of each vector is
scaled by the gate of its slot. Route weights are not used. `dtkr.py` describes what all DTKR values share, and its
departures. Ten vectors per slot and the learning rate of 9e-3 are LLaMA-Adapter's.

Departures from LLaMA-Adapter:

- Keys and values are learned directly, as in prefix-tuning but without its MLP. They are not vectors passed through the
  layer's frozen projections.
- All layers have a prefix, not the upper 30 of 32.
- Schedule, batch size and weight decay are those of all rivals here.
- T5 is not supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.continual.methods.common import Classifier, Writer
from benchmarks.continual.methods.dtkr import SLOTS, Dtkr, Query
from benchmarks.continual.methods.method import Setup
from slm_fast.backbone import Backbone
from slm_fast.data import Row

LENGTH = 10
LEARNING_RATE = 9e-3


class Prefix(NamedTuple):
    """A batch's prefixes in one layer: keys, values [B, L, G, D] (G key-value heads) and gate [B, L, N] (N heads)."""

    keys: Tensor
    values: Tensor
    gate: Tensor


def prefix_attention(query: Tensor, prefix: Prefix, scaling: float) -> Tensor:
    """What the prefixes add to the attention output: query [B, N, T, D] -> [B, T, N, D]."""
    repeats = query.shape[1] // prefix.keys.shape[2]
    keys, values = (each.repeat_interleave(repeats, 2) for each in (prefix.keys, prefix.values))
    share_BNTL = (scaling * torch.einsum("bntd,blnd->bntl", query.float(), keys)).softmax(-1)
    share_BNTL = share_BNTL * prefix.gate.tanh().transpose(1, 2).unsqueeze(2)
    return torch.einsum("bntl,blnd->btnd", share_BNTL, values).to(query.dtype)


def attend_to_prefixes(model: Any) -> None:
    """Make a model's attention transformers' own, plus the contribution of a module's `prefix` if it has one."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # slow imports
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        output, _ = plain(module, query, key, value, attention_mask, **options)
        prefix = getattr(module, "prefix", None)
        return (output if prefix is None else output + prefix_attention(query, prefix, options["scaling"])), None

    ALL_ATTENTION_FUNCTIONS.register("gated_prefix", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("gated_prefix", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("gated_prefix")


class DtkrAdapter(Dtkr):
    """A `Method`. A slot's values: "keys" and "values" [layers, L, G, D], "gate" [layers, N]."""

    def __init__(self, setup: Setup, *, length: int = LENGTH, query: Query | None = None) -> None:
        backbone = Backbone.load(setup.backbone)
        super().__init__(setup, replace(setup.options, learning_rate=LEARNING_RATE), backbone, query)
        self.length = length
        attend_to_prefixes(backbone.model)
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
        """Within the block, the backbone's attention reads the prefixes on the batch's route."""
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
    """A classifier whose backbone reads the prefixes on the batch's route."""

    def __init__(self, method: DtkrAdapter, labels: Sequence[str], seed: int) -> None:
        super().__init__(method.backbone, labels, method.setup.max_length, seed)
        self.method = method

    def features(self, rows: Sequence[Row]) -> Tensor:
        with self.method.prefixed():
            return super().features(rows)


class PrefixedWriter(Writer):
    """A writer whose backbone reads the prefixes on the batch's route."""

    def __init__(self, method: DtkrAdapter) -> None:
        super().__init__(method.backbone, method.setup.max_length, method.setup.max_new_tokens)
        self.method = method

    def losses(self, rows: Sequence[Row]) -> Tensor:
        with self.method.prefixed():
            return super().losses(rows)

    def answers(self, rows: Sequence[Row]) -> list[str]:
        with self.method.prefixed():
            return super().answers(rows)
