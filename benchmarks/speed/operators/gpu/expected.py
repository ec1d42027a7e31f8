"""Expected and measured times of the target shapes on an H100.

    python -m benchmarks.speed.operators.gpu.expected

Bytes, operations and the floor that follows from them; the times expected from reading the code and counting, before it
had run on any GPU; and the medians of multi_lora_gpu.csv and retrieve_gpu.csv. Writes results/gpu_expected.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.tables import RESULTS, read_csv, read_head

BANDWIDTH = 3.35e12  # bytes/s of an H100 (SXM), from its data sheet
BFLOAT16, FLOAT64 = 989e12, 67e12  # flop/s of its tensor cores
HEAD = """# Expected and measured on an H100

`python -m benchmarks.speed.operators.gpu.expected` writes this page from the shapes, the data sheet of an H100
(3.35 TB/s; 989 TFLOP/s in bfloat16 and 67 in float64) and the CSVs of `benchmarks/gpu.sh` ({gpu}, {date}).
Microseconds of CUDA graphs that keep the cache cold; of `multi_lora` what is added to the linear layer alone, and in
brackets both as a multiple of it. "Expected" was written down before a GPU had run the kernels.
"""
FOOT = """
The floor is the time to move through memory once what has to be moved. It is far below what the first rows of
`retrieve` took, two launches that wait for reads that depend on each other. It scores in float64 on tensor cores
and needs no second look; the search in bfloat16 that was expected, with an exact look at what it leaves, is not built:
at 100,000 slots it would read half the bytes.
"""


class Shape(NamedTuple):
    """A target shape.

    Attributes:
        target: in words.
        moved, flops: bytes and operations.
        rate: of the operations.
        launches: on sm_90.
        expected: microseconds.
        why: the reason for them.
        stem, way, has: which line of which CSV measures it.
    """

    target: str
    moved: float
    flops: float
    rate: float
    launches: int
    expected: str
    why: str
    stem: str
    way: str
    has: Mapping[str, str]

    @property
    def floor(self) -> float:
        return 1e6 * max(self.moved / BANDWIDTH, self.flops / self.rate)

    @property
    def measured(self) -> str:
        """Microseconds, with the ratio to the linear layer alone if there is one."""
        for row in read_csv(RESULTS / f"{self.stem}_gpu.csv"):
            if row["way"] == self.way and row["how"] == "graph" and self.has.items() <= row.items():
                ratio = "" if row["to_linear"] == "-" else f" ({float(row['to_linear']):.2f})"
                return f"{float(row['added_us']):.1f}{ratio}"
        raise LookupError(f"{self.stem}_gpu.csv: no line of {self.way} for {self.target}")


def lora(
    target: str, rows: int, width: int, R: int, used: int, expected: str, why: str, has: Mapping[str, str]
) -> Shape:
    """rows: of x, whose reading counts for the linear layer. R: columns of a row's increments. used: rows of A and
    of B."""
    moved, flops = 2.0 * 2 * width * (rows + used), 4.0 * rows * R * width
    back = has["pass"] == "backward"  # reads x and the gradient twice
    times, launches, way = (2, 4, "triton") if back else (1, 1, "cuda")
    return Shape(target, times * moved, times * flops, BFLOAT16, launches, expected, why, "multi_lora", way, has)


def search(target: str, keys: int, expected: str, why: str) -> Shape:
    moved, flops = 4.0 * (32 + keys) * 384, 2.0 * 32 * keys * 384
    has = {"B": "32", "P": str(keys), "D": "384"}
    return Shape(target, moved, flops, FLOAT64, 2, expected, why, "retrieve", "cuda", has)


SEVEN_B = {"B": "8", "T": "512", "I": "4096", "O": "4096", "r": "8", "pass": "forward"}
BERT = {"B": "32", "T": "128", "I": "768", "r": "12", "dtype": "bfloat16", "pass": "forward"}
STEP = {"B": "32", "T": "1", "I": "4096", "pass": "forward"}
SHAPES = (
    lora(
        "prefill, 8 x 512 tokens, width 4096, R = 32: 1.14",
        *(4096, 4096, 32, 160, "28", "reads x once more, reads and writes y; a part of it is in the cache", SEVEN_B),
    ),
    lora(
        "prefill, 32 x 128 tokens, width 768, R = 48: 1.35",
        *(4096, 768, 48, 240, "4", "all of it is in the cache: one more launch beside 11 us", BERT),
    ),
    lora(
        "writing, 32 rows, width 4096, 20 slots of rank 8, 2 each: 1.30",
        *(32, 4096, 16, 160, "3", "three reads that depend on each other (ids, A, B)", STEP | {"P": "20"}),
    ),
    lora(
        "the same, all slots distinct: 1.50",
        *(32, 4096, 16, 512, "4", "the same, and 8 MB of A and B", STEP | {"P": "64"}),
    ),
    lora(
        "backward, 8 x 512 tokens, width 4096, R = 32: 1.40",
        *(4096, 4096, 32, 160, "65", "x and the gradient are read twice", SEVEN_B | {"pass": "backward"}),
    ),
    search("`retrieve`, 32 queries, 512 slots: 5 us", 512, "4.5 to 5", "one launch, all queries in one tile"),
    search("4,096 slots: 8 us", 4096, "6 to 7", "the same, one pass over the keys"),
    search("100,000 slots: 60 us", 100_000, "25 to 45", "two launches; bfloat16 keys, an exact look at what remains"),
)


def page() -> str:
    head = read_head(RESULTS / "multi_lora_gpu.csv")
    lines = ["| | MB | GFLOP | floor, us | launches | expected, us | why | measured, us |", "|---" * 8 + "|"]
    for shape in SHAPES:
        cells = [shape.target, f"{shape.moved / 1e6:.1f}", f"{shape.flops / 1e9:.2f}", f"{shape.floor:.1f}"]
        cells += [str(shape.launches), shape.expected, shape.why, shape.measured]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([HEAD.format(gpu=head["gpu"], date=head["date"]), *lines, FOOT])


if __name__ == "__main__":
    (RESULTS / "gpu_expected.md").write_text(page())
    print(page())
