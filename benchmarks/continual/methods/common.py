"""What the rivals train: a backbone that answers with a head or by generating, and its training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.continual.methods.method import Answer, Setup
from benchmarks.peers import train
from slm_fast.backbone import Backbone
from slm_fast.batching import shuffled_buckets
from slm_fast.data import Row
from slm_fast.options import LearnOptions
from slm_fast.progress import bar
from slm_fast.query import TrunkQuery
from slm_fast.tasks import name_seed
from slm_fast.tokenization import Encoded, pad

IGNORE = -100  # label ignored by the losses
BATCH = 32  # rows answered together


class Model(nn.Module, ABC):
    """A backbone that answers rows. `network` is its module, which a method may wrap."""

    def __init__(self, backbone: Backbone, max_length: int) -> None:
        super().__init__()
        self.backbone, self.max_length = backbone, max_length
        self.network: Any = backbone.model

    @abstractmethod
    def losses(self, rows: Sequence[Row]) -> Tensor:
        """The loss of each row, [B]: of its label, or the mean over the tokens of its answer."""

    @abstractmethod
    def answers(self, rows: Sequence[Row]) -> list[str]:
        """The answers to a batch of rows."""

    @abstractmethod
    def predictions(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and their targets [B, T]: labels (T = 1) or tokens, `IGNORE` elsewhere."""

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters that train at the higher learning rate of heads; empty without a head."""
        return []

    def trained(self) -> list[nn.Parameter]:
        """Every parameter that requires a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def fit(
        self,
        name: str,
        rows: Sequence[Row],
        options: LearnOptions,
        progress: bool | None = None,
        *,
        loss_of: Callable[[list[Row]], Tensor] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        after_step: Callable[[], None] | None = None,
        kept: Sequence[Row] = (),
        arrange: Callable[[list[Tensor], torch.Generator], list[Tensor]] | None = None,
    ) -> None:
        """Train on rows, in batches of similar lengths.

        Args:
            name: of the task; seeds the order of the rows.
            loss_of: the loss of a batch, whole, whatever `options.accumulate`; default: the mean of `losses`.
            parameters: those to train; default: all that require a gradient.
            after_step: called after each step.
            kept: rows of earlier tasks, numbered after `rows`, for `arrange` to mix in.
            arrange: turns the batches (row numbers) of all epochs into those to train on.
        """
        generator = torch.Generator().manual_seed(name_seed(name, options.seed))
        tokens, _ = self.backbone.tokenization.tokenize([row.prompt for row in rows], self.max_length)
        lengths = torch.tensor([len(row) for row in tokens])
        chosen = list(self.trained() if parameters is None else parameters)
        head = [parameter for parameter in self.head_parameters() if any(parameter is p for p in chosen)]
        others = [parameter for parameter in chosen if not any(parameter is p for p in head)]

        epochs = range(options.epochs_for(len(rows)))
        batches = [batch for _ in epochs for batch in shuffled_buckets(lengths, options.batch_size, generator)]
        if arrange is not None:
            batches = arrange(batches, generator)
        known = [*rows, *kept]

        def loss(numbers: list[int]) -> Tensor:
            batch = [known[i] for i in numbers]
            return self.losses(batch).mean() if loss_of is None else loss_of(batch)

        with bar(f"{name}: learning", sum(map(len, batches)), progress) as advance:

            def report(done: int, loss: Tensor) -> None:
                advance(done, note=f"loss {loss.item():.3f}")
                if after_step is not None:
                    after_step()

            steps = len(batches) * options.batch_size
            parts = 1 if loss_of is not None else options.accumulate
            train(others, loss, steps, replace(options, epochs=1, accumulate=parts), lambda: batches, report, head)

    @torch.inference_mode()
    def answer(self, rows: Sequence[Row]) -> list[str]:
        """The answers to any number of rows."""
        found = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            for i, text in zip(batch, self.answers([rows[i] for i in batch]), strict=True):
                found[i] = text
        return found


