"""Mixed-task inference beside what a user would run otherwise. One run, one machine, the same rows and batches.

    python -m benchmarks.inference --data DIR --backbone minilm --dtype bfloat16    # one section; some minutes
    python -m benchmarks.inference --data DIR --section user                        # from texts to answers
    python -m benchmarks.inference --plot

Sections are merged into one CSV, each line with the settings of its run. Ways are called in turns; a ratio is one of
medians in one run. Backbones other than MiniLM have random weights and the layer shapes of their names, with fewer
layers where the machine asks for it. `DIR` holds `<task>/test.jsonl.gz` and `train.jsonl.gz` of the five tasks; without
it texts of the same lengths are made up.

ways:     one pass over tokenised batches of about 2,048 tokens. All of them run on the same base with the same linear
          layers, but "plain transformers", which is nobody's but its own.
tasks:    5 and 200 tasks in the pool.
user:     from texts to labels: plain transformers in fixed batches in arrival order, and slm_fast.
profile:  where a pass's time goes, as text.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks.ops.bench_multi_lora import materialised
from benchmarks.timing import RESULTS, Others, read_csv, table, time_together, write_csv
from slm_fast import ScalableLM
from slm_fast.adapted import AdaptedLinear
from slm_fast.backbones import Encoded, quiet, resolve
from slm_fast.infer import plan
from slm_fast.linear import quicken
from slm_fast.model import Passage
from slm_fast.query import SentenceQuery, TrunkQuery
from slm_fast.tasks import LearnedTask, Row, Task, name_seed

TASKS = ("ag_news", "amazon", "dbpedia", "yahoo", "yelp")
# Tokens (25th, 50th, 95th percentile) of the real tasks' texts, for made-up ones.
LENGTHS = {"ag_news": (40, 50, 75), "amazon": (55, 85, 195), "dbpedia": (50, 70, 120), "yahoo": (35, 80, 340),
           "yelp": (60, 130, 450)}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A backbone's layers, and how many of them and of batches are run here."""

    config: type[transformers.PretrainedConfig] | None
    sizes: Mapping[str, Any]
    layers: int
    batches: int
    tokens: int = 2048


SHAPES = {
    "minilm": Shape(None, {}, 6, 4),
    "bert-base": Shape(transformers.BertConfig, {}, 4, 2),
    "t5-large": Shape(
        transformers.T5Config,
        {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_heads": 16, "num_decoder_layers": 1,
         "decoder_start_token_id": 0},
        4, 1,
    ),
    "llama-7b": Shape(
        transformers.LlamaConfig,
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
        2, 1, 512,
    ),
}  # fmt: skip


# ---- what is answered, by what ----


