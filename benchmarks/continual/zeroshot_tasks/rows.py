"""The rows of the four sets for lm-eval: where they are, and how WinoGrande's are read.

The prompts and scores are those of lm-eval's own arc_easy, arc_challenge, piqa and winogrande.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(*, data: str | None = None, name: str, **_: Any) -> dict[str, Dataset]:
    """The rows (question, choices, answer) of `<data>/<name>/test.jsonl.gz`."""
    if data is None:
        raise ValueError("tell these tasks where their data is: --metadata data=DIR")
    with gzip.open(Path(data) / name / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        return {"test": Dataset.from_list([json.loads(line) for line in file])}


# WinoGrande scores the text after the blank, given the beginning with either word filled in (Trinh & Le 2018).


def ending(row: dict[str, Any]) -> str:
    question: str = row["question"]
    return question[question.index("_") + 1 :].strip()


def beginnings(row: dict[str, Any]) -> list[str]:
    question: str = row["question"]
    return [question[: question.index("_")] + choice for choice in row["choices"]]


def right(row: dict[str, Any]) -> int:
    answer: int = row["answer"]
    return answer
