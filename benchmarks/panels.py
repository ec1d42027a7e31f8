"""Pictures of several panels."""

from __future__ import annotations

from typing import Any


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A matplotlib figure without a window, and `count` panels of so many inches in rows of two, whose bars share their
    names at the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, count)
    lines = -(-count // columns)
    size = (width * columns + 2.5, height * lines + 0.3)
    figure, found = pyplot.subplots(
        lines, columns, figsize=size, dpi=140, sharey=True, squeeze=False, layout="constrained"
    )
    for unused in found.flat[count:]:
        unused.set_axis_off()
    return figure, list(found.flat[:count])
