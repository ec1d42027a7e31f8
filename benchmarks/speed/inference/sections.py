"""The sections: each takes the command's options and returns one line of the CSV per way."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from benchmarks.machine import peak_mib
from benchmarks.speed.backbones import DEVICE, FULL, finished, pretrained
from benchmarks.speed.inference.ways import BARE, OURS, PEFT, PER_SAMPLE, TWO_MODELS, Ways, answer
from benchmarks.speed.tasks import random_tasks
from benchmarks.speed.texts import TASKS, mixed, texts_of
from benchmarks.speed.timing import Others, Times, time_together
from slm_fast import ScalableLM
from slm_fast.loading import loading

Calls = Mapping[str, Sequence[Callable[[], object]]]  # the calls of each way, in parts


@dataclass(frozen=True)
class Measured:
    """Layers, batches and tokens per batch of a backbone on a CPU with few cores. A GPU runs all layers."""

    layers: int
    batches: int
    tokens: int


BACKBONES = {
    "minilm": Measured(6, 4, 2048),
    "bert-base": Measured(4, 4, 1024),
    "t5-large": Measured(4, 1, 1024),
    "llama-2-7b": Measured(2, 1, 512),
}


def layers_of(options: argparse.Namespace) -> int:
    """The number of layers to run. MiniLM is real, so all of its layers run."""
    if options.backbone == "minilm" or (DEVICE != "cpu" and not options.layers):
        return FULL[options.backbone]
    return options.layers or BACKBONES[options.backbone].layers


def make_ways(options: argparse.Namespace, folder: str) -> Ways:
    dtype, size = getattr(torch, options.dtype), BACKBONES[options.backbone]
    model, tokenizer = pretrained(options.backbone, layers_of(options), dtype, decoder_layers=1)
    encoder = "minilm"
    if options.backbone != "minilm":  # the second model is a BERT-base, as deep as a BERT-base backbone, else complete
        layers = layers_of(options) if options.backbone == "bert-base" else FULL["bert-base"]
        with loading():
            for part in pretrained("bert-base", options.encoder_layers or layers, dtype):
                part.save_pretrained(folder)
        encoder = folder
    return Ways(
        model,
        tokenizer,
        encoder,
        texts_of(options.data, "train", 64),
        mixed(texts_of(options.data, "test", 120)),
        tokens=options.batch_tokens or size.tokens,
        batches=options.batches or size.batches,
    )


def all_of(parts: Sequence[Callable[[], object]]) -> None:
    for part in parts:
        part()


@torch.inference_mode()
def lines(
    options: argparse.Namespace, calls: Calls, rows: int, dtypes: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One line per way, each compared with the first.

    A part is timed in turns with the same part of the other ways, so that slow moments of the machine affect all ways
    alike. A way's percentiles are the sums of its parts' percentiles.
    """
    memory = {name: peak_mib(partial(all_of, parts)) for name, parts in calls.items()}
    times = dict.fromkeys(calls, Times(0.0, 0.0, 0.0))
    with Others() as others:
        for i in range(max(map(len, calls.values()))):
            parts = {name: own[i] for name, own in calls.items() if i < len(own)}
            parts = {name: finished(part) for name, part in parts.items()}
            for name, part in time_together(parts, seconds=0.0, least=options.rounds).items():
                times[name] = Times(*(sum(pair) for pair in zip(astuple(times[name]), astuple(part), strict=True)))
    first = next(iter(times.values())).p50
    return [
        {
            "section": options.section,
            "backbone": options.backbone,
            "layers": layers_of(options),
            "dtype": (dtypes or {}).get(name, options.dtype),
            "data": "real" if options.data else "made up",
            "way": name,
            "rows": rows,
            "p20_ms": f"{t.p20:.1f}",
            "p50_ms": f"{t.p50:.1f}",
            "p80_ms": f"{t.p80:.1f}",
            "rows_per_s": f"{1e3 * rows / t.p50:.1f}",
            "to_first": f"{first / t.p50:.3f}",
            "added_ms": f"{t.p50 - first:.1f}",
            "peak_mib": f"{memory[name][1] - memory[name][0]:.0f}",  # above what the process held before
            "other_load": f"{others.share:.2f}",
        }
        for name, t in times.items()
    ]


