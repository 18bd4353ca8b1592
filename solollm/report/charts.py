"""Line charts as inline SVG: no script needed to read them, no library, no address of anyone.

Colours, strokes and text sizes are CSS classes that `report.html` sets for light and dark. The
numbers behind the curves ride along in `data-series`, for the page's read-out under the pointer.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 480, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 26
MAX_POINTS = 320  # per curve: more than the pixels of a phone, few enough to keep the page small

Style = Literal["train", "faint", "eval"]
Format = Callable[[float], str]


class Series(NamedTuple):
    """One curve. A y of None breaks the line: that step had no number."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: Style


class Chart(NamedTuple):
    """One picture. `marks` are x values with a dashed line, such as the steps of a resume;
    `from_zero` is for amounts, whose small changes must not look large."""

    title: str
    series: Sequence[Series]
    format: Format
    marks: Sequence[float] = ()
    from_zero: bool = False


def line_chart(chart: Chart) -> str:
    """The chart as a `<figure>`; empty where no curve has two points."""
    curves = [thin(series) for series in chart.series]
    curves = [c for c in curves if len([y for y in c.y if y is not None]) > 1]
    if not curves:
        return ""
    low, high = _value_range([y for c in curves for y in c.y if y is not None])
    low = 0.0 if chart.from_zero else low
    steps = [x for c in curves for x in c.x]
    frame = _Frame(min(steps), max(steps), low, high)
    parts = [_grid(frame, chart.format)]
    parts += [_mark(frame, x) for x in chart.marks if frame.x_low <= x <= frame.x_high]
    drawn = "".join(_curve(frame, curve) for curve in curves)
    box = f'x="0" y="{_TOP - 4}" width="{WIDTH}" height="{HEIGHT - _TOP - _BOTTOM + 8}"'
    view = f'viewBox="0 {_TOP - 4} {WIDTH} {HEIGHT - _TOP - _BOTTOM + 8}"'
    parts.append(f"<svg {box} {view}>{drawn}</svg>")  # an inner svg cuts off what leaves its box
    data = [
        [c.name, [_short(x) for x in c.x], [y if y is None else _short(y) for y in c.y]]
        for c in curves
        if c.style != "faint"
    ]
    legend = "".join(
        f'<span class="key {c.style}">{html.escape(c.name)}</span>'
        for c in curves
        if c.style != "faint" and len(data) > 1
    )
    title = html.escape(chart.title)
    return (
        f"<figure><figcaption>{title}{legend}<output></output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"'
        f" data-frame='{json.dumps([frame.x_low, frame.x_high, _LEFT, WIDTH - _RIGHT])}'"
        f" data-series='{html.escape(json.dumps(data), quote=True)}'>"
        f"{''.join(parts)}"
        f'<line class="pointer" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/></svg></figure>'
    )


def smooth(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean over about `window` neighbours, as many to the left as to the right, so that a falling
    curve is not shifted; fewer near the ends. A None stays a None and is not averaged."""
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    smoothed: list[float | None] = []
    for i, value in enumerate(values):
        reach = min(window // 2, i, len(values) - 1 - i)
        first, last = i - reach, i + reach + 1
        mean = (sums[last] - sums[first]) / max(1, counts[last] - counts[first])
        smoothed.append(None if value is None else mean)
    return smoothed


def thin(series: Series) -> Series:
    """At most `MAX_POINTS` points: of each equal stretch its lowest and highest value, so that a
    spike survives."""
    count = len(series.x)
    if count <= MAX_POINTS:
        return series
    chosen: set[int] = {0, count - 1}
    stretches = MAX_POINTS // 2 - 1
    for number in range(stretches):
        first, last = number * count // stretches, (number + 1) * count // stretches
        known = [(y, i) for i in range(first, last) if (y := series.y[i]) is not None]
        chosen |= {min(known)[1], max(known)[1]} if known else {first}
    order = sorted(chosen)
    return series._replace(x=[series.x[i] for i in order], y=[series.y[i] for i in order])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / raw)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


class _Frame(NamedTuple):
    """Maps steps and values to the SVG's units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _value_range(values: list[float]) -> tuple[float, float]:
    """The y range. A few first or wild values must not press everything else flat: where the top
    fiftieth lies far above the rest, it is cut off."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    body = ordered[int(0.98 * (len(ordered) - 1))]
    if len(ordered) >= 50 and high - body > 0.4 * (body - low):
        high = body
    if high == low:
        margin = abs(high) * 0.1 or 1.0
        return low - margin, high + margin
    margin = 0.04 * (high - low)
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _grid(frame: _Frame, format_value: Format) -> str:
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{html.escape(format_value(value))}</text>"
        )
    for value in ticks(frame.x_low, frame.x_high, 5):
        parts.append(
            f'<text x="{frame.x(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{count_text(value)}</text>"
        )
    return "".join(parts)


def _mark(frame: _Frame, value: float) -> str:
    x = frame.x(value)
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'


def _curve(frame: _Frame, series: Series) -> str:
    """A path that starts anew after every gap, and a dot per point where points are few."""
    path, pen = [], "M"
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen = "L"
    drawn = f'<path class="{series.style}" d="{"".join(path)}"/>'
    if series.style != "eval" or len(series.x) > 60:
        return drawn
    dots = "".join(
        f'<circle class="eval" r="2.2" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}"/>'
        for x, y in zip(series.x, series.y, strict=True)
        if y is not None
    )
    return drawn + dots


def count_text(value: float) -> str:
    """A count with three digits at most: 950, 1.2k, 34M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _short(value: float) -> float:
    """Five digits: enough to read off, and short in the page."""
    return float(f"{value:.5g}")