def texts_of(data: Path | None, split: str, rows: int) -> dict[str, list[str]]:
    """The first rows of each task's texts, or made-up ones of about the same lengths."""
    if data is not None:
        return {
            name: [
                row.text for row in Task.from_file(name, data / name / f"{split}.jsonl.gz", training=False).rows[:rows]
            ]
            for name in TASKS
        }
    made = {}
    for name in TASKS:
        rng = random.Random(f"{name}/{split}")
        own = [f"{name[:2]}{i}" for i in range(50)]
        low, middle, high = LENGTHS[name]
        lengths = [int(rng.choice((low, middle, middle, high)) * rng.uniform(0.6, 1.2)) // 3 for _ in range(rows)]
        made[name] = [" ".join(rng.choice(own) for _ in range(max(3, n))) for n in lengths]
    return made


def mixed(texts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(task, text) of all tasks, shuffled."""
    rows = [(name, text) for name, own in texts.items() for text in own]
    random.Random(0).shuffle(rows)
    return rows


def make_backbone(name: str, layers: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """A transformers model and MiniLM's tokenizer, which serves all shapes."""
    path = resolve("minilm")
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.eos_token = tokenizer.sep_token
        shape = SHAPES[name]
        if shape.config is None:
            return transformers.AutoModel.from_pretrained(path, dtype=dtype).eval(), tokenizer
        count = "num_layers" if name == "t5-large" else "num_hidden_layers"
        config = shape.config(
            **{**shape.sizes, count: layers, "vocab_size": len(tokenizer)}, eos_token_id=102, pad_token_id=0
        )
        auto = {"bert-base": transformers.AutoModel, "t5-large": transformers.AutoModelForSeq2SeqLM}
        torch.manual_seed(0)
        return auto.get(name, transformers.AutoModelForCausalLM).from_config(config, dtype=dtype).eval(), tokenizer


def sharing(model: nn.Module) -> Any:
    """A copy of a model that has the same parameters, so that many ways fit in memory."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def make_tasks(slm: ScalableLM, train: Mapping[str, Sequence[str]], copies: int = 1) -> list[LearnedTask]:
    """Tasks the router knows by real texts, with random increments (rank 8) and heads; copies have means nearby."""
    model = slm.model
    tasks = []
    for task, own in train.items():
        part = model.new_router().fit(model.queries([Row(text) for text in own]), 1, 0)
        for number in range(copies):
            name = f"{task}-{number}"
            draw = torch.Generator().manual_seed(name_seed(name, 0))
            values = {
                module: (
                    (torch.rand(1, 8, i, generator=draw) * 2 - 1) / i**0.5,
                    torch.randn(1, 8, o, generator=draw) * 0.01,
                )
                for module, (i, o) in model.widths.items()
            }
            head = None
            if model.backbone.kind == "encoder":
                head = (torch.randn(8, model.backbone.width, generator=draw) * 0.05, torch.zeros(8))
            moved = dict(part)
            if number and "mean" in part:
                moved["mean"] = part["mean"] * (1 + 0.1 * torch.randn(part["mean"].shape, generator=draw))
            tasks.append(LearnedTask(name, tuple("abcdefgh"), values, moved, head))
    return tasks


# ---- the ways ----


class PerSample(AdaptedLinear):
    """The paper's code: the whole increment of each sample, [B, I, O], and one more product."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        route, values = self.adaptation.route, self.adaptation.values
        if route is None or values is None:
            return y
        return materialised(y, x, *values[self.name], route.slot_ids, route.weights)


class OneTask(AdaptedLinear):
    """Batches of one task: its increment is added to the weight once a batch."""

    def forward(self, x: Tensor) -> Tensor:
        route, values = self.adaptation.route, self.adaptation.values
        if route is None or values is None:
            y: Tensor = self.base(x)
            return y
        a, b = values[self.name]
        slot = int(route.slot_ids[0, 0])
        weight: Any = self.base.weight
        bias: Any = self.base.bias
        return nn.functional.linear(x, weight + (a[slot].T @ b[slot]).T, bias)


@contextmanager
def with_layers(slm: ScalableLM, kind: type[AdaptedLinear]) -> Iterator[None]:
    own = [module for module in slm.model.backbone.model.modules() if isinstance(module, AdaptedLinear)]
    try:
        for module in own:
            module.__class__ = kind
        yield
    finally:
        for module in own:
            module.__class__ = AdaptedLinear


def answer(slm: ScalableLM, batch: Encoded, kind: type[AdaptedLinear] = AdaptedLinear) -> None:
    """A pass with route, increments and (where there are any) heads."""
    model, route = slm.model, None
    with with_layers(slm, kind):
        if model.config.query == "sentence":
            route = model.find_route(model.query.encode_tokens(batch))
        passage = Passage(batch.attention_mask)
        with model.passing(passage, model.pool.values, route):
            hidden = run_trunk(model.backbone.model, model.backbone.kind, batch)
        if model.pool.heads is not None:
            model.pool.heads.answer(TrunkQuery.pool(hidden, batch.attention_mask), model.pool.slot_task, passage.route)


def run_trunk(model: Any, kind: str, batch: Encoded, **more: Any) -> Tensor:
    """Last hidden states. Of T5 its encoder's; a causal model keeps no cache, as nothing is written here."""
    if kind == "seq2seq":
        model = model.get_encoder()
    elif kind == "causal":
        model, more = model.base_model, more | {"use_cache": False}
    hidden: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more).last_hidden_state
    return hidden


class Ways:
    """Every way over the same rows: names -> calls that pass all batches once."""

    def __init__(self, options: argparse.Namespace, layers: int) -> None:
        self.options, self.shape = options, SHAPES[options.backbone]
        self.dtype = getattr(torch, options.dtype)
        plain, self.tokenizer = make_backbone(options.backbone, layers, self.dtype)
        for parameter in plain.parameters():
            parameter.requires_grad_(False)
        self.plain = plain
        self.kind = {"minilm": "encoder", "bert-base": "encoder", "t5-large": "seq2seq"}.get(options.backbone, "causal")
        self.train = texts_of(options.data, "train", 64)
        self.folder = tempfile.TemporaryDirectory()

        quick = sharing(plain)
        quicken(quick)
        self.bare = quick
        self.slm = self.learned(quick=sharing(plain), query="trunk", router="gaussian")
        self.paper = self.learned(quick=sharing(plain), query="sentence", router="dtkr", encoder=self.encoder_path())
        self.peft = self.with_peft(sharing(quick))
        self.batches, self.names = self.batched(mixed(texts_of(options.data, "test", 120)), self.shape.batches)
        self.rows = sum(len(names) for names in self.names)
        self.by_task = [self.encode([self.ids[i] for i in own]) for own in self.one_task_each()]

    def learned(self, quick: Any, copies: int = 1, **config: Any) -> ScalableLM:
        slm = ScalableLM.from_backbone(quick, tokenizer=copy.deepcopy(self.tokenizer), max_length=256, **config)
        if isinstance(slm.model.query, SentenceQuery):
            slm.model.query.encoder.to(self.dtype)
        slm._set(make_tasks(slm, self.train, copies))
        return slm

    def encoder_path(self) -> str:
        """A second model for the sentence query: MiniLM beside MiniLM, else one of BERT-base's shape."""
        if self.options.backbone == "minilm":
            return "minilm"
        layers = self.options.layers or SHAPES["bert-base"].layers
        model, tokenizer = make_backbone(
            "bert-base", layers if self.options.backbone == "bert-base" else 12, self.dtype
        )
        model.save_pretrained(self.folder.name)
        tokenizer.save_pretrained(self.folder.name)
        return self.folder.name

    def with_peft(self, model: Any) -> Any:
        """PEFT LoRA of the same rank on the same layers, one adapter a task."""
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(self.slm.model.modules), lora_dropout=0.0)
        names = list(self.train)
        wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, config)
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.01)
        return wrapped.to(self.dtype).eval()

    def encode(self, rows: Sequence[list[int]]) -> Encoded:
        return self.slm.model.backbone.collate(rows, [False] * len(rows))

    def batched(self, rows: Sequence[tuple[str, str]], batches: int) -> tuple[list[Encoded], list[list[str]]]:
        """Batches from all over the lengths, as a window's plan makes them."""
        self.ids, _ = self.slm.model.backbone.tokenise([text for _, text in rows], 256)
        self.row_names = [name for name, _ in rows]
        planned = plan([len(ids) for ids in self.ids], self.shape.tokens)
        step = len(planned) / batches
        self.chosen = [planned[int((i + 0.5) * step)] for i in range(batches)]
        encoded = [self.encode([self.ids[i] for i in own]) for own in self.chosen]
        return encoded, [[self.row_names[i] for i in own] for own in self.chosen]

    def one_task_each(self) -> list[list[int]]:
        found = []
        for name in self.train:
            own = [i for rows in self.chosen for i in rows if self.row_names[i] == name]
            found += [[own[i] for i in rows] for rows in plan([len(self.ids[i]) for i in own], self.shape.tokens)]
        return found

    def calls(self) -> dict[str, Callable[[], object]]:
        kind = self.kind

        def each(step: Callable[[Encoded], object], batches: Sequence[Encoded] = self.batches) -> Callable[[], object]:
            def call() -> None:
                for batch in batches:
                    step(batch)

            return call

        def with_adapters() -> None:
            for batch, names in zip(self.batches, self.names, strict=True):
                with self.peft._enable_peft_forward_hooks(adapter_names=names):  # as its forward does
                    run_trunk(self.peft.base_model.model, kind, batch)

        def encoder_first(batch: Encoded) -> None:
            self.paper.model.query.encode_tokens(batch)
            run_trunk(self.bare, kind, batch)

        return {
            "bare backbone": each(lambda batch: run_trunk(self.bare, kind, batch)),
            "slm_fast, trunk + gaussian": each(lambda batch: answer(self.slm, batch)),
            "plain transformers": each(lambda batch: run_trunk(self.plain, kind, batch)),
            "PEFT mixed batch, oracle adapters": with_adapters,
            "bare backbone + separate encoder": each(encoder_first),
            "slm_fast, sentence + dtkr": each(lambda batch: answer(self.paper, batch)),
            "increments materialised, one task a batch": each(
                lambda batch: answer(self.slm, batch, OneTask), self.by_task
            ),
            "increments materialised, per sample": each(lambda batch: answer(self.slm, batch, PerSample)),
        }


