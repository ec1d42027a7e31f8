"""The ablations of a run: methods with options, next to the same method without."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean

from slm_fast.report.figures import Column, Section, Table, Value
from slm_fast.report.paired import REFERENCE, STANDARD_ERROR, Comparison
from slm_fast.report.results import Result


def ablations(ranked: Sequence[Result], stem: str) -> list[Section]:
    """A table of the methods with options (folders such as slm-paper,groups=3,k=2), by base method; none without."""
    groups: dict[str, list[Result]] = {}
    for result in ranked:
        groups.setdefault(_split(result)[0], []).append(result)
    rows: list[list[Value]] = []
    for name, own in groups.items():
        if any(_split(result)[1] for result in own):
            rows += _rows(name, own)
    if not rows:
        return []
    columns = [
        Column("base method"),
        Column("options"),
        Column("average accuracy, %", "percent"),
        Column("difference to the base method, points", "points", "paired by row", STANDARD_ERROR),
        Column("forgetting, points", "points"),
        Column("routing accuracy, %", "percent"),
        Column("parameters", "short", "trained parameters of all learned tasks"),
        Column("training time per task, s", "seconds", "CPU time where measured"),
        Column("tasks", "count", "learned so far"),
    ]
    note = (
        "Differences of average accuracy after the last task that both have learned, ± their standard error, paired by "
        "row; n/a if the run lacks the base method or answers to the same rows. Options not named are as in "
        "the base method."
    )
    table = Table(f"{stem}ablations", "Ablations", columns, rows, note=note)
    return [Section("Ablations", [table])]


def _rows(name: str, group: Sequence[Result]) -> list[list[Value]]:
    base = next((result for result in group if not _split(result)[1]), None)
    compared = None if base is None else Comparison(base)
    title = base.method.title if base else _base_title(group[0], name)
    return [
        [
            title,
            _split(result)[1].replace(",", ", ") or "none",
            result.average,
            REFERENCE if result is base else compared.difference(result) if compared else None,
            result.forgetting,
            result.routing,
            result.last_cost("parameters"),
            result.seconds("learn", mean),
            len(result.learned),
        ]
        for result in sorted(group, key=lambda result: _natural(_split(result)[1]))
    ]


def _split(result: Result) -> tuple[str, str]:
    """The base method's folder name, and the options: "slm-paper", "groups=3,k=2"."""
    name, _, options = result.method.name.partition(",")
    return name, options


def _base_title(result: Result, name: str) -> str:
    """The title of a base method that the run lacks."""
    before, bracket, _ = result.method.title.rpartition(f" ({_split(result)[1]})")
    return before if bracket else name


def _natural(options: str) -> list[tuple[int, str]]:
    """A sort key that puts rank=4 before rank=12."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", options) if part]
