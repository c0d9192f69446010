"""Line charts as inline SVG, drawn without a chart library; their CSS is in `pages.py`.

Other kinds of charts are left out, and so is interaction beyond the browser's own tooltips.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pages import LEFT, RIGHT, SERIES, TOP, figure, grid_line, short, ticks

Points = Sequence[tuple[float, float]]
ToSvg = Callable[[float, float], tuple[float, float]]  # data to SVG coordinates

WIDTH, HEIGHT, BOTTOM = 460, 240, 38
MAX_POINTS = 400  # about one per pixel of the chart's width
SMOOTH_FROM = 60  # points from which on a noisy line gets a running mean


@dataclass(frozen=True)
class Mark:
    """A dashed line at `x`: of a `kind` that CSS colours, "spike" or "restart", with a note that the pointer shows."""

    x: float
    kind: str
    note: str


def line_chart(
    title: str,
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    noisy: bool = True,
    marks: Sequence[Mark] = (),
) -> str:
    """Returns a <figure> with a title, a legend if there are several series, and the curves; "" without any point.

    Points that are not finite are left out. Long series are thinned such that every peak stays; if `noisy`, a running
    mean is drawn on top. Marks beyond the points are left out.
    """
    kept = {name: finite for name, points in series.items() if (finite := _finite(points))}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_ticks = ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def to_svg(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in y_ticks:
        _, y = to_svg(x_low, tick)
        parts.append(grid_line(y, WIDTH, short(tick)))
    for tick in ticks(x_low, x_high, whole=True):
        if x_low <= tick <= x_high:
            x, _ = to_svg(tick, y_low)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    for mark in marks:
        if x_low <= mark.x <= x_high:
            x, _ = to_svg(mark.x, y_low)
            parts.append(
                f'<line class="mark {mark.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{html.escape(mark.note)}</title></line>"
            )
    for index, (name, points) in enumerate(kept.items()):
        color = f"stroke: var(--s{index % SERIES})"
        note = f"<title>{html.escape(name)}: last {short(points[-1][1])} at {short(points[-1][0])}</title>"
        smooth = noisy and len(points) >= SMOOTH_FROM
        parts.append(_path(thin(points), to_svg, color, "raw" if smooth else "", note))
        if smooth:
            parts.append(_path(thin(running_mean(points)), to_svg, color, "", note))
    return figure(title, WIDTH, HEIGHT, parts, list(kept))


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Replaces each y by the mean over a centred window of 5 % of the points; the window narrows towards both ends."""
    half = max(1, len(points) // 40)
    means = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = points[index - reach : index + reach + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def thin(points: Points) -> Points:
    """Returns about MAX_POINTS of the points, the lowest and the highest of every bucket, so that no peak is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    ends = [sorted({min(b, key=lambda p: p[1]), max(b, key=lambda p: p[1])}) for b in buckets]
    return [points[0], *(point for pair in ends for point in pair), points[-1]]


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _path(points: Points, to_svg: ToSvg, style: str, kind: str, note: str) -> str:
    svg_points = [to_svg(x, y) for x, y in points]
    if len(svg_points) == 1:  # a stroke of length 0 with round caps shows as a dot
        svg_points *= 2
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in svg_points)
    css = f' class="{kind}"' if kind else ""
    width = "; stroke-width: 6" if len(points) == 1 else ""
    return f'<path{css} style="{style}{width}" d="{line}">{note}</path>'