def peak_mib(call: Callable[[], object]) -> float:
    """How far the process grows in a call: the peak of its resident memory above what it holds before."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = memory_kib(status, "VmRSS")
    call()
    return (memory_kib(status, "VmHWM") - before) / 1024


def memory_kib(status: Path, name: str) -> int:
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{name}:")))


@torch.inference_mode()
def measured(calls: Mapping[str, Callable[[], object]], rounds: int) -> tuple[dict[str, Any], dict[str, float], float]:
    peaks = {name: peak_mib(call) for name, call in calls.items()}
    with Others() as others:
        times = time_together(calls, seconds=0.0, least=rounds)
    return times, peaks, others.share


def lines(
    options: argparse.Namespace, calls: Mapping[str, Callable[[], object]], rows: int, layers: int, **columns: Any
) -> list[dict[str, Any]]:
    """A line a way, each compared with the first."""
    times, peaks, load = measured(calls, options.rounds)
    first = next(iter(times.values())).p50
    return [
        {
            "section": options.section,
            "backbone": options.backbone,
            "layers": layers,
            "dtype": columns.get("dtypes", {}).get(name, options.dtype),
            "data": "real" if options.data else "made up",
            "way": name,
            "rows": rows,
            "p20_ms": f"{t.p20:.1f}",
            "p50_ms": f"{t.p50:.1f}",
            "p80_ms": f"{t.p80:.1f}",
            "rows_per_s": f"{1e3 * rows / t.p50:.1f}",
            "to_first": f"{first / t.p50:.3f}",
            "added_ms": f"{t.p50 - first:.1f}",
            "peak_mib": f"{peaks[name]:.0f}",
            "other_load": f"{load:.2f}",
        }
        for name, t in times.items()
    ]


# ---- sections ----


def ways(options: argparse.Namespace, layers: int) -> list[dict[str, Any]]:
    made = Ways(options, layers)
    calls = {name: call for name, call in made.calls().items() if options.ways is None or options.ways in name}
    return lines(options, calls, made.rows, layers)


def tasks(options: argparse.Namespace, layers: int) -> list[dict[str, Any]]:
    made = Ways(options, layers)
    many = made.learned(sharing(made.plain), 40, query="trunk", router="gaussian")

    def call(slm: ScalableLM) -> None:
        for batch in made.batches:
            answer(slm, batch)

    calls = {f"{len(slm.tasks)} tasks": partial(call, slm) for slm in (made.slm, many)}
    return lines(options, calls, made.rows, layers)


def user(options: argparse.Namespace, layers: int) -> list[dict[str, Any]]:
    """Texts in, labels out, tokenising included."""
    rows = [text for _, text in mixed(texts_of(options.data, "test", options.rows // len(TASKS)))]
    train = texts_of(options.data, "train", 64)

    def learned(dtype: str) -> ScalableLM:
        slm = ScalableLM.from_backbone("minilm", dtype=dtype)
        slm._set(make_tasks(slm, train))
        return slm

    full, auto = learned("float32"), learned("auto")
    plain, tokenizer = make_backbone("minilm", layers, torch.float32)

    def transformers_way() -> None:
        for start in range(0, len(rows), 32):
            batch = tokenizer(
                rows[start : start + 32], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            plain(**batch).last_hidden_state.mean(1).tolist()

    def in_arrival_order(slm: ScalableLM) -> None:
        for start in range(0, len(rows), 32):
            slm.predict(rows[start : start + 32], batch_size=32, batch_tokens=10**9)

    calls: dict[str, Callable[[], object]] = {
        "plain transformers, batches of 32 in arrival order": transformers_way,
        "slm_fast, batches of 32 in arrival order": lambda: in_arrival_order(full),
        "slm_fast": lambda: full.predict(rows),
        "slm_fast --dtype auto": lambda: auto.predict(rows),
    }
    chosen = str(auto.model.backbone.dtype).removeprefix("torch.")
    dtypes = {name: chosen if "auto" in name else "float32" for name in calls}
    return lines(options, calls, len(rows), layers, dtypes=dtypes)


def profile(options: argparse.Namespace, layers: int) -> None:
    """Where the time of the bare backbone and of slm_fast goes, as text beside the CSV."""
    made = Ways(options, layers)
    calls, found = made.calls(), []
    for name in ("bare backbone", "slm_fast, trunk + gaussian"):
        with torch.inference_mode():
            calls[name]()
            with torch.profiler.profile() as profiler:
                calls[name]()
        events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(e.self_cpu_time_total for e in events)
        found.append(f"{name}: {made.rows} rows, {options.backbone}, {options.dtype}, {total / 1e3:.0f} ms")
        found += [
            f"  {100 * own / total:5.1f} %  {own / 1e3:8.1f} ms  {event.count:5d} calls  {event.key}"
            for event in events[:14]
            if (own := event.self_cpu_time_total)
        ]
    text = "\n".join(found) + "\n"
    print(text)
    label = f".{options.label}" if options.label else ""
    (RESULTS / f"inference_profile_{options.backbone}_{options.dtype}{label}.txt").write_text(text)


def merge(path: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a CSV with those of the same section, backbone and dtype replaced."""

    def section(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(row[key] for key in ("section", "backbone", "dtype" if row["section"] != "user" else "section"))

    new = {section(row) for row in found}
    kept = [row for row in read_csv(path) if section(row) not in new] if path.exists() else []
    return sorted([*kept, *found], key=section)


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Rows a second of every way, as a share of the bare backbone's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    own = [row for row in rows if row["section"] == "ways" and row["way"] != "bare backbone"]
    groups = list(dict.fromkeys((row["backbone"], row["dtype"]) for row in own))
    names = list(dict.fromkeys(row["way"] for row in own))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 1.5 * len(groups)), dpi=120, layout="constrained")
    for number, name in enumerate(names):
        places, shares = [], []
        for group, (backbone, dtype) in enumerate(groups):
            for row in own:
                if (row["backbone"], row["dtype"], row["way"]) == (backbone, dtype, name):
                    places.append(group + 0.8 * number / len(names) - 0.35)
                    shares.append(float(row["to_first"]))
        axes.barh(places, shares, height=0.75 / len(names), label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), [f"{backbone}\n{dtype}" for backbone, dtype in groups])
    axes.invert_yaxis()
    axes.set_xlabel("rows/s, the bare backbone's being 1")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path)


SECTIONS = {"ways": ways, "tasks": tasks, "user": user}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder a task; default: made-up texts")
    parser.add_argument("--section", choices=[*SECTIONS, "profile"], default="ways")
    parser.add_argument("--backbone", choices=list(SHAPES), default="minilm")
    parser.add_argument("--layers", type=int, help="of a backbone with random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ways", help="only ways with this in their names (and no ratios to others)")
    parser.add_argument("--rows", type=int, default=200, help="of the section user")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each way")
    parser.add_argument("--label", help="put into the name of a profile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS / "inference.csv")
    parser.add_argument("--plot", action="store_true", help="only draw what the CSV holds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.plot:
        layers = (None if options.backbone == "minilm" else options.layers) or SHAPES[options.backbone].layers
        if options.section == "profile":
            profile(options, layers)
            return 0
        found = SECTIONS[options.section](options, layers)
        print(table(found))
        write_csv(options.output, merge(options.output, found))
    plot(read_csv(options.output), options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