def ways(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One pass over tokenised batches in every way."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_ways(options, folder)
        # The bare backbone is the baseline, so it always runs.
        names = [name for name in made.steps if name == BARE or options.ways is None or options.ways in name]
        return lines(options, {name: made.passes(name) for name in names}, made.rows)


def tasks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """5 and 200 tasks in the pool."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_ways(options, folder)
    many = made.learned(40, query="trunk", router="gaussian")

    calls = {
        f"{len(slm.tasks)} tasks": [partial(answer, slm, batch.encoded) for batch in made.batches]
        for slm in (made.slm, many)
    }
    return lines(options, calls, made.rows)


def user(options: argparse.Namespace) -> list[dict[str, Any]]:
    """From texts to labels, tokenisation included: slm_fast, and plain transformers in batches in arrival order."""
    rows = [text for _, text in mixed(texts_of(options.data, "test", -(-options.rows // len(TASKS))))]
    train = texts_of(options.data, "train", 64)

    def learned(dtype: str) -> ScalableLM:
        slm = ScalableLM.from_backbone("minilm", dtype=dtype)
        slm.add(random_tasks(slm, train))
        return slm

    full, auto = learned("float32"), learned("auto")
    plain, tokenizer = pretrained("minilm", FULL["minilm"])

    def transformers_way() -> None:
        for start in range(0, len(rows), 32):
            batch = tokenizer(
                rows[start : start + 32], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            plain(**batch.to(DEVICE)).last_hidden_state.mean(1).tolist()

    def in_arrival_order() -> None:
        for start in range(0, len(rows), 32):
            full.predict(rows[start : start + 32], batch_size=32, batch_tokens=10**9)

    calls = {
        "plain transformers, batches of 32 in arrival order": transformers_way,
        "slm_fast, batches of 32 in arrival order": in_arrival_order,
        "slm_fast": lambda: full.predict(rows),
        "slm_fast --dtype auto": lambda: auto.predict(rows),
    }
    chosen = str(auto.model.backbone.dtype).removeprefix("torch.")
    dtypes = {name: chosen if "auto" in name else "float32" for name in calls}
    return lines(options, {name: [call] for name, call in calls.items()}, len(rows), dtypes)


def profile(options: argparse.Namespace) -> str:
    """Where the time of one pass goes, for the bare backbone and for slm_fast."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_ways(options, folder)
    found = []
    for name in (BARE, OURS):
        parts = made.passes(name)
        with torch.inference_mode():
            all_of(parts)
            with torch.profiler.profile() as profiler:
                finished(partial(all_of, parts))()
        spent = attrgetter("self_cpu_time_total" if DEVICE == "cpu" else "self_device_time_total")
        events = sorted(profiler.key_averages(), key=spent, reverse=True)
        total = sum(map(spent, events))
        shape = f"{options.backbone}, {layers_of(options)} layers, {options.dtype}"
        found.append(f"{name}: {made.rows} rows, {shape}, {torch.get_num_threads()} threads, {total / 1e3:.0f} ms")
        found += [
            f"  {100 * own / total:5.1f} %  {own / 1e3:8.1f} ms  {event.count:5d} calls  {event.key}"
            for event in events[:14]
            if (own := spent(event))
        ]
    return "\n".join(found)


SECTIONS = {"ways": ways, "tasks": tasks, "user": user}


def claims(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ratios that matter, from the lines of one run of a section."""
    ms = {row["way"]: float(row["p50_ms"]) for row in rows}
    if "5 tasks" in ms:
        return [f"rows/s with 200 tasks, of those with 5: {ms['5 tasks'] / ms['200 tasks']:.3f}"]
    if not {BARE, OURS} <= set(ms):
        return []
    added, found = ms[OURS] - ms[BARE], [f"rows/s of the bare backbone's: {ms[BARE] / ms[OURS]:.3f}"]
    if TWO_MODELS in ms:
        found.append(f"times the rows/s of the two-model design: {ms[TWO_MODELS] / ms[OURS]:.2f}")
    for name, other in (("PEFT's mixed batch", PEFT), ("materialised increments per sample", PER_SAMPLE)):
        if other in ms and ms[other] > ms[BARE]:
            found.append(f"time added, of what {name} adds: {added / (ms[other] - ms[BARE]):.3f}")
    return found
