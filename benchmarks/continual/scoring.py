"""Scores of answers, 0 to 1 per row, and further measures of a task's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.continual.methods.method import Answer
from slm_fast import InputError, Task
from slm_fast.data import Row
from slm_fast.loading import loading, located, resolve

MOST_WORDS = 3  # compared per answer; longer answers are texts


def scores(texts: Sequence[str], rows: Sequence[Row], free_text: Sequence[bool]) -> list[float]:
    """1 for the row's label, or for a free-text answer that starts with the same words as the row's.

    For free text, as many words are compared as the row's answer has, at most three, ignoring case and all but letters
    and digits (first-word accuracy, as Raffel et al. 2020 for one word). free_text: of each row.
    """
    return [
        float(_words(text)[: len(_words(right))] == _words(right) if free else text == right)
        for text, right, free in zip(texts, (row.target or "" for row in rows), free_text, strict=True)
    ]


class Also:
    """Measures of a task's answers besides accuracy, from 0 to 1.

    If the method reports the probabilities of all labels, accuracy by the set of labels allowed as an answer (which may
    leak the task ID): "retrieved", those of the task that the row was routed to; "unified", those of all tasks;
    "oracle", those of the row's own task.

    "BERTScore": F1 of free-text answers (Zhang et al. 2020) by the last layer of an encoder, without baseline
    rescaling. An empty answer scores 0.

    Args:
        tasks: all that are answered.
        encoder: name or folder of the BERTScore model; None leaves BERTScore out.
    """

    def __init__(self, tasks: Mapping[str, Task], encoder: str | None = None) -> None:
        self.tasks = tasks
        self.scorer = None if encoder is None or all(task.labels for task in tasks.values()) else _scorer(encoder)

    def measures(self, name: str, answers: Sequence[Answer]) -> dict[str, float]:
        """The measures of a task, from the answers to all its rows."""
        task = self.tasks[name]
        right = [row.target or "" for row in task.rows]
        if task.labels is not None:
            return self._heads(name, answers, right)
        if self.scorer is None:
            return {}
        said = [i for i, answer in enumerate(answers) if _words(answer.text) and _words(right[i])]
        if not said:
            return {"BERTScore": 0.0}
        *_, f1 = self.scorer.score([answers[i].text for i in said], [right[i] for i in said])
        return {"BERTScore": float(f1.sum()) / len(answers)}

    def _heads(self, name: str, answers: Sequence[Answer], right: Sequence[str]) -> dict[str, float]:
        found = {}
        for kind in ("retrieved", "unified", "oracle"):
            hits = []
            for answer, label in zip(answers, right, strict=True):
                if answer.probabilities is None or answer.task is None:
                    return {}
                where = {"retrieved": answer.task, "oracle": name}.get(kind)
                known = answer.probabilities if where is None else (self.tasks[where].labels or ())
                hits.append(label == max(known, key=lambda word: answer.probabilities.get(word, 0.0), default=""))
            found[kind] = mean(hits)
        return found


def _scorer(encoder: str) -> Any:
    try:
        from bert_score import BERTScorer
        from transformers import AutoConfig
    except ImportError:
        raise InputError("--bertscore: needs the package bert-score: pip install bert-score") from None
    try:
        path = resolve(located(encoder))
        with loading():
            return BERTScorer(model_type=path, num_layers=AutoConfig.from_pretrained(path).num_hidden_layers)
    except (OSError, ValueError) as error:
        raise InputError(f"--bertscore: {encoder}: no model can be loaded ({str(error).splitlines()[0]})") from None


def _words(text: str) -> list[str]:
    kept = "".join(letter if letter.isalnum() else " " for letter in text.casefold())
    return kept.split()[:MOST_WORDS]
