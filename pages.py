"""Building blocks of the HTML reports: style (light and dark), figures and axes, without network or plotting library.

`page` is a whole document, `figure` the frame of one chart; `ticks`, `short` and `grid_line` are for axes. The charts
are where their data is: curves over steps in `pretrain.report.line_charts`, a proof's in `pretrain.proof.proof_page`,
a data run's in `data_pipeline.report`.
"""

import html
import math
from collections.abc import Sequence

SERIES = 6  # colours --s0 to --s5
LEFT, RIGHT, TOP = 84, 14, 12  # margins of a chart with an axis at its left

STYLE = """
:root { --alarm: #c8322b; --page: #fcfcfb; --ink: #1c1c1a; --soft: #6b6b66; --grid: #e6e5e1; --card: #ffffff;
  --s0: #2a78d6; --s1: #d95926; --s2: #17936a; --s3: #8a5fd1; --s4: #b07a00; --s5: #c2417f; }
@media (prefers-color-scheme: dark) { :root { --alarm: #ff6b5e; --page: #191918; --ink: #ecebe7; --soft: #a3a29b;
  --grid: #33332f; --card: #21211f;
  --s0: #5b9ff0; --s1: #f0824f; --s2: #3cbd8e; --s3: #ad8cf0; --s4: #d9a632; --s5: #e87aae; } }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 4 3; } svg .spike { stroke: var(--alarm);
  opacity: 0.55; }
svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg path.raw { stroke-width: 1; opacity: 0.35; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
body { margin: 0 auto; padding: 24px; max-width: 1040px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 28px 0 8px; }
p { margin: 4px 0 12px; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: 4px 12px 4px 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--grid); } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; } td pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 760px) { body { padding: 12px; } svg text { font-size: 14px; } }
.share { height: 8px; min-width: 1px; margin-top: 6px; background: var(--s0); }
details > pre { overflow-x: auto; font-size: 12px; background: var(--card); padding: 12px; border-radius: 8px; }
"""


def page(title: str, body: Sequence[str], style: str = "") -> str:
    """A document of HTML parts; `style` is CSS beyond STYLE. `title` is text, `body` is HTML already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def figure(title: str, width: float, height: float, parts: Sequence[str], names: Sequence[str] = ()) -> str:
    """Returns a <figure> with title, legend and an SVG of `parts`; the legend lists `names`, if there are several."""
    legend = ""
    if len(names) > 1:
        keys = (
            f'<span><i style="background: var(--s{index % SERIES})"></i>{html.escape(name)}</span>'
            for index, name in enumerate(names)
        )
        legend = f'<div class="legend">{"".join(keys)}</div>'
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{legend}"
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def grid_line(y: float, width: float, label: str) -> str:
    """Returns the SVG of a horizontal grid line at height `y` of a chart `width` wide, with its label at the left."""
    return (
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Returns about `count` round numbers that cover [low, high], integers if `whole`."""
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


def duration(seconds: float) -> str:
    """Formats seconds for people: `8.3 s`, from a minute on `2 min 05 s`, from an hour on `3 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def short(value: float) -> str:
    """Formats a number for an axis: 12k, 3.5M, 0.0003, 2e-06."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"