class Classifier(Model):
    """Mean last hidden state over real tokens, then one linear head over `labels`."""

    def __init__(self, backbone: Backbone, labels: Sequence[str], max_length: int, seed: int) -> None:
        super().__init__(backbone, max_length)
        self.labels = list(labels)
        self.head = nn.Linear(backbone.width, len(self.labels), device=backbone.device)
        nn.init.normal_(self.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def hidden(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """The last hidden states [B, T, H] of a batch, and the mask [B, T] of those to average."""
        out = self.network(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask)
        return out.last_hidden_state, encoded.attention_mask

    def features(self, rows: Sequence[Row]) -> Tensor:
        """The input of the head, [B, H]."""
        encoded = self.backbone.tokenization.encode([row.prompt for row in rows], self.max_length)
        return TrunkQuery.pool(*self.hidden(encoded))

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Logits [B, labels]."""
        logits: Tensor = self.head(self.features(rows))
        return logits

    def targets(self, rows: Sequence[Row]) -> Tensor:
        """The index of each row's label, [B]."""
        return torch.tensor([self.labels.index(row.target or "") for row in rows], device=self.backbone.device)

    def predictions(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        return self(rows).unsqueeze(1), self.targets(rows).unsqueeze(1)

    def losses(self, rows: Sequence[Row]) -> Tensor:
        return cross_entropy(self(rows), self.targets(rows), reduction="none")

    def answers(self, rows: Sequence[Row]) -> list[str]:
        return [self.labels[best] for best in self(rows).argmax(1).tolist()]


class Writer(Model):
    """A language model that generates its answer greedily."""

    def __init__(self, backbone: Backbone, max_length: int, max_new_tokens: int) -> None:
        super().__init__(backbone, max_length)
        self.max_new_tokens = max_new_tokens

    def losses(self, rows: Sequence[Row]) -> Tensor:
        logits, labels = self.predictions(rows)
        said = labels != IGNORE
        each = cross_entropy(logits[said].float(), labels[said], reduction="none")
        return each.new_zeros(len(rows)).index_add(0, said.nonzero()[:, 0], each) / said.sum(1)

    def predictions(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Logits [B, T, vocabulary] and labels [B, T]; of a causal model from the first answer's first token on."""
        text = self.backbone.tokenization
        prompts, _ = text.tokenize([row.prompt for row in rows], self.max_length)
        answers = text.encode_answers([row.target or "" for row in rows], self.max_length)
        causal = self.backbone.kind == "causal"
        read = [p + a for p, a in zip(prompts, answers, strict=True)] if causal else prompts
        said = [[IGNORE] * len(p) + a for p, a in zip(prompts, answers, strict=True)] if causal else answers
        ids, mask = (each.to(self.backbone.device) for each in pad(read, text.tokenizer.pad_token_id))
        labels = pad(said, IGNORE)[0].to(self.backbone.device)
        if causal:
            first = max(1, min(map(len, prompts)))
            logits, labels = self.logits(ids, mask, None, first - 1)[:, :-1], labels[:, first:]
        else:
            logits = self.logits(ids, mask, labels)
        return logits, labels

    def logits(self, ids: Tensor, mask: Tensor, labels: Tensor | None, first: int = 0) -> Tensor:
        """[B, T, vocabulary] for a batch of tokens [B, first + T] or, with `labels`, for the answers to it. Those of a
        whole prompt would take gigabytes."""
        inputs = {"logits_to_keep": ids.shape[1] - first} if labels is None else {"labels": labels}
        found: Tensor = self.network(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits
        return found

    def answers(self, rows: Sequence[Row]) -> list[str]:
        text = self.backbone.tokenization
        encoded = text.encode([row.prompt for row in rows], self.max_length, padding_side=text.padding_side)
        written = self.write(encoded)
        if self.backbone.kind == "causal":
            written = written[:, encoded.input_ids.shape[1] :]
        return text.decode(written.tolist())

    def write(self, encoded: Encoded) -> Tensor:
        """The output of `generate` for a batch of prompts."""
        return self.generate({"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask})

    def generate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output of `generate`, decoding greedily, for these inputs of the network."""
        tokenizer = self.backbone.tokenizer
        written: Tensor = self.network.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return written


def make_model(backbone: Backbone, setup: Setup, labels: Sequence[str], seed: int) -> Model:
    """A model that answers as the backbone's kind does; an encoder gets a head over `labels`."""
    if backbone.kind == "encoder":
        return Classifier(backbone, labels, setup.max_length, seed)
    return Writer(backbone, setup.max_length, setup.max_new_tokens)


def answers_by_task(models: Mapping[str, Model], rows: Sequence[Row], tasks: Sequence[str] | None) -> list[Answer]:
    """Answer each row with the model of its task, which is given."""
    assert tasks is not None
    found = [Answer("")] * len(rows)
    for name in dict.fromkeys(tasks):
        own = [i for i, task in enumerate(tasks) if task == name]
        for i, text in zip(own, models[name].answer([rows[i] for i in own]), strict=True):
            found[i] = Answer(text, name)
    return found
