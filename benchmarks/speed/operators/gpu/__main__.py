"""multi_lora and retrieve against their alternatives, on a GPU.

    python -m benchmarks.speed.operators.gpu OUT               # all shapes; writes OUT/{multi_lora,retrieve}_gpu.csv
    python -m benchmarks.speed.operators.gpu OUT --dry-run     # tiny shapes on a CPU, to check that everything works

Times are of CUDA graphs that cycle through enough sets of inputs to keep the cache cold, and of eager calls on the same
sets. Each way is compared with float64 before it is timed, and ours is repeated; failing ways are reported and left
out. The targets come last, met or missed (OUT/targets_gpu.csv). OUT/preference.csv is the backend order for dispatch
that this run suggests; it takes effect when committed as slm_fast/ops/preference.csv.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import Parser, duration, work_folder
from benchmarks.speed.operators.bench_multi_lora import gather_bmm_
from benchmarks.speed.operators.gpu.bench_multi_lora import SHAPES, multi_lora_rows, tiny
from benchmarks.speed.operators.gpu.bench_retrieve import SEARCHES, retrieve_rows
from benchmarks.speed.operators.gpu.compare import Rows
from benchmarks.speed.operators.gpu.verdicts import preference, verdicts
from benchmarks.tables import table, write_csv


def run(stem: str, cases: Sequence[Any], of: Callable[[Any], Rows], out: Path, deadline: float) -> tuple[Rows, Rows]:
    """Measure case after case until the deadline; return the measurements, and a verdict for each case that failed."""
    rows: Rows = []
    failed: Rows = []
    for number, case in enumerate(cases):
        if time.perf_counter() > deadline:
            print(f"# {stem}: {len(cases) - number} shapes left out, the time was up", flush=True)
            break
        try:
            found = of(case)
        except Exception as reason:  # a shape that does not fit must not lose the others
            print(f"# left out: {case}: {type(reason).__name__}: {str(reason)[:200]}", flush=True)
            failed.append({"target": f"{stem}: runs", "limit": "", "got": "-", "": "MISSED", "where": str(case)})
            continue
        print(table(found), flush=True)
        rows += found
        write_csv(out / f"{stem}_gpu.csv", rows)  # after each case, so that results survive a later failure
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows, failed


def main(arguments: Sequence[str]) -> int:
    parser = Parser("python -m benchmarks.speed.operators.gpu", __doc__)
    parser.add_argument("out", type=work_folder)
    parser.add_argument("--dry-run", action="store_true", help="run tiny shapes on a CPU")
    parser.add_argument("--seconds", type=duration, default=0.15, help="seconds per way, shape and mode")
    parser.add_argument("--within", type=duration, default=240.0, help="seconds; after them no shape is started")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled alternative")
    options = parser.parse_args(arguments)
    device, shapes, searches = "cuda", SHAPES, SEARCHES
    if options.dry_run:
        device = "cpu"
        shapes = list(dict.fromkeys(tiny(shape) for shape in SHAPES))
        searches = [replace(search, B=2, P=40, D=24, G=2) for search in SEARCHES[:1] + SEARCHES[-1:]]
    compiled = None if options.dry_run or options.no_compile else torch.compile(gather_bmm_, dynamic=False)
    torch.set_float32_matmul_precision("highest")
    work: dict[str, tuple[Sequence[Any], Callable[[Any], Rows]]] = {
        "retrieve": (searches, lambda case: retrieve_rows(case, device, options.seconds)),
        "multi_lora": (shapes, lambda case: multi_lora_rows(case, device, options.seconds, compiled)),
    }
    deadline = time.perf_counter() + options.within
    preferences: list[dict[str, str]] = []
    judged: Rows = []
    unmeasured: Rows = []
    # On a separate stream, on which the graphs are captured: autograd runs backward on the stream of the forward pass.
    with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
        for stem, (cases, of) in work.items():
            rows, failed = run(stem, cases, of, options.out, deadline)
            preferences += preference(rows, stem, device)
            judged += verdicts(rows, stem)
            unmeasured += failed
    if preferences:
        write_csv(options.out / "preference.csv", preferences)
    if judged := judged + unmeasured:
        write_csv(options.out / "targets_gpu.csv", judged)
        print(table(judged))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
