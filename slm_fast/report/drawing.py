"""Line charts and scatter plots as SVG. Text stays text, and colours follow the page's light or dark theme."""

from __future__ import annotations

import math

from slm_fast.report.figures import Lines, Points, written
from slm_fast.report.markup import bdi, cut, escape

WIDTH, HEIGHT = 460, 300
COLOURS = 10  # --c0 ... --c9 of page.css
DASHES = ("", "6 4", "2 3", "9 3 2 3")
GREY = "var(--soft)"
NAMED = 30  # with more points than this, names appear in tooltips only


def lines(figure: Lines) -> str:
    """Values over learned tasks, with those from elsewhere in grey behind them."""
    left, right, top, bottom = 40, WIDTH - 12, 12, HEIGHT - 40
    (low, high, ticks), count = figure.axis, len(figure.across)

    def x(i: int) -> float:
        return left + 10 + (right - left - 20) * (i / (count - 1) if count > 1 else 0.5)

    def y(share: float) -> float:
        return bottom - (bottom - top) * (share - low) / (high - low)

    unit = " %" if figure.kind == "percent" else " points"
    drawn = []
    for tick in ticks:
        at, said = y(tick), f"{100 * tick:.3g}".replace("-", "\u2212")
        drawn.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text x="{left - 7}" y="{at + 4:.1f}" text-anchor="end">{said}</text>')
    every = math.ceil(count / 12)
    for i in range(0, count, every):
        drawn.append(f'<text x="{x(i):.1f}" y="{bottom + 18}" text-anchor="middle">{i + 1}</text>')
    drawn.append(f'<text x="{(left + right) / 2}" y="{HEIGHT - 2}" text-anchor="middle">tasks learned</text>')
    shown = [
        (name, values, _colour(i), _stroke(i, strong), strong) for i, (name, values, strong) in enumerate(figure.series)
    ]
    shown += [(name, values, GREY, _grey(i), False) for i, (name, values) in enumerate(figure.grey)]
    for name, values, colour, style, strong in reversed(shown):
        spots = [(x(i), y(value), value) for i, value in enumerate(values) if value is not None]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in spots)
        drawn.append(f'<g><title>{escape(name)}</title><polyline points="{path}" {style}/>')
        radius = 3.4 if strong else 2.4
        drawn += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}" fill="{colour}">'
            f"<title>{escape(name)}: {written(value, figure.kind)}{unit}</title></circle>"
            for a, b, value in spots
        ]
        drawn.append("</g>")
    keys = [
        f'<svg viewBox="0 0 32 16" aria-hidden="true"><line x1="1" x2="31" y1="9" y2="9" {style}/></svg>'
        for _, _, _, style, _ in shown
    ]
    return _svg(figure.title, drawn) + legend(keys, [name for name, *_ in shown])


def _colour(number: int) -> str:
    return f"var(--c{number % COLOURS})"


def _grey(number: int) -> str:
    return f'stroke="{GREY}" stroke-width="1.6" stroke-dasharray="{DASHES[1 + number % (len(DASHES) - 1)]}"'


def _stroke(number: int, strong: bool) -> str:
    dash = DASHES[number // COLOURS % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{_colour(number)}" stroke-width="{3 if strong else 1.6}"{dashed}'


def points(figure: Points) -> str:
    """A scatter plot with one colour and shape per group."""
    groups = {group: i for i, group in enumerate(figure.groups)}
    xs, ys = [p[2] for p in figure.points], [p[3] for p in figure.points]
    margin = 26
    size = max(max(xs) - min(xs), (max(ys) - min(ys)) * (WIDTH - 2 * margin) / (HEIGHT - 2 * margin)) or 1.0
    scale = (WIDTH - 2 * margin) / size
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    marks, spots = [], []
    for group, name, a, b in figure.points:
        x, y = WIDTH / 2 + (a - middle[0]) * scale, HEIGHT / 2 - (b - middle[1]) * scale
        marks.append(f"<g>{_mark(groups[group], x, y)}<title>{escape(f'{group}: {name}')}</title></g>")
        spots.append((x, y, cut(figure.label(group, name), 16)))
    names = _names(spots) if len(spots) <= NAMED else []
    keys = [f'<svg viewBox="0 0 16 16" aria-hidden="true">{_mark(i, 8, 9)}</svg>' for i in groups.values()]
    return _svg(figure.title, [*marks, '<g class="names">', *names, "</g>"]) + legend(keys, list(groups))


def _names(spots: list[tuple[float, float, str]]) -> list[str]:
    """Labels next to their points, where there is room; the other points only have tooltips."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in spots]
    found = []
    for x, y, name in spots:
        wide = 6.8 * len(name)
        for at, anchor, base in (
            (x + 8, "start", y + 3.5),
            (x - 8 - wide, "end", y + 3.5),
            (x - wide / 2, "middle", y - 9),
            (x - wide / 2, "middle", y + 16),
        ):
            box = (at, base - 8, at + wide, base + 3)
            inside = box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT
            if inside and not any(
                box[0] < right and left < box[2] and box[1] < low and high < box[3] for left, high, right, low in taken
            ):
                taken.append(box)
                start = {"start": at, "end": at + wide, "middle": x}[anchor]
                found.append(f'<text x="{start:.1f}" y="{base:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
                break
    return found


def _mark(number: int, x: float, y: float) -> str:
    fill = f'fill="var(--c{number % COLOURS})"'
    shape, r = number // COLOURS % 4, 4.6
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {fill}/>'
    if shape == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {fill}/>'
    corners = {2: ((0, -r), (r, r), (-r, r)), 3: ((0, -6), (5, 0), (0, 6), (-5, 0))}[shape]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" {fill}/>'


def _svg(title: str, drawn: list[str]) -> str:
    label = escape(title)
    return f'<svg class="drawn" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def legend(keys: list[str], names: list[str]) -> str:
    entries = [f"<li>{key}<span>{bdi(name)}</span></li>" for key, name in zip(keys, names, strict=True)]
    return f'<ul class="legend">{"".join(entries)}</ul>'
