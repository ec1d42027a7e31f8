"""Learning one task: slm_fast beside PEFT's LoRA on the same layers and the paper's procedure; rows/s and peak memory.

    python -m benchmarks.training --data DIR --shape bert-base --layers 4 --rows 96
    python -m benchmarks.training --data DIR --shape t5-large --layers 4 --rows 32 --batch-size 4
    python -m benchmarks.training --data DIR --shape llama-2-7b --layers 2 --rows 16 --batch-size 2 --epochs 1

All learn the same rows (the paper's procedure a quarter of them) for as many epochs with the same optimiser and batch
size, in turns within one run. The seconds are those of the whole task, queries and keys included. A run adds its
shape's rows to benchmarks/results/training.csv and draws the .png anew; the same command with --memory then fills in
the peak memory, of a process of its own for each method.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.machine import peak_mib
from benchmarks.panels import panels
from benchmarks.shapes import FULL, SHAPES, backbones, finished, task
from benchmarks.timing import RESULTS, percentiles, read_csv, table, write_csv
from slm_fast import Task
from slm_fast.backbone import Backbone, pad
from slm_fast.examples import Examples, batches, prepare
from slm_fast.layers import AdaptedLinear
from slm_fast.learn import IGNORE, LearnOptions, _Trainer, learn_task, optimizer_and_schedule
from slm_fast.model import AdaptedModel, Config
from slm_fast.ops import Route
from slm_fast.query import TrunkQuery
from slm_fast.tasks import name_seed

Learn = Callable[[], object]
Load = Callable[[], Backbone]
LENGTH = 128
OURS = "slm_fast"
TITLES = {
    OURS: "slm_fast (trunk + gaussian)",
    "slm_fast-bf16": "slm_fast, bfloat16 autocast",
    "peft": "PEFT LoRA, same layers",
    "peft-bucketed": "PEFT LoRA, batches of like lengths",
    "paper": "the paper's procedure",
}


def ours(load: Load, rows: Task, options: LearnOptions) -> Learn:
    model = AdaptedModel(load(), Config(max_length=LENGTH))
    return lambda: learn_task(model, rows, options, progress=False)


def lora(load: Load, rows: Task, options: LearnOptions, bucketed: bool) -> Learn:
    """PEFT on the layers slm_fast adapts by default, tokenised ahead."""
    loaded = load()
    config = Config(max_length=LENGTH).completed(loaded)
    own = AdaptedModel(load(), config)
    examples = tokenised(own, rows)
    modules = loaded.find_linears(config.targets, config.first_layer or 0)
    lengths, encoder = examples.lengths, loaded.kind == "encoder"
    wanted = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, lora_dropout=0.0, target_modules=modules)
    model = peft.get_peft_model(loaded.model, wanted)
    head = nn.Linear(loaded.width, len(rows.labels or ()), device=loaded.device)

    def loss_of(chosen: list[int]) -> Tensor:
        encoded = examples.encoded(own, chosen)
        ids, mask = encoded.input_ids, encoded.attention_mask
        answers = [examples.answers[i] for i in chosen]
        if encoder:
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            return cross_entropy(head(TrunkQuery.pool(hidden, mask)), torch.tensor(answers, device=loaded.device)[:, 0])
        if loaded.kind == "causal":
            answers = [
                [IGNORE] * (len(examples.sequences[i]) - len(answer)) + answer
                for i, answer in zip(chosen, answers, strict=True)
            ]
        labels = pad(answers, IGNORE)[0].to(loaded.device)
        loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return loss

    def learn() -> None:
        parameters = [p for p in model.parameters() if p.requires_grad] + (list(head.parameters()) if encoder else [])
        optimizer, scheduler = optimizer_and_schedule(parameters, options, len(rows.rows))
        generator = torch.Generator().manual_seed(0)
        for _ in range(options.epochs_for(len(rows.rows))):
            plain = torch.randperm(len(examples), generator=generator).split(options.batch_size)
            for chosen in batches(lengths, options.batch_size, generator) if bucketed else plain:
                optimizer.zero_grad()
                loss_of(chosen.tolist()).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                scheduler.step()

    return learn


def tokenised(model: AdaptedModel, rows: Task) -> Examples:
    return prepare(model, rows, rows.labels, LENGTH)[0]


def dense(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """Each sample's increment as a matrix of its own, as in the paper's released code."""
    y: Tensor = layer.base(x)
    route, increments = layer.adaptation.route, layer.increments
    if route is None or increments is None:
        return y
    lora_a, lora_b = increments
    weights = route.weights.to(x.dtype)[..., None, None]
    increment_BIO = (weights * (lora_a[route.slot_ids].transpose(2, 3) @ lora_b[route.slot_ids])).sum(1)
    return y + x @ increment_BIO


def paper(load: Load, rows: Task, options: LearnOptions) -> Learn:
    """Four slots a task on the attention outputs of all layers, queries from a sentence encoder (MiniLM) again in every
    epoch, increments as matrices, shuffled batches."""
    config = Config(
        query="sentence",
        router="dtkr",
        encoder="minilm",
        targets=("out",),
        first_layer=0,
        k=4,
        groups=6,
        max_length=LENGTH,
    )
    model = AdaptedModel(load(), config)
    for name in model.modules:
        layer = model.backbone.model.get_submodule(name)
        layer.forward = MethodType(dense, layer)

    def learn() -> None:
        trainer, seed = _Trainer(model, rows, options), name_seed(rows.name, 0)
        examples, query = prepare(model, rows, rows.labels, LENGTH)
        part = model.new_router().fit(query, 4, seed)
        generator = torch.Generator().manual_seed(seed)
        trainer.allocate(4, part, generator)
        optimizer, scheduler = optimizer_and_schedule(trainer.parameters(), options, len(examples))
        for _ in range(options.epochs_for(len(examples))):
            for chosen in torch.randperm(len(examples), generator=generator).split(options.batch_size):
                found = trainer.routed(examples, model.queries([rows.rows[i] for i in chosen.tolist()])).route
                assert found is not None
                batch = Examples(
                    [examples.sequences[i] for i in chosen.tolist()],
                    [examples.answers[i] for i in chosen.tolist()],
                    None,
                    Route(found.slot_ids, found.weights),
                )
                optimizer.zero_grad()
                trainer._backward(batch, list(range(len(batch))))
                nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
                optimizer.step()
                scheduler.step()

    return learn


def rows_for(name: str, arguments: argparse.Namespace) -> int:
    """The paper's procedure is slow and costs the same for each row, so it learns a quarter of them."""
    return int(arguments.rows) // (4 if name == "paper" else 1)


