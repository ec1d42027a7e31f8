"""Numbers that the paper reports on streams we also run (ICLR 2024, arXiv:2404.07470), in % and in points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slm_fast.report.figures import Column, Table

# A method, its average accuracy, and whether it needs oracle task IDs.
Reported = tuple[str, float, bool]


@dataclass(frozen=True)
class Results:
    """A table of the paper.

    Attributes:
        mean: what its averages are over.
        backbone: which one, and how the rows differ from those here.
        slm: its SLM on each single stream, where the paper has that.
    """

    streams: Sequence[str]
    methods: Sequence[Reported]
    mean: str
    backbone: str
    slm: Mapping[str, float] = field(default_factory=dict)


BERT = Results(
    ("order4", "order5", "order6", "order7"),
    (
        ("Finetune", 18.4, False),
        ("Replay", 57.8, False),
        ("MBPA++", 74.3, False),
        ("IDBR", 76.3, False),
        ("SLM", 79.1, False),
        ("ProgPrompt", 77.9, True),
        ("SLM-TI", 80.0, True),
        ("Separate", 79.8, True),
    ),
    "orders 4 to 7",
    "BERT-base, with 115,000 training rows",
    {"order4": 79.2, "order5": 78.8, "order6": 79.0, "order7": 79.2},
)
T5 = Results(
    ("order1", "order2", "order3"),
    (("Finetune", 28.5, False), ("EWC", 40.6, False), ("LFPT5", 52.7, False), ("SLM", 73.1, False)),
    "orders 1 to 3",
    "T5-large",
    {"order1": 73.1, "order2": 72.9, "order3": 73.3},
)
LLAMA = Results(
    ("order8", "order9"),
    (("Finetune", 38.5, False), ("Replay", 62.3, False), ("SLM", 82.3, False)),
    "orders 8 and 9",
    "LLaMA2-7B, with the medical task scored by BERTScore",
)
IN_PLACE = Results(
    BERT.streams,
    (("DTKR + Prompt", 53.3, False), ("DTKR + Adapter", 70.9, False), ("DTKR + JARe (SLM)", 79.0, False)),
    "orders 4 to 6",
    "BERT-base",
)
TABLES = (
    ("paper", "Results reported in the paper", (BERT, T5, LLAMA)),
    ("paper-in-place", "Prompts or adapters in place of increments, as reported in the paper", (IN_PLACE,)),
)
# Forgetting F_k after 2, 3, 4 and 5 tasks, mean over orders 4 to 6.
FORGETTING = {"SLM (the paper's)": (0.0, 0.3, 0.5, 0.5), "IDBR (the paper's)": (0.8, 2.4, 2.7, 2.9)}
# Retrieval's share of the time to answer a row on LLaMA2-7B and an A100.
RETRIEVAL = {"finance": 4.7, "mmlu": 5.7, "medical": 0.3}


def tables(stream: str, stem: str) -> list[Table]:
    """The paper's results for a stream; none if it has none. stem: prefix of the file names."""
    chosen = [
        (name, title, reported) for name, title, every in TABLES for reported in every if stream in reported.streams
    ]
    return [_table(stream, f"{stem}{name}", title, reported) for name, title, reported in chosen]


def _table(stream: str, stem: str, title: str, reported: Results) -> Table:
    columns = [Column("method in the paper"), Column("average accuracy, %", "percent"), Column("oracle task ID")]
    ranked = sorted(reported.methods, key=lambda method: -method[1])
    rows = [(name, accuracy / 100, "yes" if told else "no") for name, accuracy, told in ranked]
    own = f" (its SLM on {stream}: {reported.slm[stream]})" if stream in reported.slm else ""
    note = (
        f"Mean over the paper's {reported.mean}{own}. The paper uses another backbone ({reported.backbone}) and other "
        "rows, so these numbers are for orientation only and not directly comparable."
    )
    return Table(stem, title, columns, rows, note=note, muted=True)


def forgetting(stream: str) -> list[tuple[str, list[float | None]]]:
    """The paper's F_k after each task, as fractions by method; empty if it has none for the stream."""
    if stream not in BERT.streams:
        return []
    return [(name, [None, *(value / 100 for value in values)]) for name, values in FORGETTING.items()]
