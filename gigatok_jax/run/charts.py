"""Draws line charts as SVG text: parts of the page of a run, and files of their own."""

import html
import itertools
import json
import math
from collections.abc import Iterable
from typing import NamedTuple

POINTS = 300  # of a line; longer runs are averaged
COLORS = 5  # defined by page.html
WIDTH, HEIGHT = 420, 220  # of a chart, in units of its SVG
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 12, 26  # margins of the plot inside the chart
FILE_COLORS = ("#888888", "#b07aa1", "#edc948", "#f28e2b", "#59a14f", "#4e79a7", "#e15759")
FILE_LEGEND = 190  # width right of the plot
FILE_STYLE = (
    "text { font: 11px sans-serif; } .grid { stroke: #dddddd; }"
    " path { fill: none; stroke-width: 2; }"
    + "".join(
        f" path.c{i} {{ stroke: {color}; }} circle.c{i}, text.c{i} {{ fill: {color}; }}"
        for i, color in enumerate(FILE_COLORS)
    )
)
Points = list[tuple[float, float]]


def line_chart(title: str, lines: dict[str, Points], may_log: bool) -> str:
    """Draws a metric as HTML: an SVG chart, title and legend; returns "" without a finite point.

    Args:
        title: name of the metric.
        lines: label -> points (step, value); a value that is NaN leaves a gap.
        may_log: allows a logarithmic axis where values span decades.
    """
    lines = {label: _thin(points) for label, points in lines.items()}
    finite = _finite(lines)
    if not finite:
        return ""
    scale = _scale(finite, 50 if may_log else math.inf)
    paths = "".join(_path(points, scale, i % COLORS) for i, points in enumerate(lines.values()))
    data = json.dumps({"lines": lines, "x": [LEFT, WIDTH - RIGHT, scale.steps]})
    kind = ' <span class="muted">log</span>' if scale.log else ""
    return (
        f'<div class="chart"><h3>{html.escape(title.replace("_", " "))}{kind}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}"'
        f' data-chart="{html.escape(data.replace("NaN", "null"))}">{_axes(scale)}{paths}</svg>'
        f'<div class="legend">{_legend(lines)}</div></div>'
    )


def svg_file(lines: dict[str, Points]) -> str:
    """Draws lines as the text of an SVG file: white, with a legend, logarithmic where it can be.

    Args:
        lines: label -> points (step, value); a value that is not finite leaves a gap.
    """
    lines = {label: _thin(points) for label, points in lines.items()}
    scale = _scale(_finite(lines) or [(0.0, 0.0)], 1)
    paths, width = [], WIDTH + FILE_LEGEND
    for i, (label, points) in enumerate(lines.items()):
        color = i % len(FILE_COLORS)
        paths.append(_path(points, scale, color))
        place = f'x="{WIDTH}" y="{TOP + 10 + 16 * i}"'
        paths.append(f'<text class="c{color}" {place}>{html.escape(label)}</text>')
    size = f'width="{2 * width}" height="{2 * HEIGHT}" viewBox="0 0 {width} {HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{FILE_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{_axes(scale)}{"".join(paths)}</svg>'
    )


def _finite(lines: dict[str, Points]) -> Points:
    """Returns the points of all lines whose value is finite."""
    return [(x, y) for points in lines.values() for x, y in points if math.isfinite(y)]


def _legend(lines: dict[str, Points]) -> str:
    """Returns the legend of a chart as HTML: the colour, label and last value of each line."""
    keys = []
    for index, (label, points) in enumerate(lines.items()):
        value = points[-1][1]
        last = _number(value) if math.isfinite(value) else "not finite"
        mark = f'<i class="c{index % COLORS}"></i>'
        keys.append(f'<span class="key">{mark}{html.escape(label)} <b>{last}</b></span>')
    return "".join(keys)


class _Scale(NamedTuple):
    steps: float  # at the right edge; the left edge is step 0
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return LEFT + step / max(self.steps, 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _scale(points: Points, log_above: float) -> _Scale:
    """Returns the scale of a chart's axes that fits finite points.

    The scale is logarithmic if the values are positive and span a factor above `log_above`.
    """
    steps = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if low > 0 and high > log_above * low:
        return _Scale(steps, low / 1.1, high * 1.1, log=True)
    if 0 <= low < 0.3 * high:
        low = 0.0
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return _Scale(steps, low - margin * (low != 0), high + margin, log=False)


def _thin(points: Points) -> Points:
    """Reduces the points of a line to at most POINTS.

    Each point left has the last step and the mean value of a run of neighbours.
    """
    size = -(-len(points) // POINTS)
    runs = (points[i : i + size] for i in range(0, len(points), size))
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def _path(points: Points, scale: _Scale, color: int) -> str:
    """Draws a line of a chart as SVG, with gaps where values are not finite.

    A point between two gaps is drawn as a dot.
    """
    runs = itertools.groupby(points, key=lambda point: math.isfinite(point[1]))
    pieces = [[(scale.x(x), scale.y(y)) for x, y in run] for finite, run in runs if finite]
    lines = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in piece) for piece in pieces)
    dots = "".join(
        f'<circle class="c{color}" cx="{piece[0][0]:.1f}" cy="{piece[0][1]:.1f}" r="2.5"/>'
        for piece in pieces
        if len(piece) == 1
    )
    return f'<path class="c{color}" d="{lines}"/>{dots}'


def _axes(scale: _Scale) -> str:
    marks = []
    for value in _ticks(scale.low, scale.high, scale.log):
        y, ends = scale.y(value), f'x1="{LEFT}" x2="{WIDTH - RIGHT}"'
        marks.append(f'<line class="grid" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(_text(LEFT - 6, y + 3.5, "end", value))
    for value in _ticks(0, scale.steps, log=False):
        marks.append(_text(scale.x(value), HEIGHT - 8, "middle", value))
    return "".join(marks)


def _text(x: float, y: float, anchor: str, value: float) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_number(value)}</text>'


def _ticks(low: float, high: float, log: bool) -> Iterable[float]:
    """Returns up to six values in [low, high] at which an axis has a mark.

    The values are round numbers, or else the two ends of a logarithmic axis.
    """
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = -(-len(powers) // 5)
        found = [10.0**p for p in powers[::every] if low <= 10.0**p <= high]
        return found if len(found) > 1 else [low, high]
    rough = max(high - low, 1e-12) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    size = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]


def _number(value: float) -> str:
    """Formats a number in few characters, for an axis or a legend."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
