"""Renders a report as one self-contained HTML file: no scripts, fonts or images from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm_fast.report import drawing
from slm_fast.report.figures import (
    NOT_DEFINED,
    Bars,
    Figure,
    Grid,
    Lines,
    Listing,
    Note,
    Part,
    Points,
    Report,
    Section,
    Table,
    Value,
    written,
)
from slm_fast.report.markup import bdi, cut, escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
WITH_NUMBERS, NAMED = 16, 24  # heat maps with more columns have no numbers in cells, and no column names
SMALL = 8  # heat maps with at most so many columns are placed three side by side
LARGEST_GRID = 60  # maximum rows and columns shown of a heat map
DARK = 0.7  # fraction of the strongest colour from which text on it is light
LONGEST_TEXT = 400  # maximum characters shown of a row


def html(report: Report) -> str:
    """The whole page. The same report gives the same bytes."""
    css = (Path(__file__).parent / "page.css").read_text("utf-8")
    several = len(report.parts) > 1
    body = [f"<h1>{bdi(report.title)}</h1>"]
    body += [_part(part, several) for part in report.parts]
    body.append(_facts("Definitions", "reading", report.reading))
    body.append(_facts("Run details", "about", report.about))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _part(part: Part, several: bool) -> str:
    title = f'<h2 class="title">{bdi(part.title)}</h2>' if several else ""
    headline = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{_number(number)}</dd></div>" for number, what in part.headline
    )
    warning = f'<p class="warning">{escape(part.warning)}</p>' if part.warning else ""
    sections = "\n".join(_section(section) for section in part.sections)
    return (
        f'<div class="part">{title}<p class="answer">{escape(part.answer)}</p>{warning}\n'
        f'<dl class="headline">{headline}</dl>\n{sections}</div>'
    )


def _section(section: Section) -> str:
    text = f'<p class="said">{escape(section.text)}</p>' if section.text else ""
    blocks = "\n".join(_block(block, section.title) for block in section.blocks)
    small = all(isinstance(block, Grid) and len(block.columns) <= SMALL for block in section.blocks)
    kind = "blocks small" if small and len(section.blocks) > 1 else "blocks"
    return f'<section><h2>{bdi(section.title)}</h2>{text}\n<div class="{kind}">\n{blocks}\n</div></section>'


def _block(block: Figure | Note, above: str) -> str:
    if isinstance(block, Note):
        title = f"<h3>{bdi(block.title)}</h3>" if block.title else ""
        return f'<div class="card">{title}<p class="note">{escape(block.text)}</p></div>'
    wide = isinstance(block, Listing) or (isinstance(block, Table) and len(block.columns) > 3)
    wide = wide or (isinstance(block, Grid) and len(block.columns) > WITH_NUMBERS)
    title = "" if block.title == above else f"<figcaption><h3>{bdi(block.title)}</h3></figcaption>"
    notes = [block.note] if block.note else []
    if isinstance(block, Table):
        drawn = _table(block)
    elif isinstance(block, Grid):
        drawn, left_out = _grid(block)
        notes += [left_out] if left_out else []
    elif isinstance(block, Lines):
        drawn = drawing.lines(block)
        notes.append("Tasks: " + ", ".join(f"{i} {name}" for i, name in enumerate(block.across, 1)) + ".")
    elif isinstance(block, Bars):
        drawn = _bars(block)
    elif isinstance(block, Points):
        drawn = drawing.points(block)
    else:
        drawn = _listing(block)
    said = f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""
    return f'<figure class="card{" wide" if wide else ""}">{title}{drawn}{said}</figure>'


def _number(text: str) -> str:
    return f'<span class="na">{NOT_DEFINED}</span>' if text == NOT_DEFINED else bdi(text)


def _value(value: Value, kind: str) -> str:
    return _number(written(value, kind))


def _scrolled(label: str, table: str, kind: str) -> str:
    """A table in its own box, which scrolls if it is too narrow, also with the keyboard."""
    return f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def _table(table: Table) -> str:
    numbers = [' class="n"' if column.kind != "text" else "" for column in table.columns]
    heading = "".join(
        f'<th scope="col"{number}{_tip(column.about)}>{escape(column.name)}</th>'
        for column, number in zip(table.columns, numbers, strict=True)
    )
    rows = []
    for i, row in enumerate(table.rows):
        cells = [f'<th scope="row">{_value(row[0], table.columns[0].kind)}</th>']
        cells += [
            f"<td{number}>{_value(value, column.kind)}</td>"
            for value, column, number in zip(row[1:], table.columns[1:], numbers[1:], strict=True)
        ]
        is_sum = table.last and i == len(table.rows) - 1
        kind = ' class="sum"' if is_sum else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    inside = f"<table><thead><tr>{heading}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return _scrolled(table.title, inside, "table muted" if table.muted else "table")


def _tip(text: str) -> str:
    return f' title="{escape(text)}"' if text else ""


def _grid(grid: Grid) -> tuple[str, str]:
    """A heat map, and a note on rows and columns that are not shown."""
    rows, columns = min(LARGEST_GRID, len(grid.rows)), min(LARGEST_GRID, len(grid.columns))
    fine = columns > WITH_NUMBERS
    heading = ""
    if columns <= NAMED:
        names = "".join(
            f'<th scope="col"><span>{bdi(name, breaks=False)}</span></th>' for name in grid.columns[:columns]
        )
        heading = f'<thead><tr><td class="none"></td>{names}</tr></thead>'
    lines = []
    for i in range(rows):
        new = bool(grid.groups) and i > 0 and grid.groups[i] != grid.groups[i - 1]
        cells = [_cell(grid, i, j, fine) for j in range(columns)]
        kind = ' class="first"' if new else ""
        lines.append(f'<tr{kind}><th scope="row">{bdi(grid.rows[i], breaks=not fine)}</th>{"".join(cells)}</tr>')
    left_out = []
    if columns > NAMED:
        left_out.append("Columns are in the same order as rows.")
    if rows < len(grid.rows) or columns < len(grid.columns):
        size = f"{len(grid.rows):,} by {len(grid.columns):,}"
        left_out.append(f"Shows the first {rows} rows and {columns} columns of {size}; the exported files contain all.")
    inside = f"<table>{heading}<tbody>{''.join(lines)}</tbody></table>"
    return _scrolled(grid.title, inside, "heat fine" if fine else "heat"), " ".join(left_out)


def _cell(grid: Grid, i: int, j: int, fine: bool) -> str:
    value = grid.values[i][j]
    if value is None:
        return '<td class="none"></td>'
    share = min(1.0, abs(value) / grid.largest)
    kinds = (["high"] if share >= DARK else []) + (["neg"] if value < 0 else [])
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    text = written(value, grid.kind)
    tip = _tip(f"{cut(grid.rows[i], 60)} / {cut(grid.columns[j], 60)}: {text}") if fine else ""
    shown = "" if fine or (grid.kind == "count" and value == 0) else text
    return f'<td{kind} style="--v:{share:.3f}"{tip}>{shown}</td>'


def _bars(figure: Bars) -> str:
    largest = max((abs(value) for _, value, _ in figure.bars if value is not None), default=0.0) or 1.0
    rows = []
    for name, value, strong in figure.bars:
        kind = " ".join((["own"] if strong else []) + (["neg"] if value is not None and value < 0 else []))
        share = 0.0 if value is None else abs(value) / largest
        bar = "" if value is None else f'<i style="--v:{share:.3f}"></i>'
        rows.append(
            f'<tr class="{kind}"><th scope="row">{bdi(name)}</th><td>{bar}</td><td>{_value(value, "points")}</td></tr>'
        )
    return f'<table class="bars"><tbody>{"".join(rows)}</tbody></table>'


def _listing(listing: Listing) -> str:
    entries = []
    for text, facts in listing.entries:
        shown = "".join(
            f'<div><dt>{escape(name)}</dt><dd class="{escape(name)}">{bdi(cut(value, LONGEST_TEXT))}</dd></div>'
            for name, value in facts.items()
        )
        entries.append(f'<li><p dir="auto">{escape(cut(text, LONGEST_TEXT))}</p><dl>{shown}</dl></li>')
    return f'<ol class="list">{"".join(entries)}</ol>'


def _facts(title: str, kind: str, facts: Sequence[tuple[str, str]]) -> str:
    if not facts:
        return ""
    inside = "".join(f"<dt>{escape(name)}</dt><dd>{bdi(text)}</dd>" for name, text in facts)
    if kind == "reading":
        inside = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    return f'<section><h2>{title}</h2><dl class="{kind}">{inside}</dl></section>'
