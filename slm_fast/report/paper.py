"""What the paper reports of the streams that are also ours (ICLR 2024, arXiv:2404.07470): accuracy in %, of a BERT."""

from __future__ import annotations

from slm_fast.report.figures import Column, Table

ORDERS = ("order4", "order5", "order6", "order7")
# Average accuracy over orders 4 to 7, and whether the method is told each row's task.
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
    """The paper's numbers beside those of a stream, where it has any."""
    if stream not in ORDERS:
        return None
    columns = [Column("as the paper names it"), Column("average accuracy, %", "percent"), Column("is told the task")]
    ranked = sorted(METHODS, key=lambda method: -method[1])
    rows = [(name, accuracy / 100, "yes" if told else "no") for name, accuracy, told in ranked]
    note = (
        f"From the paper, averages over its orders 4 to 7 (its SLM on {stream}: {SLM[stream]}). It has another "
        "backbone (BERT-base) and other rows, so these are for orientation and no comparison."
    )
    return Table(stem, "The paper's own numbers", columns, rows, note=note, muted=True)
