"""Frozen states of rows, the input of task identifiers: one pass through the whole backbone serves all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slm_fast.backbone import Backbone
from slm_fast.batching import length_buckets
from slm_fast.data import Row
from slm_fast.query import TrunkQuery, default_taps

TOKENS = 2048  # per batch, padding included


class States(NamedTuple):
    """Frozen states of N rows, all float32.

    Attributes:
        query: [N, D], what slm_fast routes on, means first.
        means: how many of these numbers are means.
        last: [N, H], the mean over real tokens of the last hidden state.
    """

    query: Tensor
    means: int
    last: Tensor

    def read(self, what: str) -> Tensor:
        """The query's "means", the whole "query" (means and maxima) or the "last" state: [N, numbers]."""
        return {"means": self.query[:, : self.means], "query": self.query, "last": self.last}[what]


@torch.inference_mode()
def states(backbone: Backbone, rows: Sequence[Row], max_length: int, work: Path | None = None) -> States:
    """The frozen states of rows' inputs, cached in the folder `work`."""
    texts = [row.query_text("input") for row in rows]
    model = backbone.model
    trunk = TrunkQuery(default_taps(model.config.num_hidden_layers), backbone.width, backbone.device, maximum=True)
    known = json.dumps([backbone.fingerprint, trunk.taps, max_length, texts]).encode()
    path = work / f"{hashlib.sha256(known).hexdigest()[:32]}.safetensors" if work else None
    if path and path.exists():
        found = load_file(path)
        return States(found["query"], trunk.means, found["last"])
    query, last = torch.empty(len(texts), trunk.width), torch.empty(len(texts), backbone.width)
    tokens, _ = backbone.tokenization.tokenize(texts, max_length)
    for chosen in length_buckets([len(row) for row in tokens], TOKENS):
        encoded = backbone.tokenization.encode([texts[i] for i in chosen], max_length)
        mask = encoded.attention_mask
        hidden = model(input_ids=encoded.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        pooled: list[Tensor] = []
        for tap in trunk.taps:
            trunk.read(hidden[tap], mask, pooled)
        query[chosen], last[chosen] = trunk.join(pooled), trunk.pool(hidden[-1], mask)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file({"query": query, "last": last}, unfinished)
        unfinished.replace(path)
    return States(query, trunk.means, last)
