"""Line charts as inline SVG, written by hand: no network, no plotting library, light and dark by CSS.

`line_chart` draws one chart, `STYLE` is the CSS that it needs in the page. Leaves out every kind but lines
over steps, and interaction beyond the browser's own tooltips.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]  # data to SVG coordinates

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 68, 14, 12, 38
MAX_POINTS = 400  # more than a chart this wide can show
SMOOTH_FROM = 60  # with fewer points the raw line reads well by itself
SERIES = 6

STYLE = """
:root { --page: #fcfcfb; --ink: #1c1c1a; --soft: #6b6b66; --grid: #e6e5e1; --card: #ffffff;
  --s0: #2a78d6; --s1: #d95926; --s2: #17936a; --s3: #8a5fd1; --s4: #b07a00; --s5: #c2417f; }
@media (prefers-color-scheme: dark) { :root { --page: #191918; --ink: #ecebe7; --soft: #a3a29b; --grid: #33332f;
  --card: #21211f; --s0: #5b9ff0; --s1: #f0824f; --s2: #3cbd8e; --s3: #ad8cf0; --s4: #d9a632; --s5: #e87aae; } }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg path.raw { stroke-width: 1; opacity: 0.35; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
"""


def line_chart(title: str, series: Mapping[str, Points], x_label: str, y_label: str, noisy: bool = True) -> str:
    """One <figure>: title, legend where there are several series, and the curves.

    Points that are not finite are left out. Long series are thinned so that every peak stays; `noisy` ones
    get a running mean on top. Returns "" when no series has a point.
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

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(x_low, x_high, whole=True):
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    for index, (name, points) in enumerate(kept.items()):
        color = f"stroke: var(--s{index % SERIES})"
        note = f"<title>{html.escape(name)}: last {short(points[-1][1])} at {short(points[-1][0])}</title>"
        smooth = noisy and len(points) >= SMOOTH_FROM
        parts.append(_path(thin(points), place, color, "raw" if smooth else "", note))
        if smooth:
            parts.append(_path(thin(running_mean(points)), place, color, "", note))
    legend = ""
    if len(kept) > 1:
        keys = (
            f'<span><i style="background: var(--s{index % SERIES})"></i>{html.escape(name)}</span>'
            for index, name in enumerate(kept)
        )
        legend = f'<div class="legend">{"".join(keys)}</div>'
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{legend}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them; `whole` asks for integers."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: 12k, 3.5M, 0.0003, 2e-06."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Each point's mean with its neighbours, 5 % of the points in all, fewer but as many on each side at the ends."""
    half = max(1, len(points) // 40)
    means = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = points[index - reach : index + reach + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def thin(points: Points) -> Points:
    """At most about MAX_POINTS of them: the lowest and the highest of every bucket, so that no peak is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    ends = [sorted({min(b, key=lambda p: p[1]), max(b, key=lambda p: p[1])}) for b in buckets]
    return [points[0], *(point for pair in ends for point in pair), points[-1]]


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _path(points: Points, place: Place, style: str, kind: str, note: str) -> str:
    placed = [place(x, y) for x, y in points]
    if len(placed) == 1:  # a stroke of no length shows as a dot, its caps being round
        placed *= 2
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    css = f' class="{kind}"' if kind else ""
    width = "; stroke-width: 6" if len(points) == 1 else ""
    return f'<path{css} style="{style}{width}" d="{line}">{note}</path>'
