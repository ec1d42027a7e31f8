"""`slm-fast import` and `slm-fast export`: PEFT LoRA adapters as tasks, and tasks as PEFT adapters."""

from __future__ import annotations

import argparse
import sys

from slm_fast.cli.arguments import Once, Verbs, add_device_options, add_reading_options, open_store
from slm_fast.cli.learn import add_model_options, open_or_new


def add(verbs: Verbs) -> None:
    about = "import a PEFT LoRA adapter for this backbone as a task, routed by about 50 example texts"
    given = verbs.add("import", run_import, about)
    given.add_argument(
        "--adapter", action=Once, required=True, metavar="DIR", help="adapter folder, or its name on the hub"
    )
    given.add_argument("--name", required=True, help="name of the new task")
    about = "about 50 texts of the task (csv, tsv, jsonl, json, parquet); labels are ignored"
    given.add_argument("--examples", action=Once, required=True, metavar="FILE", help=about)
    given.add_argument("--labels", metavar="FILE", help="JSON list of the label names of the adapter's head, in order")
    about = "also load the adapter in PEFT and compare outputs on the examples; a difference above 1e-4 is an error"
    given.add_argument("--check", action="store_true", help=about)
    add_reading_options(given, label=False)
    add_device_options(given, "float32")
    add_model_options(given)
    export = verbs.add("export", run_export, "export a task as a PEFT LoRA adapter")
    export.add_argument("name", metavar="TASK")
    export.add_argument("folder", metavar="DIR", help="output folder; must be empty or not exist")
    about = "fixed weights of the slots of a task with several, one per slot; their sum is 1"
    export.add_argument("--weights", type=_weights, metavar="W,W", help=about)
    add_device_options(export, "float32")


def run_import(arguments: argparse.Namespace) -> int:
    from slm_fast.data import rows_of_file
    from slm_fast.store import Store

    reading = {"delimiter": arguments.delimiter, "encoding": arguments.encoding}
    rows = rows_of_file(arguments.examples, text=arguments.text_column, **reading)
    slm = open_or_new(arguments)
    before, done = slm.model.ahead, "kept" if arguments.name in slm.learned else "imported"
    difference = slm.import_adapter(
        arguments.adapter, arguments.name, rows, labels=arguments.labels, check=arguments.check
    )
    if slm.store is None:
        slm.save_pretrained(arguments.store)
    if difference is not None:
        print(f"largest difference from PEFT on {len(rows)} examples: {difference:.1e}", file=sys.stderr)
    values = slm.learned[arguments.name].values
    ranks = sorted({lora_a.shape[1] for lora_a, _ in values.values()})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    held = f"tasks in {arguments.store}: {len(Store.open(arguments.store).files)}"
    print(f"{done} {arguments.name}: {len(values)} layers, {shown}; {held}", file=sys.stderr)
    if slm.model.ahead and not before:
        print(_cost(slm.model.config.taps or (0,), len(slm.model.backbone.layers)), file=sys.stderr)
    return 0


def _cost(taps: tuple[int, ...], layers: int) -> str:
    return (
        f"note: the task has increments below layer {taps[-1]} or its own prompt, so routing this store now takes an "
        f"extra pass through the lowest {taps[-1]} of {layers} layers. A new store with --taps 0 (routing from the "
        "embeddings) or --query sentence (a second model) needs no such pass"
    )


def run_export(arguments: argparse.Namespace) -> int:
    slm = open_store(arguments)
    slm.export_adapter(arguments.name, arguments.folder, weights=arguments.weights)
    print(f"exported {arguments.name} to {arguments.folder}", file=sys.stderr)
    return 0


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.5,0.5, got {text!r}") from None
