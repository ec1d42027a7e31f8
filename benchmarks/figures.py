"""Plots of results, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files; imported only when needed, because it comes with the `bench` extra."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with `count` panels of width x height inches, in rows of two that share bar names at the left."""
    columns = min(2, count)
    lines = -(-count // columns)
    size = (width * columns + 2.5, height * lines + 0.3)
    figure, found = pyplot().subplots(
        lines, columns, figsize=size, dpi=140, sharey=True, squeeze=False, layout="constrained"
    )
    for unused in found.flat[count:]:
        unused.set_axis_off()
    return figure, list(found.flat[:count])


def plot_rates(charts: Mapping[str, Sequence[tuple[str, float, bool]]], unit: str, path: Path) -> None:
    """One panel of bars per entry of `charts`: {title: [(name, rate, whether it is ours)]}."""
    figure, found = panels(len(charts), 3.2, 2.2)
    for panel, (title, bars) in zip(found, charts.items(), strict=True):
        drawn = panel.barh([name for name, _, _ in bars][::-1], [rate for _, rate, _ in bars][::-1])
        for bar, (_, _, own) in zip(drawn, bars[::-1], strict=True):
            bar.set_color("tab:blue" if own else "tab:gray")
        panel.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(unit)
        panel.tick_params(labelsize=8)
        panel.margins(x=0.15)
    figure.savefig(path)
    pyplot().close(figure)


def plot_times(
    panels: dict[str, list[dict[str, str]]],
    across: Callable[[dict[str, str]], int],
    labels: dict[str, str],
    path: Path,
    *,
    title: str,
    axis: str,
) -> None:
    """Log-log medians against `across`, one panel per entry of `panels` ({title: rows}) and one line per way in
    `labels`. The first, ours, is drawn strongest."""
    width = max(7.0, 3.6 * len(panels))
    figure, (drawn,) = pyplot().subplots(
        1, len(panels), figsize=(width, 4.8), dpi=130, layout="constrained", squeeze=False
    )
    for axes, (name, rows) in zip(drawn, panels.items(), strict=True):
        for number, (way, label) in enumerate(labels.items()):
            points = sorted({across(row): float(row["p50_ms"]) for row in rows if row["way"] == way}.items())
            if points:
                style = {"linewidth": 1.2, "alpha": 0.9} if number else {"linewidth": 2.4, "zorder": 3}
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.set_title(name, fontsize=9)
        axes.grid(True, which="both", alpha=0.25)
    drawn[0].set_ylabel("milliseconds (median)")
    lines = {label: line for axes in drawn for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    pyplot().close(figure)
