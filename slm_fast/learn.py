"""Learning a task (Algorithm 1 of the paper): allocate slots, prepare keys, freeze them, fine-tune the values.

Queries and routes of the training rows come from frozen weights, so they are computed once. By default routes are over
the task's own slots only, and the random seed is derived from the task's name, so the result depends on the task, the
backbone and the options alone, not on where or in what order tasks are learned. With `joint` or `warm_start` it also
depends on the tasks learned before.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slm_fast.batching import shuffled_buckets
from slm_fast.data import Task
from slm_fast.distributed import ALONE, Processes
from slm_fast.epochs import Best, LearnStep, OnStep, checked_callback, checked_patience, optimizer_and_schedule
from slm_fast.errors import InputError, NotFinite, WorkError, memory_for
from slm_fast.examples import Examples, prepare
from slm_fast.layers import Values, rounded_for_autocast
from slm_fast.model import AdaptedModel
from slm_fast.ops import Route
from slm_fast.options import LearnOptions
from slm_fast.origin import origin
from slm_fast.progress import bar
from slm_fast.query import TrunkQuery
from slm_fast.schema import check_learned
from slm_fast.tasks import LearnedTask, name_seed
from slm_fast.tokenization import Encoded, pad
from slm_fast.warm_start import Start, find_start, kept_options, slot_weights

IGNORE = -100  # label that transformers' losses ignore
LOOK = 16  # steps between checks of the loss


def learn_task(
    model: AdaptedModel,
    task: Task,
    options: LearnOptions,
    *,
    valid: Task | None = None,
    patience: int | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
    processes: Processes = ALONE,
) -> LearnedTask:
    """Learn one task and return what is kept of it, for `ScalableLM.add`. The model itself does not change.

    If several processes learn the task together, each calls this with the same rows and options.

    Args:
        valid: validation task. The values of the best epoch on it are kept (by accuracy with a head, else by loss).
        patience: stop after this many consecutive epochs without improvement. The learning rate schedule still spans
            all epochs.
        on_step: called after each step.
        processes: the processes that learn it together.

    Raises:
        InputError: the task does not fit the backbone.
        WorkError: the loss is not finite, memory ran out, or another process ended.
    """
    check_task(model, task, valid, options.max_length)
    if options.joint and model.known.most_rows is not None:
        raise InputError("joint: trains over the values of all tasks, which do not fit device_memory")
    patience = checked_patience(patience, has_valid=valid is not None)
    with memory_for(f"task {task.name!r}"), model.lock, torch.inference_mode(False), torch.enable_grad():
        trainer = Trainer(model, task, options, processes, patience, checked_callback(on_step))
        with bar(f"{task.name}: queries", len(task.rows), progress) as advance:
            examples, query = prepare(model, task, task.labels, trainer.max_length, advance)
        processes.broadcast([query])  # other kinds of machines round, and thus route, differently
        slots = options.slots or (1 if model.config.router == "gaussian" else 4)
        seed = name_seed(task.name, options.seed)
        try:
            part = model.new_router().fit(query, slots, seed, label_numbers(task))
        except NotFinite as error:
            raise WorkError(f"{task.name}: row {error.rows[0] + 1}: {error.reason}") from None
        trainer.allocate(slots, part, torch.Generator().manual_seed(seed))
        examples = trainer.routed(examples, query)
        trainer.warm_start(examples, query)
        processes.broadcast(trainer.parameters())
        trainer.fine_tune(examples, valid, progress)
    learned = trainer.learned()
    learned = replace(learned, origin=origin(model, task, learned.options, valid))
    check_learned(learned)
    return learned


def label_numbers(task: Task) -> Tensor | None:
    """Label index of each row, [N]; None for free text."""
    if task.labels is None:
        return None
    number = {label: i for i, label in enumerate(task.labels)}
    return torch.tensor([number[row.target or ""] for row in task.rows])


def check_task(model: AdaptedModel, task: Task, valid: Task | None = None, max_length: int | None = None) -> None:
    """Raise an error if this model cannot learn the task, as far as that is known before any computation."""
    if model.backbone.kind == "encoder" and task.labels is None:
        raise InputError(f"task {task.name!r}: an encoder-only backbone answers with labels, not with free text")
    if valid is not None and task.labels is not None:
        unknown = {row.target for row in valid.rows} - set(task.labels)
        if unknown:
            raise WorkError(f"{valid.name}: validation label {min(map(str, unknown))!r} is not in the training rows")
    end, rows = model.backbone.tokenizer.eos_token_id, model.backbone.vocabulary
    if model.backbone.kind != "encoder" and end >= rows:  # it can still answer with tasks learned elsewhere
        raise InputError(
            f"tokenizer: its end token {model.backbone.tokenizer.eos_token!r} has id {end}, the model's embedding has "
            f"{rows} rows; call model.resize_token_embeddings(len(tokenizer)) before from_backbone"
        )
    if model.backbone.kind != "encoder" and task.labels is not None:
        _check_words(model, task, max_length or model.config.max_length or 0)


def _check_words(model: AdaptedModel, task: Task, max_length: int) -> None:
    """Raise InputError unless the tokenizer can write every label, and no two alike."""
    tokenization, labels = model.backbone.tokenization, task.labels or []
    tokens = tokenization.encode_answers(labels, max_length)
    seen: dict[str, str] = {}
    ends = set(model.backbone.end_tokens().tolist())
    for label, ids, text in zip(labels, tokens, tokenization.decode(tokens), strict=True):
        if ids[-1] != model.backbone.tokenizer.eos_token_id:
            raise InputError(f"task {task.name!r}: label {label[:60]!r} is longer than max_length={max_length} tokens")
        if not ends.isdisjoint(ids[:-1]):
            raise InputError(f"task {task.name!r}: label {label[:60]!r} holds a token that ends texts; rename it")
        if not text:
            raise InputError(
                f"task {task.name!r}: label {label!r} cannot be written: the tokenizer knows nothing of it"
            )
        if text in seen:
            raise InputError(
                f"task {task.name!r}: labels {seen[text]!r} and {label!r} are one to the backbone's tokenizer, which "
                f"writes {text!r} for both; rename one"
            )
        seen[text] = label


def _join(mine: Tensor, theirs: Tensor) -> Tensor:
    """Stack slots [S, r, F] on others, padding the smaller rank with zeros."""
    rank = max(mine.shape[1], theirs.shape[1])
    return torch.cat([nn.functional.pad(part, (0, 0, 0, rank - part.shape[1])) for part in (mine, theirs)])


def _summed_loss(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")


class Trainer:
    """The values, head and training loop of one task. `learn_task` calls, in order: `allocate`, `routed`, `warm_start`,
    `fine_tune`, `learned`."""

    def __init__(
        self,
        model: AdaptedModel,
        task: Task,
        options: LearnOptions,
        processes: Processes = ALONE,
        patience: int | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.model, self.task, self.options, self.processes = model, task, options, processes
        self.patience, self.on_step = patience, on_step
        self.device, self.dtype = model.backbone.device, model.backbone.dtype
        limit, length = model.backbone.max_positions(), options.max_length
        self.max_length: int = (model.config.max_length or 0) if length is None else length
        if length is not None and (length < 4 or (limit is not None and length > limit)):
            raise InputError(f"max_length: expected 4..{limit or 'any'} for this backbone, got {length}")

    def allocate(self, slots: int, part: dict[str, Tensor], generator: torch.Generator) -> None:
        """Create new values (lora_b zero, so that nothing changes yet), a new head, and the router for the training
        rows."""
        self.part = part
        self.params: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.model.modules:
            features_in, features_out = self.model.widths[name]
            bound = 1 / features_in**0.5
            lora_a = torch.empty(slots, self.options.rank, features_in).uniform_(-bound, bound, generator=generator)
            lora_b = torch.zeros(slots, self.options.rank, features_out)
            self.params[name] = (self._parameter(lora_a), self._parameter(lora_b))
        self.head: tuple[Tensor, Tensor] | None = None
        if self.model.backbone.kind == "encoder":
            labels = self.task.labels or []
            weight = torch.empty(len(labels), self.model.backbone.width).normal_(std=0.02, generator=generator)
            self.head = (self._parameter(weight), self._parameter(torch.zeros(len(labels))))
        self.shuffle = generator

        pool = self.model.pool
        learned = {known.name for known in pool.tasks if known.adapter is None} - {self.task.name}
        others = [known for known in pool.tasks if known.name in learned] if self.options.joint else []
        mine = LearnedTask(
            self.task.name, None, {k: (a.detach(), b.detach()) for k, (a, b) in self.params.items()}, part, None
        )
        tasks = sorted([*others, mine], key=lambda known: known.name)
        self.router = self.model.new_router(tasks)
        # Renumber the router's slots: first the task's own (0..S-1), then those of other tasks, in order.
        owner = [known.name for known in tasks for _ in range(known.slots)]
        own = [i for i, name in enumerate(owner) if name == self.task.name]
        foreign = [i for i, name in enumerate(owner) if name != self.task.name]
        self.renumber = torch.empty(len(owner) + 1, dtype=torch.int64)
        self.renumber[own + foreign] = torch.arange(len(owner))
        self.renumber[-1] = -1  # id -1 is unchanged
        self.slots = slots
        self.foreign: Values = pool.values if foreign else {}
        self.foreign_rows = torch.empty(0, dtype=torch.int64)
        if foreign:
            rows = pool.row_of_slot if pool.row_of_slot.dim() == 1 else pool.row_of_slot[:, 0]  # learned slots: one row
            self.foreign_rows = rows[[i for i, name in enumerate(pool.slot_names) if name in learned]]

    def _parameter(self, tensor: Tensor) -> Tensor:
        return nn.Parameter(tensor.to(self.device))

    def parameters(self) -> list[Tensor]:
        return [p for pair in self.params.values() for p in pair] + list(self.head or ())

    def values(self, route: Route) -> tuple[Values, Route]:
        """Values for the adapted layers in a batch, and its route to them: the task's own slots, then (joint) those
        slots of other tasks that the route reaches, so that a step's cost does not depend on the number of tasks."""
        own = {name: (a.to(self.dtype), b.to(self.dtype)) for name, (a, b) in self.params.items()}
        foreign = route.slot_ids >= self.slots
        if foreign.any():
            reached, place = route.slot_ids[foreign].unique(return_inverse=True)
            ids = route.slot_ids.masked_scatter(foreign, place + self.slots)
            route, reached = Route(ids, route.weights), self.foreign_rows[(reached - self.slots).to(self.device)]
            own = {
                name: (_join(a, self.foreign[name][0][reached]), _join(b, self.foreign[name][1][reached]))
                for name, (a, b) in own.items()
            }
        return own, Route(route.slot_ids.to(self.device), route.weights.to(self.device))

    def routed(self, examples: Examples, query: Tensor) -> Examples:
        route = self.router.route(query)
        return replace(examples, route=Route(self.renumber[route.slot_ids.cpu()], route.weights.cpu()))

    def warm_start(self, examples: Examples, query: Tensor) -> None:
        """Initialise the values from another task, if the options say so."""
        assert examples.route is not None
        self.start: Start | None = find_start(self.model, self.task.name, self.options, query)
        if self.start is not None:
            self.start.fill(self.params, slot_weights(examples.route, self.slots))

    def fine_tune(self, examples: Examples, valid: Task | None, progress: bool | None) -> None:
        options = self.options
        valid_examples = None if valid is None else self._valid_examples(valid)
        values = [parameter for pair in self.params.values() for parameter in pair]
        optimizer, scheduler = optimizer_and_schedule(values, options, len(examples), self.head or ())
        epochs, lengths = options.epochs_for(len(examples)), examples.lengths
        best = None if valid_examples is None else Best(self.parameters(), self.patience)
        look = LOOK if self.on_step is None else 1
        progressing = bar(f"{self.task.name}: learning", epochs * len(examples), progress)
        with self._rounded(examples), progressing as advance:
            for epoch in range(1, epochs + 1):
                losses: list[Tensor] = []
                for step, rows in enumerate(plan := shuffled_buckets(lengths, options.batch_size, self.shuffle), 1):
                    optimizer.zero_grad()
                    losses.append(self.backward(examples, rows.tolist()))
                    nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                    optimizer.step()
                    rate = float(scheduler.get_last_lr()[0])
                    scheduler.step()
                    note = None
                    if step % look == 0 or step == len(plan):  # reading the loss waits for the GPU
                        value = float(torch.stack(losses).mean())
                        self._check_finite(value, f"the loss is {value} in epoch {epoch}")
                        losses, note = [], f"loss {value:.3f}"
                        done = (epoch - 1) * len(plan) + step
                        now = LearnStep(self.task.name, done, epochs * len(plan), epoch, value, rate)
                        if step < len(plan):
                            self._tell(now)
                    advance(len(rows), note=note)
                if best is None or valid_examples is None:
                    self._tell(now)
                    continue
                loss, accuracy = self._validated(valid_examples)
                score = -loss if self.head is None else accuracy
                self._check_finite(score, f"the validation score is {score} in epoch {epoch}")
                self._tell(replace(now, valid_loss=loss, valid_accuracy=accuracy))
                if best.is_enough(score):
                    break
        for parameter in self.parameters():
            self._check_finite(float(parameter.detach().sum()), "the values are no longer numbers")
        if best is not None:
            best.restore()

    def _tell(self, step: LearnStep) -> None:
        if self.on_step is not None:
            self.on_step(step)

    def _rounded(self, examples: Examples) -> AbstractContextManager[None]:
        """With autocast, round the weights that these rows pass through once, rather than in every pass."""
        if not self.options.autocast:
            return nullcontext()
        backbone = self.model.backbone
        first = 1 if backbone.kind == "seq2seq" else 0  # T5's first layer runs nevertheless
        known = backbone.layers[first : self.model.config.first_layer] if examples.states is not None else ()
        below = {module for layer in known for module in layer.modules()}
        modules = [module for module in backbone.model.modules() if module not in below]
        return rounded_for_autocast(modules, torch.bfloat16)

    def backward(self, examples: Examples, rows: list[int]) -> Tensor:
        """Add the gradient of the mean loss of a step's rows, computed in parts, and return the loss. Each process
        computes its share of every part."""
        loss, size = torch.zeros((), device=self.device), math.ceil(len(rows) / self.options.accumulate)
        answers = sum(len(examples.answers[i]) for i in rows)
        for start in range(0, len(rows), size):
            mine, count = self.processes.share(rows[start : start + size])
            part = self.loss(examples, mine) / answers
            part = part if count else 0 * part
            part.backward()
            loss += part.detach()
        self.processes.all_reduce([loss, *(p.grad for p in self.parameters() if p.grad is not None)])
        return loss

    def _check_finite(self, value: float, otherwise: str) -> None:
        if not math.isfinite(value):
            raise WorkError(f"{self.task.name}: {otherwise}; lower learning_rate")

    def _valid_examples(self, valid: Task) -> Examples:
        # Routes over the task's own slots, even if joint: its own values are what is selected.
        router = self.model.new_router([LearnedTask(self.task.name, None, self.params, self.part, None)])
        examples, query = prepare(self.model, valid, self.task.labels, self.max_length)
        route = router.route(query)
        return replace(examples, route=Route(route.slot_ids.cpu(), route.weights.cpu()))

    @torch.no_grad()
    def _validated(self, examples: Examples) -> tuple[float, float]:
        """Mean loss and accuracy over the rows' labels, or over the tokens of their answers."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in examples.lengths.argsort(stable=True).split(2 * self.options.batch_size):
            rows, count = self.processes.share(batch.tolist())
            logits, target = self._predictions(examples, rows)
            found = torch.stack([_summed_loss(logits, target), (logits.argmax(1) == target).sum()])
            total += found if count else 0
        self.processes.all_reduce([total])
        loss, accuracy = (total / sum(map(len, examples.answers))).tolist()
        return loss, accuracy

    def _passes(self, examples: Examples, rows: list[int]) -> tuple[Encoded, dict[str, Any]]:
        """A batch of these rows, and the options of its pass: routes, this task's values, and cached states."""
        assert examples.route is not None
        values, route = self.values(Route(examples.route.slot_ids[rows], examples.route.weights[rows]))
        encoded = examples.encoded(self.model, rows)
        return encoded, {"route": route, "values": values, "states": examples.states_of(rows)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast)

    def loss(self, examples: Examples, rows: list[int]) -> Tensor:
        """Summed loss of the rows' labels, or of the tokens of their answers."""
        return _summed_loss(*self._predictions(examples, rows))

    def _predictions(self, examples: Examples, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Logits [N, C] float32 of the rows' labels, or of the tokens of their answers, and these [N] (or IGNORE)."""
        answers = [examples.answers[i] for i in rows]
        target = torch.tensor([token for answer in answers for token in answer], device=self.device)
        encoded, options = self._passes(examples, rows)
        if self.head is not None:
            with self._autocast():
                hidden = self.model.forward(encoded, **options).hidden
                features = TrunkQuery.pool(hidden, encoded.attention_mask)
            return features @ self.head[0].T + self.head[1], target
        lm = self.model.backbone.model
        with self._autocast():
            if self.model.backbone.kind == "causal":
                # The output layer is only applied to the tokens before those of the answer.
                ends = [len(examples.sequences[i]) - 1 for i in rows]
                before = [range(end - len(answer), end) for end, answer in zip(ends, answers, strict=True)]
                row = torch.tensor([i for i, places in enumerate(before) for _ in places], device=self.device)
                place = torch.tensor([t for places in before for t in places], device=self.device)
                hidden = self.model.forward(encoded, **options).hidden
                logits = self.model.backbone.logits(hidden[row, place])
            else:
                labels = pad(answers, IGNORE)[0].to(self.device)
                inputs = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask, "use_cache": False}
                inputs["decoder_input_ids"] = self.model.backbone.decoder_inputs(labels)
                out, _, _ = self.model.call(lambda: lm(**inputs), encoded.attention_mask, **options)
                logits, target = out.logits.flatten(0, 1), labels.flatten()
        return logits.float(), target

    def learned(self) -> LearnedTask:
        def kept(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0].detach().float().cpu(), pair[1].detach().float().cpu()

        uncounted = {} if "count" in self.part else {"rows": len(self.task.rows)}
        return LearnedTask(
            name=self.task.name,
            labels=None if self.task.labels is None else tuple(self.task.labels),
            values={name: kept(pair) for name, pair in self.params.items()},
            router={key: tensor.cpu() for key, tensor in self.part.items()},
            head=None if self.head is None else kept(self.head),
            options=kept_options(self.options, self.start, self.patience) | uncounted,
        )
