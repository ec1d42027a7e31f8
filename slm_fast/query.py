"""Queries: one vector per input, from frozen weights.

`trunk` is ours: the backbone's own hidden states at a few early layers, so no second model or pass is needed.
`sentence` is the paper's: a frozen Sentence-BERT (Reimers & Gurevych 2019) alongside the backbone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slm_fast.backbone import Backbone
from slm_fast.errors import InputError, one_line
from slm_fast.identity import fingerprint, settings, tokens
from slm_fast.layers import use_onednn
from slm_fast.loading import GGUF, loading, located, resolve
from slm_fast.tokenization import Encoded, Tokenization

MAX_WIDTH = 1024  # wider queries are projected to this width
MAX_WIDTH_WITH_MAX = 1536  # with maxima, only those wider than this are
MAX_SCALE = 0.25  # factor of the maxima: they vary more than means, and covariance shrinkage treats both alike
DEFAULT_ENCODER = "sentence-transformers/nli-mpnet-base-v2"  # the one in the paper's released code


def default_taps(layers: int) -> tuple[int, ...]:
    """One tap a sixth of the way up and one in the middle: (1, 3) of 6 layers, (2, 6) of 12, (5, 16) of 32."""
    return tuple(sorted({round(layers / 6), layers // 2}))


def check_taps(taps: Sequence[int], layers: int) -> tuple[int, ...]:
    """The taps in ascending order. Raises InputError if they are not layer numbers."""
    if not taps or min(taps) < 0 or max(taps) >= layers:
        raise InputError(f"taps: expected layer numbers in 0..{layers - 1}, got {list(taps)}")
    return tuple(sorted(set(taps)))


def _columns(hidden: Tensor, mask: Tensor) -> tuple[slice | None, list[slice]]:
    """The tokens that are real in all rows, if they are found, and those that may be padding: they need a copy.

    With rows of similar length there are few of the latter. hidden: [B, T, H], mask: [B, T].
    """
    length = hidden.shape[1]
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        real = mask.bool().all(0).nonzero()
        if len(real) and len(real) == real[-1] - real[0] + 1:
            first, last = int(real[0]), int(real[-1]) + 1
            ends = (slice(0, first), slice(last, length))
            return slice(first, last), [part for part in ends if part.start < part.stop]
    return None, [slice(length)]


class TrunkQuery:
    """The mean hidden state over real tokens at each of a few layers, concatenated; with `maximum`, also the maximum
    over tokens at the last one.

    Args:
        taps: layer numbers, 0 being the embeddings. The route is known after the last one.
        width: of the hidden states. A query wider than 1,024 (with maxima, 1,536) is projected to 1,024 by a fixed
            random matrix of +-1/sqrt(1024) (Achlioptas 2003), the same on every machine.

    Attributes:
        width: D of the query.
        means: number of its leading elements that are means.
    """

    def __init__(self, taps: Sequence[int], width: int, device: torch.device, *, maximum: bool = False) -> None:
        self.taps, self.maximum = tuple(taps), maximum
        full, limit = width * (len(self.taps) + self.maximum), MAX_WIDTH_WITH_MAX if self.maximum else MAX_WIDTH
        self.width = MAX_WIDTH if full > limit else full
        self.means = MAX_WIDTH if full > limit else width * len(self.taps)
        self.projection: nn.Linear | None = None
        if full > limit:
            # numpy's legacy generator is frozen, so these bits never change.
            signs = torch.from_numpy(np.random.RandomState(0).randint(0, 2, (full, MAX_WIDTH), dtype=np.int8))
            linear = nn.utils.skip_init(nn.Linear, full, MAX_WIDTH, bias=False, device=device)  # no random draws
            self.projection = linear.requires_grad_(False)
            self.projection.weight.copy_((signs.T.float() * 2 - 1) / MAX_WIDTH**0.5)
            use_onednn(self.projection)

    @staticmethod
    def pool(hidden: Tensor, mask: Tensor) -> Tensor:
        """Mean over real tokens: hidden [B, T, H], mask [B, T] -> [B, H] float32."""
        real = mask.unsqueeze(-1)
        whole, ends = _columns(hidden, mask)
        total: Tensor | float = 0.0 if whole is None else hidden[:, whole].sum(1, dtype=torch.float32)
        for part in ends:
            padded = hidden[:, part].masked_fill(real[:, part] == 0, 0.0)
            total = total + padded.sum(1, dtype=torch.float32)
        return total / real.sum(1).clamp(min=1)

    def read(self, hidden: Tensor, mask: Tensor, pooled: list[Tensor]) -> None:
        """Pool the next tap's hidden states [B, T, H], with mask [B, T], and append the result [B, H] to `pooled`."""
        pooled.append(self.pool(hidden, mask))
        if self.maximum and len(pooled) == len(self.taps):
            pooled.append(self._highest(hidden, mask).float() * MAX_SCALE)

    @staticmethod
    def _highest(hidden: Tensor, mask: Tensor) -> Tensor:
        """Maximum over real tokens, 0 without any: hidden [B, T, H], mask [B, T] -> [B, H] in hidden's dtype."""
        padding = (mask == 0).unsqueeze(-1)
        whole, ends = _columns(hidden, mask)
        found = [] if whole is None else [hidden[:, whole].amax(1)]
        found += [hidden[:, part].masked_fill(padding[:, part], -torch.inf).amax(1) for part in ends]
        return torch.stack(found).amax(0).masked_fill(padding.all(1), 0.0)

    def complete(self, pooled: Sequence[Tensor]) -> bool:
        """Whether `pooled` has everything that a query needs."""
        return len(pooled) == len(self.taps) + self.maximum

    def join(self, pooled: Sequence[Tensor]) -> Tensor:
        """Everything pooled, [B, H] each, as by `read` -> query [B, D]."""
        query = torch.cat(list(pooled), dim=-1)
        return query if self.projection is None else self.projection(query)


