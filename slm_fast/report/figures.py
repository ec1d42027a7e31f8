"""The data of a report: tables, heat maps, line charts, bar charts and scatter plots.

`page.py` and `drawing.py` render them as HTML; `writing.py` writes the same numbers to files. Undefined values are None
and shown as `n/a`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NOT_DEFINED = "n/a"


class Spread(NamedTuple):
    """Mean and standard deviation over seeds (None for one seed); or a difference and its standard error."""

    mean: float
    deviation: float | None


Value = str | float | int | Spread | None


@dataclass(frozen=True)
class Column:
    """name: the heading. kind: the format of the values (see `written`). about: a short explanation, as a tooltip.
    spread: what a Spread's deviation is in this column."""

    name: str
    kind: str = "text"
    about: str = ""
    spread: str = "standard deviation"


@dataclass(frozen=True)
class Table:
    """rows: one value per column. last: the last row is a summary. muted: shown in a subdued colour."""

    stem: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    last: bool = False
    muted: bool = False

    def records(self) -> list[list[Any]]:
        """The heading and the rows; a Spread takes two columns."""
        spread = [any(isinstance(row[i], Spread) for row in self.rows) for i in range(len(self.columns))]
        heading: list[Any] = []
        for column, two in zip(self.columns, spread, strict=True):
            heading += [column.name, f"{column.name}, {column.spread}"] if two else [column.name]
        found = [heading]
        for row in self.rows:
            values: list[Any] = []
            for value, two in zip(row, spread, strict=True):
                values += [*(value if isinstance(value, Spread) else (value, None))] if two else [value]
            found.append(values)
        return found


@dataclass(frozen=True)
class Grid:
    """A heat map. values: [rows][columns], None for empty cells.

    kind: the format of the cells. groups: the group of each row; groups are separated by a gap. down: label of the
    rows. across: label of the columns.
    """

    stem: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    down: str = ""
    across: str = ""
    kind: str = "percent"
    groups: Sequence[str] = ()
    note: str = ""

    def records(self) -> list[list[Any]]:
        return [[self.down, *self.columns]] + [
            [name, *values] for name, values in zip(self.rows, self.values, strict=True)
        ]

    @property
    def largest(self) -> float:
        """The value of the strongest colour."""
        if self.kind in ("percent", "similarity"):
            return 1.0
        return max((value for row in self.values for value in row if value is not None), default=0.0) or 1.0


@dataclass(frozen=True)
class Lines:
    """Values over learned tasks. series: (name, values, whether it is highlighted). kind: "percent", fractions from 0
    to 1, or "points", differences of fractions. grey: (name, values) from elsewhere, drawn in grey."""

    stem: str
    title: str
    across: Sequence[str]
    series: Sequence[tuple[str, Sequence[float | None], bool]]
    note: str = ""
    kind: str = "percent"
    grey: Sequence[tuple[str, Sequence[float | None]]] = ()

    def records(self) -> list[list[Any]]:
        shown = [*((name, values) for name, values, _ in self.series), *self.grey]
        return [["after learning", *(name for name, _ in shown)]] + [
            [name, *(values[i] if i < len(values) else None for _, values in shown)]
            for i, name in enumerate(self.across)
        ]

    @property
    def axis(self) -> tuple[float, float, list[float]]:
        """Its lowest and highest value, and the ticks. In percent it ends at 100 and starts at a multiple of 10 below
        all values; in points it has round numbers around all values and zero."""
        every = [*(values for _, values, _ in self.series), *(values for _, values in self.grey)]
        known = [100 * value for values in every for value in values if value is not None]
        if self.kind == "percent":
            low = max(0, min(90, 10 * math.floor((min(known, default=0.0) - 2) / 10)))
            return low / 100, 1.0, [tick / 100 for tick in range(100, low - 1, -10 if low >= 50 else -20)]
        least, most = min([0.0, *known]), max([0.0, *known]) or 1.0
        step = next(s for s in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if (most - least) / s <= 6)
        ticks = [i * step / 100 for i in range(math.floor(least / step), math.ceil(most / step) + 1)]
        return ticks[0], ticks[-1], ticks[::-1]


@dataclass(frozen=True)
class Bars:
    """Differences of fractions, shown in percentage points. bars: (name, value, whether it is highlighted)."""

    stem: str
    title: str
    bars: Sequence[tuple[str, float | None, bool]]
    note: str = ""

    def records(self) -> list[list[Any]]:
        return [["name", "value"], *([name, value] for name, value, _ in self.bars)]


