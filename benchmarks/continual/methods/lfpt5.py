"""LFPT5: one soft prompt of a frozen T5 that solves tasks and generates pseudo samples of earlier ones.

Source: Qin & Joty, LFPT5: A Unified Framework for Lifelong Few-shot Language Learning Based on Prompt Tuning of T5,
ICLR 2022. Tasks of one type, as here, share one prompt of 300 vectors, and a new task continues training it. (Tasks of
another type would have prompts of their own.) Each task has a generation token G. Besides x -> y, the prompt learns
G -> x __ans__ y, weighted by 0.25. Before a new task is learned, the current prompt generates samples of each earlier
task after its G (sampling from the 64 most likely tokens, with a repetition penalty of 2.5). Samples with exactly one
separator and a label of their task are valid. Two per label are kept and learned together with the new rows, and the
new prompt's predictions on them are held near the old one's:

    loss = 0.99 (L_solve + 0.25 L_generate) + 0.01 KL(old || new), summed over the answer's tokens, of pseudo samples

Constants are those of the released code (qcwthu/Lifelong-Fewshot-Language-Learning, Classification).

Departures:

- T5 is the backbone as given, not LM-adapted.
- AdamW with linear warm-up and decay and the epochs of all rivals here, not Adafactor at a constant 0.5 for up to 1,280
  epochs, of which the best on a validation set (pseudo samples included) is used. Dropout is off.
- KL is averaged over a batch's pseudo samples; the code's batches have two rows.
- The prompt comes before the text, as in the paper, not after it as in the code. It is initialised to label words and
  random tokens of the whole vocabulary, not of its 5,000 most common.
- G is a frozen random vector seeded by the task's name, after the prompt, not the untrained embedding of a spare token.
- The separator is text, not an added token.
- x is cut so that its answer fits in max_length.
- 16 samples per label are drawn; the code draws some for each test row.
- Free text has no labels to check: up to 32 samples per task that have an answer are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from benchmarks.continual.methods.common import IGNORE
from benchmarks.continual.methods.method import Answer, Setup, State
from benchmarks.continual.methods.prompts import PromptedWriter, prompt_inputs, prompt_options, starting_prompt
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.tasks import name_seed
from slm_fast.tokenization import pad

LENGTH = 300
LEARNING_RATE = 0.5
GENERATE, CONSISTENT = 0.25, 0.01  # weights of the two other losses
SEPARATOR = "__ans__"
DRAWN, KEPT = 16, 2  # samples per label
FREE = 32  # samples kept per free-text task; eight times as many are drawn


@dataclass(frozen=True)
class Pseudo(Row):
    """A generated row of an earlier task."""

    task: str = ""


class Lfpt5:
    """A `Method`.

    Args:
        separator: stands between a text and its answer.

    Attributes:
        labels: of each task learned, None for free text.
    """

    def __init__(self, setup: Setup, *, length: int = LENGTH, separator: str = SEPARATOR) -> None:
        self.setup, self.separator = setup, separator
        self.backbone = backbone = Backbone.load(setup.backbone)
        self.options = replace(prompt_options(setup.options, backbone.kind), learning_rate=LEARNING_RATE)
        self.prompt = nn.Parameter(starting_prompt(backbone, length, setup.options.seed, setup.labels))  # [P, H]
        self.solver = PromptedWriter(backbone, setup, lambda rows: self.prompt)
        self.scale = float(backbone.model.get_input_embeddings().weight.float().std())
        self.labels: dict[str, list[str] | None] = {}

    def token(self, name: str) -> Tensor:
        """A task's G: [1, H], scaled like the embeddings."""
        generator = torch.Generator().manual_seed(name_seed(name, self.options.seed))
        vector = self.scale * torch.randn(1, self.prompt.shape[1], generator=generator)
        return vector.to(self.prompt.device)

    def generator(self, names: Sequence[str]) -> PromptedWriter:
        """A writer that reads the prompt and the G of each row's task."""
        whole = torch.stack([torch.cat([self.prompt, self.token(name)]) for name in names])  # [B, P + 1, H]
        return PromptedWriter(self.backbone, self.setup, lambda rows: whole)

    def generative(self, rows: Sequence[Row]) -> list[Row]:
        """What the generator learns from rows: empty input, text and answer as output."""
        text, found = self.backbone.tokenization, []
        for row in rows:
            ending = f" {self.separator} {row.target or ''}"
            room = max(1, self.setup.max_length - len(text.encode_answers([ending], self.setup.max_length)[0]))
            found.append(Row("", text.written([row.prompt], room)[0] + ending))
        return found

    @torch.inference_mode()
    def written(self, name: str, samples: int, seed: int) -> list[str]:
        """Texts that the current prompt generates after a task's G."""
        backbone, tokenizer = self.backbone, self.backbone.tokenizer
        encoded = backbone.tokenization.encode([""] * DRAWN, self.setup.max_length)
        prompt = self.generator([name] * DRAWN).prompt_of([])
        inputs = prompt_inputs(backbone, prompt, encoded.input_ids, encoded.attention_mask)
        found: list[str] = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            while len(found) < samples:
                tokens = backbone.model.generate(
                    **inputs,
                    max_new_tokens=self.setup.max_length,
                    do_sample=True,
                    top_k=64,
                    repetition_penalty=2.5,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
                found += backbone.tokenization.decode(tokens.tolist())
        return found[:samples]

    def parsed(self, name: str, written: str) -> Pseudo | None:
        """A generated text as a row of the task; None unless it has one separator and an answer of the task."""
        parts, labels = [part.strip() for part in written.split(self.separator)], self.labels[name]
        if len(parts) != 2 or not all(parts):
            return None
        if labels is None:
            return Pseudo(parts[0], parts[1], task=name)
        label = self.backbone.tokenization.label_words(labels, self.setup.max_length).get(parts[1])
        return None if label is None else Pseudo(parts[0], label, task=name)

    def pseudo(self, name: str, seed: int) -> list[Pseudo]:
        """The pseudo samples of an earlier task to keep."""
        labels = self.labels[name]
        samples, most = (8 * FREE, FREE) if labels is None else (DRAWN * len(labels), KEPT)
        found: dict[str, list[Pseudo]] = {}
        for row in (self.parsed(name, each) for each in self.written(name, samples, seed)):
            if row is not None:
                found.setdefault("" if labels is None else row.target or "", []).append(row)
        return [row for key in sorted(found) for row in found[key][:most]]

    def consistency(self, rows: Sequence[Row], old: Tensor) -> Tensor:
        """KL(old || new) of the predictions on rows with the prompt `old` [P, H] and the current one: summed over an
        answer's tokens, averaged over rows."""
        text, device = self.backbone.tokenization, self.backbone.device
        prompts, _ = text.tokenize([row.prompt for row in rows], self.setup.max_length)
        answers = text.encode_answers([row.target or "" for row in rows], self.setup.max_length)
        ids, mask = (each.to(device) for each in pad(prompts, text.tokenizer.pad_token_id))
        labels = pad(answers, IGNORE)[0].to(device)  # [B, A]

        def said(prompt: Tensor) -> Tensor:
            inputs = prompt_inputs(self.backbone, prompt.expand(len(rows), -1, -1), ids, mask)
            logits = self.backbone.model(**inputs, labels=labels, use_cache=False).logits
            return log_softmax(logits.float(), 2)  # [B, A, vocabulary]

        with torch.no_grad():
            before = said(old)
        each = (before.exp() * (before - said(self.prompt))).sum(2)  # [B, A]
        return each.masked_fill(labels == IGNORE, 0.0).sum(1).mean()

    def learn(self, task: Task, progress: bool | None = None) -> None:
        seed, old = self.options.seed, self.prompt.detach().clone()
        earlier = [row for name in self.labels for row in self.pseudo(name, name_seed(f"{task.name}/{name}", seed))]
        self.labels[task.name] = task.labels

        def loss_of(rows: list[Row]) -> Tensor:
            names = [row.task if isinstance(row, Pseudo) else task.name for row in rows]
            generated = self.generator(names).losses(self.generative(rows)).mean()
            loss = (1 - CONSISTENT) * (self.solver.losses(rows).mean() + GENERATE * generated)
            kept = [row for row in rows if isinstance(row, Pseudo)]
            return loss + CONSISTENT * self.consistency(kept, old) if kept else loss

        rows: list[Row] = [*earlier, *task.rows]
        self.solver.fit(task.name, rows, self.options, progress, loss_of=loss_of, parameters=[self.prompt])

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        return [Answer(text) for text in self.solver.answer(rows)]

    def state(self) -> State:
        return {"prompt": self.prompt.detach(), "labels": self.labels}

    def restore(self, state: State) -> None:
        self.prompt.data.copy_(state["prompt"])
        self.labels = dict(state["labels"])

    @property
    def parameters(self) -> int:
        return self.prompt.numel()

    @property
    def kept(self) -> int:
        return self.prompt.nbytes