class SentenceQuery:
    """A frozen sentence encoder, loaded from a path, a hub name or a packaged name."""

    def __init__(self, encoder: str, device: torch.device) -> None:
        import sentence_transformers  # a slow import that only this query needs

        path = resolve(located(encoder, "encoder"))
        if path.endswith(GGUF):
            raise InputError(f"encoder {encoder!r}: a GGUF file is no sentence encoder; name a folder or a hub's model")
        try:
            with loading():
                self.encoder: Any = sentence_transformers.SentenceTransformer(path, device=str(device))
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"encoder {encoder!r}: cannot be loaded: {one_line(error)}") from None
        self.encoder.eval().requires_grad_(False)
        use_onednn(self.encoder)
        self.width = int(self.encoder.get_embedding_dimension())
        self.longest: int | None = self.encoder.max_seq_length  # maximum tokens it reads of a text
        self.fingerprint = fingerprint(self.encoder, self.encoder.tokenizer)
        self.tokens, self.settings = tokens(self.encoder.tokenizer), self._settings()
        self._texts = Tokenization(self.encoder.tokenizer, "encoder", device)

    def _settings(self) -> dict[str, Any]:
        """How the encoder's modules use their weights and texts, as in `identity.settings`."""
        modules = list(self.encoder)
        found: dict[str, Any] = {"modules": [type(module).__name__ for module in modules]}
        found |= {"max_seq_length": self.longest or 0, "prompt": self._prompt}
        for module in modules:
            config = getattr(getattr(module, "auto_model", None), "config", None)
            options = config.to_dict() if config is not None else {}
            if config is None and hasattr(module, "get_config_dict"):
                options = {type(module).__name__: module.get_config_dict()}
            found |= settings(options, "encoder")
        return found

    @property
    def _prompt(self) -> str:
        """Prefix of every text."""
        return (self.encoder.prompts or {}).get(self.encoder.default_prompt_name) or ""

    def shares(self, backbone: Backbone) -> bool:
        """Whether a text has the same tokens for the encoder and for this backbone, so that it needs to be tokenised
        only once.

        Only possible for encoder-only models with fast tokenizers, if the encoder does not prefix its texts.
        """
        tokenizers = [model.tokenizer for model in (self.encoder, backbone)]
        if backbone.kind != "encoder" or not all(hasattr(t, "backend_tokenizer") for t in tokenizers):
            return False
        if self.encoder.default_prompt_name or self.encoder.truncate_dim is not None or self.longest is None:
            return False
        mine, theirs = (json.loads(t.backend_tokenizer.to_str()) for t in tokenizers)
        settings = ("truncation", "padding")  # from the last call, not part of the tokenizer
        return {k: v for k, v in mine.items() if k not in settings} == {
            k: v for k, v in theirs.items() if k not in settings
        }

    def encode_tokens(self, encoded: Encoded) -> Tensor:
        """Queries [B, D] float32 of tokenised texts."""
        features = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
        vectors: Tensor = self.encoder(features)["sentence_embedding"]
        return vectors.float()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Queries [B, D] float32 of texts."""
        prompt = self._prompt
        if self.longest is not None:
            texts = [self._texts.shorten_text(prompt + text, self.longest)[len(prompt) :] for text in texts]
        vectors: Tensor = self.encoder.encode(
            list(texts), batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
        )
        return vectors.float()