def candidate(name: str, load: Load, arguments: argparse.Namespace) -> Learn:
    rows = task(arguments.data, "yahoo", rows_for(name, arguments))
    options = LearnOptions(epochs=arguments.epochs, batch_size=arguments.batch_size)
    if name == "paper":
        return paper(load, rows, options)
    if name.startswith("peft"):
        return lora(load, rows, options, bucketed=name == "peft-bucketed")
    return ours(load, rows, LearnOptions(**{**vars(options), "autocast": name.endswith("bf16")}))


def peak(name: str, arguments: argparse.Namespace) -> int:
    """MiB that a process which learns the task once holds at most while it learns."""
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--only", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return round(float(done.stdout))


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, found = panels(len(shapes), 3.2, 2.2)
    for panel, shape in zip(found, shapes, strict=True):
        own = [row for row in rows if row["shape"] == shape][::-1]
        bars = panel.barh([TITLES[row["method"]] for row in own], [float(row["rows_per_second"]) for row in own])
        for bar, row in zip(bars, own, strict=True):
            bar.set_color("tab:blue" if row["method"].startswith(OURS) else "tab:gray")
        panel.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        panel.set_title(f"{shape}, {own[0]['layers']} layers", fontsize=10)
        panel.set_xlabel("rows a second")
        panel.tick_params(labelsize=8)
        panel.margins(x=0.15)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Learn one task with slm_fast, PEFT and the paper's procedure.")
    parser.add_argument("--data", type=Path, help="folder with a folder a task; without it texts are generated")
    parser.add_argument("--shape", choices=["minilm", *SHAPES], default="minilm")
    parser.add_argument("--layers", type=int, help="default: all of the shape's")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="only fill in the peak memory of a shape timed before")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.csv")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layers = arguments.layers or FULL[arguments.shape]
    if arguments.only:
        print(peak_mib(candidate(arguments.only, backbones(arguments.shape, layers), arguments))[1])
        return 0
    kept: list[dict[str, Any]] = list(read_csv(arguments.output)) if arguments.output.exists() else []
    if arguments.memory:
        own = [row for row in kept if row["shape"] == arguments.shape]
        if not own:
            parser.error(f"--memory: {arguments.output} has no rows of {arguments.shape}; time it first")
        for row in own:
            given = {"layers": layers, "rows": rows_for(row["method"], arguments), "batch_size": arguments.batch_size}
            for name, value in given.items():
                if row[name] != str(value):
                    parser.error(f"--memory: {arguments.shape} was timed with {name} {row[name]}, got {value}")
        for row in own:
            row["peak_mib"] = peak(row["method"], arguments)
            write_csv(arguments.output, kept)
        print(table(own))
        return 0
    load = backbones(arguments.shape, layers)
    learners = {name: candidate(name, load, arguments) for name in TITLES}
    took_ms: dict[str, list[float]] = {name: [] for name in learners}
    for _ in range(arguments.rounds):
        for name, learn in learners.items():
            start = time.perf_counter()
            finished(learn)()
            took_ms[name].append(1e3 * (time.perf_counter() - start))
    times = {name: percentiles(took) for name, took in took_ms.items()}
    same = ("shape", "layers", "rows", "epochs", "batch_size", "method")
    peaks = {tuple(row[name] for name in same): row["peak_mib"] for row in kept}  # known from a run with --memory
    ours, done = 0.0, []
    for name, took in times.items():
        passed = 1e3 * rows_for(name, arguments) * arguments.epochs
        rate = {p: passed / getattr(took, p) for p in ("p20", "p50", "p80")}
        ours = rate["p50"] if name == OURS else ours
        done.append(
            {
                "shape": arguments.shape,
                "layers": layers,
                "rows": rows_for(name, arguments),
                "epochs": arguments.epochs,
                "batch_size": arguments.batch_size,
                "method": name,
                "rows_per_second": round(rate["p50"], 2),
                "p20": round(rate["p80"], 2),
                "p80": round(rate["p20"], 2),
                "slm_fast_times": round(ours / rate["p50"], 2),
                "peak_mib": "",
            }
        )
    for row in done:
        row["peak_mib"] = peaks.get(tuple(str(row[name]) for name in same), "")
    print(table(done))
    rows = [row for row in kept if row["shape"] != arguments.shape] + done
    write_csv(arguments.output, rows)
    plot(arguments.output.with_suffix(".png"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