@dataclass(frozen=True)
class Points:
    """A scatter plot whose axes have no meaning. points: (group, name, x, y)."""

    stem: str
    title: str
    points: Sequence[tuple[str, str, float, float]]
    note: str = ""

    def records(self) -> list[list[Any]]:
        return [["task", "name", "x", "y"], *(list(point) for point in self.points)]

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(group for group, _, _, _ in self.points))

    def label(self, group: str, name: str) -> str:
        """The label of a point: its name, or its group's name if the group has no other point."""
        return name if sum(own == group for own, _, _, _ in self.points) > 1 else group


@dataclass(frozen=True)
class Note:
    """A few sentences in place of a figure or next to one."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Listing:
    """Examples to inspect one by one. entries: (text, {field: value})."""

    stem: str
    title: str
    entries: Sequence[tuple[str, Mapping[str, str]]]
    note: str = ""

    def records(self) -> list[list[Any]]:
        names = list(dict.fromkeys(name for _, facts in self.entries for name in facts))
        return [["text", *names], *([text, *(facts.get(name) for name in names)] for text, facts in self.entries)]


Figure = Table | Grid | Lines | Bars | Points | Listing


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Figure | Note]
    text: str = ""


@dataclass(frozen=True)
class Part:
    """answer: the main result in a sentence or two. headline: (number, label) pairs."""

    title: str
    answer: str
    headline: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    warning: str = ""


@dataclass(frozen=True)
class Report:
    """about: (name, value) pairs on how it was made. reading: (term, definition) pairs."""

    title: str
    parts: Sequence[Part]
    reading: Sequence[tuple[str, str]]
    about: Sequence[tuple[str, str]] = field(default=())

    def figures(self) -> Iterator[tuple[Part, Figure]]:
        """All figures, each with its part."""
        for part in self.parts:
            for section in part.sections:
                for block in section.blocks:
                    if not isinstance(block, Note):
                        yield part, block

    def stems(self) -> list[str]:
        """A unique file name, without extension, for each of `figures`."""
        found: list[str] = []
        for _, figure in self.figures():
            plain = re.sub(r"[^A-Za-z0-9._-]+", "-", figure.stem).strip("-.")[:80] or "figure"
            stem, number = plain, 2
            while stem.lower() in (other.lower() for other in found):
                stem, number = f"{plain}-{number}", number + 1
            found.append(stem)
        return found

    def numbers(self) -> dict[str, Any]:
        """All shown numbers, ready for JSON."""
        stems, parts = iter(self.stems()), []
        for part in self.parts:
            figures = {}
            for own, figure in self.figures():
                if own is part:
                    heading, *rows = figure.records()
                    named = [dict(zip(map(str, heading), row, strict=True)) for row in rows]
                    figures[next(stems)] = {"title": figure.title, "rows": named}
            headline = {what: number for number, what in part.headline}
            parts.append({"title": part.title, "answer": part.answer, "headline": headline, "figures": figures})
        return {"format": 1, "title": self.title, "about": dict(self.about), "parts": parts}


def written(value: Value, kind: str) -> str:
    """Format a value. kind: text, percent (of a fraction), points (a difference of fractions), similarity, count,
    short (an abbreviated count), number, seconds, bytes or mib."""
    if isinstance(value, Spread):
        mean = written(value.mean, kind)
        if value.deviation is None or not math.isfinite(value.mean):
            return mean
        return f"{mean} ± {written(value.deviation, 'percent' if kind == 'points' else kind)}"
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return NOT_DEFINED
    if kind == "percent":
        return f"{100 * value:.1f}"
    if kind == "points":
        return _signed(f"{100 * value:.1f}")
    if kind == "similarity":
        return _signed(f"{value:.2f}")
    if kind == "short" and value >= 1e5:
        return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M"
    if kind == "bytes":
        return _bytes(value)
    if kind == "mib":
        return _bytes(value * 2**20)
    if kind == "number":
        return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"
    if kind == "seconds":
        return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,.0f}"


def _signed(number: str) -> str:
    """A number with a minus sign instead of a hyphen, and none before zero."""
    return number if float(number) > 0 else number.replace("-", "\u2212" if float(number) else "")


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
