"""One method with one seed on one stream: learned task by task, answered after each task, and saved as it goes.

Its folder, `RUN/<method>/seed<k>/`, holds:

    untrained.json      with --unseen, each task's accuracy before anything is learned
    stages.jsonl        one line per task learned: accuracies, seconds, memory (read by `slm-fast report`)
    answers-<n>.csv.gz  after the n-th task: each row's task and number, whether it was right, the task it was routed to
    state.pt            the method after the last task learned, from which an interrupted run resumes
    store/              the final store, for slm_fast

A stage is done once its line is complete in stages.jsonl. The state is written first, so that a process killed between
the two answers again but does not learn again.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.continual.clock import Clock, Peak
from benchmarks.continual.last_stage import routed_by, times
from benchmarks.continual.methods import method_of
from benchmarks.continual.methods.method import Answer, Method, Setup
from benchmarks.continual.methods.slm import Slm
from benchmarks.continual.scoring import Also, scores
from benchmarks.continual.streams import Stream
from slm_fast import Task, WorkError
from slm_fast.data import Row
from slm_fast.files import write
from slm_fast.measures import retrieval_accuracy
from slm_fast.progress import bar


def stages_of(folder: Path) -> list[dict[str, Any]]:
    """The stages that are done. Raises WorkError for a damaged line."""
    path = folder / "stages.jsonl"
    found = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            stage = json.loads(line)
            assert isinstance(stage["tasks"], dict)
            assert isinstance(stage["after"], str)
        except (ValueError, TypeError, KeyError, AssertionError):
            raise WorkError(
                f"{path}: line {number} is damaged; delete {folder} to run this method and seed again"
            ) from None
        found.append(stage)
    return found


def run_cell(
    folder: Path,
    spec: str,
    stream: Stream,
    setup: Setup,
    train: Mapping[str, Task],
    test: Mapping[str, Task],
    *,
    unseen: bool = False,
    bertscore: str | None = None,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Learn and answer what is not done yet, and return all stages.

    Args:
        spec: a method's name, with options for an ablation (`method_of`).
        unseen: also answer tasks that are not learned yet, and all tasks before the first is, to measure forward
            transfer; ignored for methods that need oracle task IDs.
        bertscore: folder of the encoder that compares free-text answers with those of the rows (`Also`).

    Raises:
        WorkError: the folder is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stages = stages_of(folder)
    if len(stages) == len(stream.tasks):
        return stages
    entry, make = method_of(spec)
    unseen = unseen and not entry.told
    method = make(setup)
    learned, spent = restore(folder, method)
    if not len(stages) <= learned <= len(stages) + 1:
        raise WorkError(
            f"{folder}: state.pt is of {learned} tasks and stages.jsonl of {len(stages)}; delete the folder"
        )

    def answer_rows(rows: Sequence[Row], names: Sequence[str]) -> list[Answer]:
        with setup.precision():
            return method.answers(rows, names if entry.told else None)

    also, peak = Also(test, bertscore), Peak()
    for number, name in enumerate(stream.tasks[len(stages) :], len(stages) + 1):
        asked = stream.tasks if unseen else stream.tasks[:number]
        if unseen and not learned and not (folder / "untrained.json").exists():
            before = _answered(folder / "answers-0.csv.gz", answer_rows, entry.told, test, also, peak, progress)
            accuracies = {known: own["accuracy"] for known, own in before["tasks"].items()}
            write(folder / "untrained.json", json.dumps(accuracies).encode())
        if learned < number:
            peak.start()
            clock = Clock()
            with setup.precision():
                method.learn(train[name], progress)
            spent = clock.spent("learn") | peak.reached("learn")
            _save(folder, method, number, spent)
        rows = {known: test[known] for known in asked}
        stage = _answered(folder / f"answers-{number}.csv.gz", answer_rows, entry.told, rows, also, peak, progress)
        if isinstance(method, Slm) and not entry.told and number == len(stream.tasks):
            for known, task in rows.items():
                stage["tasks"][known]["routed_by"] = routed_by(method, task)
            stage |= times(method, rows)
        stage = {"after": name, **stage, **spent, "peak_mib": round(peak.of_process())}
        stage |= {"parameters": method.parameters, "kept_bytes": method.kept}
        if isinstance(method, Slm):
            stage["sha256"] = {known: method.digest(known) for known in stream.tasks[:number]}
        stages.append(stage)
        write(folder / "stages.jsonl", "".join(json.dumps(each) + "\n" for each in stages).encode())
    if isinstance(method, Slm) and not (folder / "store").exists():
        method.slm.save_pretrained(folder / "store")
    return stages


def _save(folder: Path, method: Method, learned: int, spent: Mapping[str, float]) -> None:
    data = io.BytesIO()
    torch.save({"learned": learned, "spent": dict(spent), "state": method.state()}, data)
    write(folder / "state.pt", data.getvalue())


def restore(folder: Path, method: Method) -> tuple[int, dict[str, float]]:
    """Restore the method; return how many tasks it has learned and the time of the last one."""
    path = folder / "state.pt"
    if not path.exists():
        return 0, {}
    try:
        kept = torch.load(path, weights_only=True)
        method.restore(kept["state"])
        return int(kept["learned"]), dict(kept["spent"])
    except Exception as error:
        raise WorkError(f"{path}: cannot be read ({type(error).__name__}); delete {folder} to start again") from None


def _answered(
    path: Path,
    answer_rows: Callable[[Sequence[Row], Sequence[str]], list[Answer]],
    told: bool,
    tasks: Mapping[str, Task],
    also: Also,
    peak: Peak,
    progress: bool | None,
) -> dict[str, Any]:
    """Answer all rows of these tasks, mixed, write the answers to `path` and summarise them."""
    rows = [row for task in tasks.values() for row in task.rows]
    names = [name for name, task in tasks.items() for _ in task.rows]
    peak.start()
    clock = Clock()
    with bar("answering", len(rows), progress) as advance:
        answers = answer_rows(rows, names)
        advance(len(rows))
    spent = clock.spent("answer") | peak.reached("answer")
    right = scores([answer.text for answer in answers], rows, [tasks[name].labels is None for name in names])
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("task", "row", "right", "named"))
    place = dict.fromkeys(tasks, 0)
    for name, value, answer in zip(names, right, answers, strict=True):
        lines.writerow((name, place[name], f"{value:g}", answer.task or ""))
        place[name] += 1
    write(path, gzip.compress(text.getvalue().encode(), mtime=0))
    found: dict[str, Any] = {}
    for name in tasks:
        own = [i for i, task in enumerate(names) if task == name]
        found[name] = {"rows": len(own), "accuracy": sum(right[i] for i in own) / len(own)}
        found[name] |= _named([answers[i] for i in own], name, told)
        found[name]["also"] = also.measures(name, [answers[i] for i in own])
    return {"tasks": found, **spent, "rows_answered": len(rows)}


def _named(answers: Sequence[Answer], task: str, told: bool) -> dict[str, float | None]:
    """The share of a task's rows routed to it, and of those whose slots are mostly its own (the paper's Eq. 13).

    None where the method does not report them, or is given the task.
    """
    routed = retrieved = None
    if not told and all(answer.task is not None for answer in answers):
        routed = sum(answer.task == task for answer in answers) / len(answers)
    if not told and all(answer.slots for answer in answers):
        retrieved = retrieval_accuracy([answer.slots for answer in answers], [task] * len(answers))
    return {"routed": routed, "retrieved": retrieved}
