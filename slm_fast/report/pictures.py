"""Figures as PNG. matplotlib is imported on first use, because only the `report` extra installs it."""

from __future__ import annotations

import io
import warnings
from typing import Any

from slm_fast.report.figures import Bars, Figure, Grid, Lines, Points, written
from slm_fast.report.markup import clean, cut

COLOURS = ("#2350b8", "#d9730d", "#1f8a5b", "#b83280", "#7a52c7", "#0e8aa8", "#b08900", "#c0392b", "#5b7083", "#6b8e23")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
MOST = 60  # maximum rows and columns of a heat map
INK, LINE = "#1b1f27", "#e2e4e8"


def png(figure: Figure) -> bytes | None:
    """A figure as PNG; None for tables and listings. The same figure gives the same bytes."""
    if not isinstance(figure, (Grid, Lines, Bars, Points)):
        return None
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    style = {
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "text.parse_math": False,
    }
    style |= {"xtick.color": INK, "ytick.color": INK, "font.family": ["DejaVu Sans"], "axes.spines.top": False}
    with (
        matplotlib.rc_context({**matplotlib.rcParamsDefault, **style, "axes.spines.right": False}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # characters missing from the font
        canvas = Canvas(figsize=_size(figure), dpi=150, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        axes.set_title(_text(figure.title, 90), fontsize=10, loc="left", fontweight="bold")
        if isinstance(figure, Grid):
            _grid(axes, figure)
        elif isinstance(figure, Lines):
            _lines(axes, figure)
        elif isinstance(figure, Bars):
            _bars(axes, figure)
        else:
            _points(axes, figure)
        data = io.BytesIO()
        canvas.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _size(figure: Grid | Lines | Bars | Points) -> tuple[float, float]:
    """Width and height in inches."""
    if isinstance(figure, Grid):
        return 2.6 + 0.45 * min(MOST, len(figure.columns)), 1.8 + 0.34 * min(MOST, len(figure.rows))
    if isinstance(figure, Lines):
        return 6.4, 4.2 + 0.12 * (len(figure.series) + len(figure.grey))
    if isinstance(figure, Bars):
        return 6.4, 1.0 + 0.3 * len(figure.bars)
    return 6.4, 4.6 + 0.06 * len(figure.groups)


def _text(text: str, most: int = 40) -> str:
    return cut(clean(text), most)


def _grid(axes: Any, grid: Grid) -> None:
    rows, columns = min(MOST, len(grid.rows)), min(MOST, len(grid.columns))
    values = [[float("nan") if v is None else v for v in row[:columns]] for row in grid.values[:rows]]
    low = -grid.largest if grid.kind == "similarity" else 0.0
    axes.imshow(values, cmap="RdBu" if low else "Blues", vmin=low, vmax=grid.largest, aspect="auto")
    axes.set_xticks(range(columns), [_text(name, 24) for name in grid.columns[:columns]], rotation=90, fontsize=8)
    axes.set_yticks(range(rows), [_text(name) for name in grid.rows[:rows]], fontsize=8)
    axes.set(xlabel=grid.across, ylabel=grid.down)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if columns > 16:
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                colour = "white" if abs(value) >= 0.6 * grid.largest else INK
                axes.text(j, i, written(value, grid.kind), ha="center", va="center", fontsize=7.5, color=colour)


def _lines(axes: Any, figure: Lines) -> None:
    places, (low, high, _) = range(1, len(figure.across) + 1), figure.axis
    for i, (name, values) in enumerate(figure.grey):
        axes.plot(
            places[: len(values)],
            [float("nan") if value is None else 100 * value for value in values],
            color="#8a93a2",
            linestyle=DASHES[1 + i % (len(DASHES) - 1)],
            linewidth=1.2,
            marker="o",
            markersize=3,
            label=_text(name),
            zorder=1,
        )
    for i, (name, values, strong) in enumerate(figure.series):
        shares = [float("nan") if value is None else 100 * value for value in values]
        axes.plot(
            places[: len(shares)],
            shares,
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
            linewidth=2.4 if strong else 1.2,
            marker="o",
            markersize=4 if strong else 3,
            label=_text(name),
            zorder=3 if strong else 2,
        )
    axes.set_xticks(
        places,
        [f"{i}\n{_text(name, 12)}" if len(places) < 8 else i for i, name in zip(places, figure.across, strict=True)],
    )
    axes.set(ylabel="accuracy, %" if figure.kind == "percent" else "percentage points", xlabel="after learning")
    if figure.kind == "points":
        axes.set_ylim(100 * low, 100 * high)
    axes.grid(color=LINE, axis="y")
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _bars(axes: Any, figure: Bars) -> None:
    bars = figure.bars[::-1]
    drawn = axes.barh(
        range(len(bars)),
        [100 * (value or 0.0) for _, value, _ in bars],
        color=[COLOURS[0] if strong else COLOURS[8] for _, _, strong in bars],
    )
    axes.set_yticks(range(len(bars)), [_text(name) for name, _, _ in bars])
    axes.bar_label(drawn, [written(value, "points") for _, value, _ in bars], fontsize=8, padding=3)
    axes.set_xlabel("percentage points")
    axes.margins(x=0.12)


def _points(axes: Any, figure: Points) -> None:
    for i, group in enumerate(figure.groups):
        own = [(x, y) for name, _, x, y in figure.points if name == group]
        marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
        axes.scatter(*zip(*own, strict=True), s=22, color=COLOURS[i % len(COLOURS)], marker=marker, label=_text(group))
    if len(figure.points) <= 30:
        for group, name, x, y in figure.points:
            axes.annotate(
                _text(figure.label(group, name), 16), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7
            )
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
