"""Soft prompts: vectors placed before the embeddings of a text, for encoders, causal and seq2seq backbones.

In an encoder the text keeps the positions it has without a prompt, and all prompt vectors take the first of these (a
position adds a constant to a vector that is learned), so that a prompt of any length fits. The head reads the mean over
the text's real tokens, without prompt positions. Causal backbones count positions from the first prompt vector; T5's
are relative. Prompts are float32 and are rounded to the backbone's dtype where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.continual.methods.common import Classifier, Writer
from benchmarks.continual.methods.method import Setup
from slm_fast.backbone import Backbone
from slm_fast.data import Row
from slm_fast.options import LearnOptions
from slm_fast.tokenization import Encoded

# Embeddings differ in scale, and so do suitable rates. 0.3 is Lester et al.'s for T5, 0.03 is that of PEFT's example
# of prompt tuning a causal model. The encoders' was chosen on MiniLM with two tasks of the demonstration learned in
# sequence (20 vectors, 80 rows per task, 40 others answered): 80 % right at 1e-3, 79 at 3e-3, 63 at 1e-2. Progressive
# Prompts had 91 and 94 % at the first two.
LEARNING_RATES = {"encoder": 3e-3, "seq2seq": 0.3, "causal": 0.03}
WEIGHT_DECAY = 1e-5  # Lester et al. 2021

PromptOf = Callable[[Sequence[Row]], Tensor]  # rows -> [P, H], or [B, P, H] if they differ


def prompt_options(options: LearnOptions, kind: str) -> LearnOptions:
    """How a prompt of a backbone of this kind is learned."""
    return replace(options, learning_rate=LEARNING_RATES[kind], weight_decay=WEIGHT_DECAY)


def starting_prompt(backbone: Backbone, length: int, seed: int, words: Sequence[str] = ()) -> Tensor:
    """[length, H] float32: the mean embedding of each word's tokens, as far as there is room, then the embeddings of
    random non-special tokens."""
    table, tokenizer = backbone.model.get_input_embeddings().weight.detach(), backbone.tokenizer
    special = set(tokenizer.all_special_ids)
    tokens = torch.tensor([i for i in range(min(len(tokenizer), len(table))) if i not in special])
    drawn = torch.randint(len(tokens), (length,), generator=torch.Generator().manual_seed(seed))
    prompt = table[tokens[drawn].to(table.device)].float()
    for i, word in enumerate(words[:length]):
        own = tokenizer(word, add_special_tokens=False)["input_ids"]
        if own:
            prompt[i] = table[own].float().mean(0)
    return prompt


def prompt_inputs(backbone: Backbone, prompt: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """A network's inputs for prompts [B, P, H] before tokens [B, T] with their mask [B, T]."""
    rows, length = prompt.shape[:2]
    text_BTH = backbone.model.get_input_embeddings()(ids)
    whole = torch.cat([mask.new_ones(rows, length), mask], 1)  # [B, P + T]
    inputs = {"inputs_embeds": torch.cat([prompt.to(text_BTH.dtype), text_BTH], 1), "attention_mask": whole}
    if backbone.kind == "encoder":
        config = backbone.model.config
        first = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        own = (mask.cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = first + torch.cat([own.new_zeros(rows, length), own], 1)
    elif backbone.kind == "causal":
        inputs["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
    return inputs


class PromptedClassifier(Classifier):
    """A classifier that reads `prompt_of(rows)` before the rows' texts."""

    prompt: Tensor  # [B, P, H] of the current batch

    def __init__(self, backbone: Backbone, labels: Sequence[str], setup: Setup, seed: int, prompt_of: PromptOf) -> None:
        super().__init__(backbone, labels, setup.max_length, seed)
        self.prompt_of = prompt_of

    def features(self, rows: Sequence[Row]) -> Tensor:
        self.prompt = self.prompt_of(rows).expand(len(rows), -1, -1)
        return super().features(rows)

    def hidden(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        inputs = prompt_inputs(self.backbone, self.prompt, encoded.input_ids, encoded.attention_mask)
        return self.network(**inputs).last_hidden_state[:, self.prompt.shape[1] :], encoded.attention_mask


class PromptedWriter(Writer):
    """A writer that reads `prompt_of(rows)` before the rows' prompts."""

    prompt: Tensor  # [B, P, H] of the current batch

    def __init__(self, backbone: Backbone, setup: Setup, prompt_of: PromptOf) -> None:
        super().__init__(backbone, setup.max_length, setup.max_new_tokens)
        self.prompt_of = prompt_of

    def losses(self, rows: Sequence[Row]) -> Tensor:
        self.prompt = self.prompt_of(rows).expand(len(rows), -1, -1)
        return super().losses(rows)

    def answers(self, rows: Sequence[Row]) -> list[str]:
        self.prompt = self.prompt_of(rows).expand(len(rows), -1, -1)
        return super().answers(rows)

    def logits(self, ids: Tensor, mask: Tensor, labels: Tensor | None, first: int = 0) -> Tensor:
        inputs = prompt_inputs(self.backbone, self.prompt, ids, mask)
        if labels is not None:
            answers: Tensor = self.network(**inputs, labels=labels, use_cache=False).logits
            return answers
        found: Tensor = self.network(**inputs, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        return found

    def write(self, encoded: Encoded) -> Tensor:
        inputs = prompt_inputs(self.backbone, self.prompt, encoded.input_ids, encoded.attention_mask)
        inputs.pop("position_ids", None)  # `generate` computes them itself
        written = self.generate(inputs)
        if self.backbone.kind == "causal":  # given embeddings, it returns only new tokens
            written = torch.cat([encoded.input_ids, written], 1)
        return written


def make_prompted(
    backbone: Backbone, setup: Setup, labels: Sequence[str], seed: int, prompt_of: PromptOf
) -> PromptedClassifier | PromptedWriter:
    """A model that answers as the backbone's kind does, and reads `prompt_of(rows)` first."""
    if backbone.kind == "encoder":
        return PromptedClassifier(backbone, labels, setup, seed, prompt_of)
    return PromptedWriter(backbone, setup, prompt_of)
