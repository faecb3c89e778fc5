"""Line charts as SVG, in the colors of the page."""

import math
from html import escape

from trainer.run_folder import Series

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 250, 58, 26, 10, 18
MAX_POINTS = 500
TICKS = 5  # of an axis, at most about


def line_chart(title: str, series: list[tuple[str, Series]], log: bool = False) -> str:
    """A figure with one line per run.

    Args:
        title: Caption.
        series: Label, steps and values of each line; a series without points is left out.
        log: Use a logarithmic scale, where all values are positive and differ enough.
    """
    drawn = [(label, *_thinned(points)) for label, points in series if points[0]]
    if not drawn:
        return ""
    xs = [x for _, steps, _ in drawn for x in steps]
    ys = [y for _, _, values in drawn for y in values if math.isfinite(y)]
    if not ys:
        return ""
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    log = log and low > 0 and high / low >= 3  # an almost flat line reads better on a linear scale
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - left) / (right - left) if right > left else 0.5)

    def y_of(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low or 1)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in _ticks(left, right):
        if left <= tick <= right:
            at = f'x="{x_of(tick):.1f}" y="{HEIGHT - 8}"'
            parts.append(f'<text {at} text-anchor="middle">{short(tick)}</text>')
    for number, (label, steps, values) in enumerate(drawn):
        usable = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in usable)
        style = f'class="line c{number % 6}"'
        if len(usable) == 1:
            x, y = usable[0]
            parts.append(
                f'<circle {style} cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"><title>{escape(label)}</title></circle>'
            )
        else:
            parts.append(f'<polyline {style} points="{points}"><title>{escape(label)}</title></polyline>')
    parts.append("</svg>")
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</figure>"


def short(value: float) -> str:
    """A number as an axis shows it: 1.2M, 250k, 0.05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def _ticks(low: float, high: float) -> list[float]:
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= TICKS)
    first = math.floor(low / step + 1e-9)
    return [n * step for n in range(first, math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]


def _thinned(points: Series) -> Series:
    """Means of neighbors, so that a long run is drawn as quickly as a short one."""
    steps, values = points
    size = -(-len(steps) // MAX_POINTS)
    if size <= 1:
        return points
    starts = range(0, len(steps), size)
    mean = [sum(values[at : at + size]) / len(values[at : at + size]) for at in starts]
    return [steps[min(at + size, len(steps)) - 1] for at in starts], mean
