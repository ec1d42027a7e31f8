"""Accuracies (%) that the paper reports with BERT on streams we also run (ICLR 2024, arXiv:2404.07470)."""

from __future__ import annotations

from slm_fast.report.figures import Column, Table

ORDERS = ("order4", "order5", "order6", "order7")
# Average accuracy over orders 4 to 7, and whether the method needs oracle task IDs.
METHODS = (
    ("Finetune", 18.4, False),
    ("Replay", 57.8, False),
    ("MBPA++", 74.3, False),
    ("IDBR", 76.3, False),
    ("SLM", 79.1, False),
    ("ProgPrompt", 77.9, True),
    ("SLM-TI", 80.0, True),
    ("Separate", 79.8, True),
)
SLM = {"order4": 79.2, "order5": 78.8, "order6": 79.0, "order7": 79.2}


def table(stream: str, stem: str) -> Table | None:
    """The paper's results for a stream; None if it has none."""
    if stream not in ORDERS:
        return None
    columns = [Column("method in the paper"), Column("average accuracy, %", "percent"), Column("oracle task ID")]
    ranked = sorted(METHODS, key=lambda method: -method[1])
    rows = [(name, accuracy / 100, "yes" if told else "no") for name, accuracy, told in ranked]
    note = (
        f"Mean over the paper's orders 4 to 7 (its SLM on {stream}: {SLM[stream]}). The paper uses another backbone "
        "(BERT-base) and other rows, so these numbers are for orientation only and not directly comparable."
    )
    return Table(stem, "Results reported in the paper", columns, rows, note=note, muted=True)
