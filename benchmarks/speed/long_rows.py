"""Cost of rows of which only the first tokens are read: 10 MB against 10 kB, and a window of documents.

    python -m benchmarks.speed.long_rows [--rounds N]

The packaged MiniLM with one task, all threads. `peak` is the most that the whole process holds while it answers, the
row included. `window` is what the first answer of 1,024 rows of 100 kB adds to what it held.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.arguments import Parser, at_least
from benchmarks.machine import peak_mib
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM, Task

SHORT, LONG = 10_000, 10_000_000  # ASCII characters, or bytes
WORDS = ("refund", "order", "please", "parcel", "invoice", "customer", "quickly,", "delivered", "again!", "(account)")
KINDS: dict[str, Callable[[int], str]] = {
    "words": lambda size: words(size),
    "signs": lambda size: "!?" * (size // 2),
    "one word": lambda size: "a" * size,
    "spaces": lambda size: " " * (size - 5) + "words",
    "lines": lambda size: "late\n" * (size // 5),
    "Chinese": lambda size: "正面负面" * (size // 12),
    "emoji": lambda size: "😀" * (size // 4),
    "accents": lambda size: "e\u0301a\u0308 " * (size // 7),
}


def words(size: int) -> str:
    rng = random.Random(0)
    some = " ".join(rng.choice(WORDS) for _ in range(2000)) + " "
    return (some * (size // len(some) + 1))[:size]


def measure(slm: ScalableLM, text: str, rounds: int) -> tuple[float, float]:
    """Median milliseconds per answer, and peak MiB held."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        slm.predict([text])
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), peak_mib(lambda: slm.predict([text]))[1]


def main() -> None:
    parser = Parser("python -m benchmarks.speed.long_rows", __doc__)
    parser.add_argument("--rounds", type=at_least(1), default=9)
    rounds = parser.parse_args().rounds
    slm = ScalableLM.from_backbone("minilm")
    slm.learn(Task("tickets", [(f"the parcel is late {i}", "ab"[i % 2]) for i in range(12)]), epochs=1)
    lines: list[dict[str, Any]] = []
    for kind, make in KINDS.items():
        measure(slm, make(SHORT), 2)
        (ms, peak), (long_ms, long_peak) = (measure(slm, make(size), rounds) for size in (SHORT, LONG))
        figures = {"ms 10 kB": ms, "ms 10 MB": long_ms, "MiB 10 kB": peak, "MiB 10 MB": long_peak}
        ratios = {"times": long_ms / ms, "memory": long_peak / peak}
        lines.append({"kind": kind} | {name: f"{figure:.1f}" for name, figure in figures.items()})
        lines[-1] |= {name: f"{ratio:.2f}" for name, ratio in ratios.items()}
    document = words(100_000)
    before, most = peak_mib(lambda: next(slm.predict_stream(document + str(i) for i in range(1024))))
    notes = {"command": f"python -m benchmarks.speed.long_rows --rounds {rounds}"}
    notes["window"] = f"1,024 rows of 100 kB: {most - before:.0f} MiB more"
    print(table(lines), notes["window"], sep="\n")
    write_csv(RESULTS / "long_rows.csv", lines, notes)


if __name__ == "__main__":
    main()
