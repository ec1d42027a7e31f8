"""Seeded building blocks of the model tests: tiny random backbones, toy tasks and random learned tasks."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FOUND, LAYERS, OTHERS, POSITIONS, REFUSED, WIDTH
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from slm_fast import ScalableLM, Task
from slm_fast.data import Row
from slm_fast.ops import Route
from slm_fast.predict import RouteTaken
from slm_fast.store import task_to_bytes
from slm_fast.tasks import LearnedTask, name_seed

TOPICS = ("sea", "farm", "city", "sky")
CUES = {"yes": "good", "no": "bad"}  # label -> stem of its cue words
WORDS = (
    [f"{topic}{i}" for topic in TOPICS for i in range(20)]
    + [f"{stem}{i}" for stem in CUES.values() for i in range(4)]
    + [f"word{i}" for i in range(80)]
    + ["yes", "no", "maybe", "answer", "the", "question", ":", "\n"]
)

# Model type -> kind, class, settings of its tiny configuration.
BACKBONES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("encoder", "BertModel", {"initializer_range": 0.2}),
    "roberta": ("encoder", "RobertaModel", {"initializer_range": 0.2}),
    "t5": ("seq2seq", "T5ForConditionalGeneration", {}),
    "t5-gated": (
        "seq2seq",
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("seq2seq", "MT5ForConditionalGeneration", {"tie_word_embeddings": False}),
    "llama": ("causal", "LlamaForCausalLM", {"initializer_range": 0.2}),
    "mistral": ("causal", "MistralForCausalLM", {"initializer_range": 0.2, "sliding_window": 64}),
    "qwen2": ("causal", "Qwen2ForCausalLM", {"initializer_range": 0.2}),
}
KNOWN = BACKBONES | OTHERS | FOUND | REFUSED
FAMILIES = ("bert", "t5", "llama")  # one per kind
GENERATORS = ("t5", "llama")
WRITERS = [name for name, (kind, _, _) in BACKBONES.items() if kind != "encoder"]


@pytest.fixture(autouse=True)
def one_thread():
    """Run torch on one thread, which is faster for such small models. Active in each test module that imports it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _tokenizer(kind: str, padding: int = 0) -> transformers.PreTrainedTokenizerFast:
    specials = {
        "encoder": ["<unk>", "<pad>", "<cls>", "<sep>"] if padding else ["<pad>", "<unk>", "<cls>", "<sep>"],
        "seq2seq": ["<pad>", "</s>", "<unk>"],
        "causal": ["<unk>", "<s>", "</s>"],  # no padding token, as with LLaMA
    }[kind]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    template = {"encoder": "<cls> $A <sep>", "seq2seq": "$A </s>", "causal": "<s> $A"}[kind]
    used = [(token, vocabulary[token]) for token in template.split() if token in vocabulary]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    roles = {
        "encoder": {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>"},
        "seq2seq": {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"},
        "causal": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    }[kind]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def make_tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS` with the special tokens of the model's kind."""
    kind, _, own = KNOWN[name]
    return copy.deepcopy(_tokenizer(kind, own.get("pad_token_id", 0)))


@functools.cache
def _model(name: str, seed: int) -> transformers.PreTrainedModel:
    kind, class_name, own = KNOWN[name]
    sizes: dict[str, Any] = {"vocab_size": len(_tokenizer(kind)), "num_attention_heads": 4}
    if name in ("bart", "m2m_100", "pegasus"):
        sizes = {"vocab_size": len(_tokenizer(kind)), "encoder_layers": LAYERS, "decoder_layers": 2, "d_model": WIDTH}
        sizes |= {
            f"{side}_{what}": n
            for side in ("encoder", "decoder")
            for what, n in (("ffn_dim", 48), ("attention_heads", 4))
        }
        special = {"pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": POSITIONS}
    elif kind == "seq2seq":
        special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        sizes = {"vocab_size": len(_tokenizer(kind)), "num_layers": LAYERS, "num_decoder_layers": 2, "num_heads": 4}
        sizes |= {"d_model": WIDTH, "d_kv": 8, "d_ff": 48}
    elif kind == "causal":
        special = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
        sizes |= {} if name in ("gpt2", *FOUND, *REFUSED) else {"num_key_value_heads": 2}
    else:
        special = {"pad_token_id": 0}
    if kind != "seq2seq":
        sizes |= {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "max_position_embeddings": POSITIONS}
        sizes |= {{"gpt2": "n_inner", "distilbert": "hidden_dim"}.get(name, "intermediate_size"): 48}
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**sizes, **special | own))
        for parameter in model.parameters():  # make biases and norm weights non-constant
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        if kind != "encoder":
            # Makes some texts end earlier than others.
            model.get_output_embeddings().weight.data[special["eos_token_id"]] *= 2.5
    return model.eval().requires_grad_(False)


def make_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A new copy of the tiny random model of this type and seed."""
    return copy.deepcopy(_model(name, seed))


def make_slm(name: str, seed: int = 0, **config: Any) -> ScalableLM:
    """A ScalableLM over `make_model`, without tasks."""
    return ScalableLM.from_backbone(make_model(name, seed), tokenizer=make_tokenizer(name), **config)


def beside_its_backbone(folder: Path, tasks: Callable[[ScalableLM], Sequence[LearnedTask]]) -> Path:
    """Save a BERT and a store of tasks for it, which other processes can open; returns the store's path."""
    make_model("bert").save_pretrained(folder / "bert")
    make_tokenizer("bert").save_pretrained(folder / "bert")
    slm = ScalableLM.from_backbone(str(folder / "bert"))
    knows(slm, *tasks(slm))
    slm.save_pretrained(folder / "store")
    return folder / "store"


def reopened(path: Path, name: str = "bert", **options: Any) -> ScalableLM:
    """The store at `path`, opened over a fresh copy of its backbone."""
    return ScalableLM.from_pretrained(path, backbone=make_model(name), tokenizer=make_tokenizer(name), **options)


def sentence(topic: str, rng: random.Random, *, cue: str | None = None, words: int | None = None) -> str:
    """Random words of one topic, by default 3 to 14, with two cue words inserted if `cue` is given."""
    chosen = [f"{topic}{rng.randrange(20)}" for _ in range(words or rng.randint(3, 14))]
    for _ in range(2 if cue else 0):
        chosen.insert(rng.randrange(len(chosen) + 1), f"{cue}{rng.randrange(4)}")
    return " ".join(chosen)


def toy_task(name: str, topic: str | None = None, rows: int = 32, seed: int = 0, *, instruction: str = "") -> Task:
    """Texts of one topic whose cue words show the label, yes or no; with an instruction, the label is the output."""
    rng = random.Random(f"{name}/{seed}")
    pairs = []
    for i in range(rows):
        label = tuple(CUES)[i % len(CUES)]
        pairs.append((sentence(topic or name, rng, cue=CUES[label]), label))
    if not instruction:
        return Task(name, pairs)
    return Task(name, [{"instruction": instruction, "input": text, "output": label} for text, label in pairs])


def texts_of(*tasks: Task) -> list[str]:
    """Texts of all rows, alternating between the tasks."""
    most = max(len(task.rows) for task in tasks)
    return [task.rows[i].text for i in range(most) for task in tasks if i < len(task.rows)]


def random_task(
    slm: ScalableLM,
    name: str,
    *,
    topic: str | None = None,
    slots: int = 1,
    rank: int = 4,
    labels: Sequence[str] | None = ("no", "yes"),
    scale: float = 1.0,
) -> LearnedTask:
    """A task with random LoRA values and head, and router statistics of random texts of its topic."""
    generator = torch.Generator().manual_seed(name_seed(name, 0))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rng = random.Random(name)
    rows = [Row(sentence(topic or name, rng)) for _ in range(24)]
    values = {}
    for module, (features_in, features_out) in slm.model.widths.items():
        lora_a = draw(slots, rank, features_in) / features_in**0.5
        values[module] = (lora_a, scale * draw(slots, rank, features_out) / rank**0.5)
    head = None
    if slm.model.backbone.kind == "encoder":
        assert labels is not None
        head = (draw(len(labels), slm.model.backbone.width), draw(len(labels)))
    part = slm.model.new_router().fit(slm.model.queries(rows), slots, name_seed(name, 0))
    return LearnedTask(name, None if labels is None else tuple(labels), values, part, head)


def knows(slm: ScalableLM, *tasks: LearnedTask) -> ScalableLM:
    """Replace all tasks of `slm` by these, and return it."""
    slm._set(tasks)
    return slm


def farm_and_sea(slm: ScalableLM) -> list[LearnedTask]:
    """Replace the tasks of `slm` by two random ones of different ranks, and return these."""
    tasks = [random_task(slm, "farm"), random_task(slm, "sea", rank=3)]
    knows(slm, *tasks)
    return tasks


def on_gpu(name: str) -> ScalableLM:
    """A model on a GPU with the tasks farm and sea."""
    slm = ScalableLM.from_backbone(make_model(name).cuda(), tokenizer=make_tokenizer(name))
    farm_and_sea(slm)
    return slm


def mixed_texts(count: int, seed: int = 0, topics: Sequence[str] = ("sea", "farm")) -> list[str]:
    """Random texts, each of one of the topics, of 1 to 30 words."""
    rng = random.Random(seed)
    return [sentence(rng.choice(topics), rng, words=rng.choice((1, 2, 5, 9, 16, 30))) for _ in range(count)]


def bits(slm: ScalableLM) -> tuple[Tensor, ...]:
    """A gaussian router's state, and routes, scores and distances for fixed texts: for bitwise comparison of models."""
    texts = mixed_texts(12)
    queries = slm.model.queries([Row(text) for text in texts])
    route = slm.model.route(queries)
    scores = torch.tensor([answer.score for answer in slm.predict(texts)])
    return (*slm.model.router.discriminant, route.slot_ids, route.weights, scores, slm.model.distance(queries, route))


def pool_values(tasks: Sequence[LearnedTask], module: str) -> list[tuple[Tensor, Tensor]]:
    """(lora_a [r, I], lora_b [r, O]) of each slot, in the order of the pool: tasks by name, then their slots."""
    return [
        (a, b) for task in sorted(tasks, key=lambda task: task.name) for a, b in zip(*task.values[module], strict=True)
    ]


@torch.no_grad()
def merge(model: nn.Module, tasks: Sequence[LearnedTask], route: RouteTaken) -> nn.Module:
    """A copy of the bare model with a route's increments merged into its weights: W += sum_k w_k (A_k' B_k)'.

    "module[word]" is a part of a fused module, which concatenates query, key and value, or gate and up.
    """
    merged = copy.deepcopy(model)
    for name in tasks[0].values:
        module, _, word = name.rstrip("]").partition("[")
        layer = merged.get_submodule(module)
        weight = layer.weight.T if isinstance(layer, transformers.Conv1D) else layer.weight  # [O, I]
        for slot, share in zip(route.slots, route.weights, strict=True):
            lora_a, lora_b = pool_values(tasks, name)[slot]
            last, size = len(weight), lora_b.shape[1]
            first = {"key": last - 2 * size, "value": last - size, "up": last - size}.get(word, 0)
            weight[first : first + size] += share * (lora_a.T @ lora_b).T
    return merged


def route_of(ids: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Route:
    return Route(torch.tensor(ids), torch.tensor(weights, dtype=torch.float32))


def check_invariance(slm: ScalableLM, rows: list, **options) -> None:
    """Assert that order and batch size do not change slots and answers, nor weights and scores by more than 1e-5."""
    expected = slm.predict(rows, batch_size=32, **options)
    for order_seed, batch_size in ((1, 1), (2, 7), (3, 32)):
        order = list(range(len(rows)))
        random.Random(order_seed).shuffle(order)
        order = order[:60] if batch_size == 1 else order  # batches of one row are slow
        answers = slm.predict([rows[i] for i in order], batch_size=batch_size, **options)
        for place, got in zip(order, answers, strict=True):
            want = expected[place]
            assert got.route.slots == want.route.slots
            assert (got.task, got.label, got.text) == (want.task, want.label, want.text)
            assert got.route.weights == pytest.approx(want.route.weights, abs=1e-5)
            assert got.score == pytest.approx(want.score, abs=1e-5)


FAR = " ".join(["word7"] * 12)  # unlike all texts of the random tasks


def two_tasks(slm: ScalableLM, **options) -> list[LearnedTask]:
    tasks = [random_task(slm, "farm", labels=("no", "yes"), **options)]
    return [*tasks, random_task(slm, "sea", labels=("maybe", "no", "yes"), **options)]


def mixed(each: int = 4, seed: int = 1) -> list[str]:
    return texts_of(*(toy_task(topic, rows=each, seed=seed) for topic in ("sea", "farm")))


def bare_text(name: str, text: str, max_new_tokens: int) -> str:
    """Text that plain transformers generates with the bare model."""
    model, tokenizer = make_model(name), make_tokenizer(name)
    ids = prompt_ids(name, text)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=0
    )
    return tokenizer.decode(out[0, ids.shape[1] if name == "llama" else 1 :], skip_special_tokens=True).strip()


def prompt_ids(name: str, text: str) -> torch.Tensor:
    tokenizer = make_tokenizer(name)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"] if name == "llama" else []
    return torch.tensor([tokenizer(text)["input_ids"] + newline])


def learned(slm: ScalableLM, name: str) -> LearnedTask:
    return next(task for task in slm.model.pool.tasks if task.name == name)


def saved(slm: ScalableLM, name: str) -> bytes:
    """Content of the file that the task has in a store."""
    return task_to_bytes(learned(slm, name))


def easy(name: str, rows: int = 48, seed: int = 0) -> Task:
    """Three-word texts whose last word determines the label: a random backbone learns them in a second."""
    rng = random.Random(f"{name} {seed}")
    cues = (("good0", "yes"), ("bad0", "no"))
    return Task(
        name,
        [
            (f"{name}{rng.randrange(20)} {name}{rng.randrange(20)} {cues[i % 2][0]}", cues[i % 2][1])
            for i in range(rows)
        ],
    )


def tasks_as_files(folder: Path, names: Sequence[str]) -> None:
    """Write a tiny BERT to `bert`, and one CSV file per task, of different sizes."""
    make_model("bert").save_pretrained(folder / "bert")
    make_tokenizer("bert").save_pretrained(folder / "bert")
    for i, name in enumerate(names):
        rows = [f"{row.text},{row.target}\n" for row in easy(name, 12 + 7 * i).rows]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(rows))


def replace_options(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]  # the tensors, without the header, which holds the options
