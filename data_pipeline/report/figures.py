"""Charts of a data run as inline SVG: the flow of documents through the stages, histograms, and bars.

Marks are drawn to scale, except that very thin ones get a visible stroke. Exact numbers are in tooltips and in the
tables beside the charts. Colours and frames come from `pages`.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.report.measures import ScoreHistogram
from pages import figure, short, ticks

_FLOW_HEIGHT, _FLOW_TOP, _BAR = 230, 46, 14
_STEP = 118  # distance from stage to stage
_DROP = 34  # distance below the flow at which dropped documents end
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 150, 34, 8, 20, 22


@dataclass(frozen=True)
class Flow:
    """One stage of a flow diagram; all numbers are documents, or all are bytes."""

    stage: str
    came_in: int
    dropped: int
    passed_on: int  # less than came_in - dropped where text was rewritten, such as HTML to its text
    reasons: str  # for the tooltip


def flow(title: str, stages: Sequence[Flow]) -> str:
    """Returns a Sankey diagram: a bar per stage for its input, a band to the next stage, and a bend down for drops."""
    most = max((stage.came_in for stage in stages), default=0) or 1
    scale = _FLOW_HEIGHT / most
    width, height = _STEP * len(stages) + 90, _FLOW_TOP + _FLOW_HEIGHT + _DROP + 34
    parts = []
    for number, stage in enumerate(stages):
        x = 8 + number * _STEP
        right, following = x + _BAR, x + _STEP
        tall, on = stage.came_in * scale, stage.passed_on * scale
        kept = (stage.came_in - stage.dropped) * scale
        parts.append(f'<rect class="bar" x="{x}" y="{_FLOW_TOP}" width="{_BAR}" height="{tall:.2f}"/>')
        parts.append(
            f'<text class="name" x="{x}" y="16">{html.escape(stage.stage)}</text>'
            f'<text x="{x}" y="32">{short(stage.came_in)}</text>'
        )
        note = f"<title>{stage.passed_on:,} go on</title>"
        bend = (right + following) / 2
        parts.append(
            f'<path class="band" d="M{right} {_FLOW_TOP}H{following}V{_FLOW_TOP + on:.2f}C{bend} '
            f'{_FLOW_TOP + on:.2f} {bend} {_FLOW_TOP + kept:.2f} {right} {_FLOW_TOP + kept:.2f}Z">{note}</path>'
        )
        if stage.dropped:
            parts.append(_led_away(right, tall, stage, scale, height))
    x = 8 + len(stages) * _STEP
    if stages:
        on = stages[-1].passed_on
        parts.append(f'<rect class="bar" x="{x}" y="{_FLOW_TOP}" width="{_BAR}" height="{on * scale:.2f}"/>')
        parts.append(f'<text class="name" x="{x}" y="16">kept</text><text x="{x}" y="32">{short(on)}</text>')
    return figure(title, width, height, parts)


def flow_list(title: str, stages: Sequence[Flow]) -> str:
    """Returns the content of `flow` as a list for narrow screens: a bar per stage, and its drops with reasons."""
    most = max((stage.came_in for stage in stages), default=0) or 1
    lines = []
    for stage in stages:
        lost = ""
        if stage.dropped:
            share = f"{stage.dropped / stage.came_in:.2%}"
            lost = f'<div class="lost">−{stage.dropped:,} ({share}): {html.escape(stage.reasons)}</div>'
        name = f"<b>{html.escape(stage.stage)}</b> {stage.came_in:,} in"
        lines.append(f'<li>{name}<i style="width: {100 * stage.came_in / most:.2f}%"></i>{lost}</li>')
    if stages:
        on = stages[-1].passed_on
        lines.append(f'<li><b>kept</b> {on:,}<i style="width: {100 * on / most:.2f}%"></i></li>')
    return f"<figure><figcaption>{html.escape(title)}</figcaption><ol>{''.join(lines)}</ol></figure>"


def _led_away(right: float, tall: float, stage: Flow, scale: float, height: float) -> str:
    """Returns the bend for the drops of a stage, with number, share and tooltip."""
    thick = stage.dropped * scale
    middle, end = _FLOW_TOP + tall - thick / 2, height - 30
    across = right + 12 + thick / 2
    note = f"<title>{stage.dropped:,} of {stage.came_in:,} dropped: {html.escape(stage.reasons)}</title>"
    share = f"{stage.dropped / stage.came_in:.2%}"
    return (
        f'<path class="lost" style="stroke-width: {max(thick, 1.5):.2f}" '
        f'd="M{right} {middle:.2f}Q{across:.2f} {middle:.2f} {across:.2f} {max(end, middle):.2f}">{note}</path>'
        f'<text x="{right}" y="{height - 14}">−{short(stage.dropped)}</text>'
        f'<text x="{right}" y="{height - 2}">{share}</text>'
    )


def histogram(scores: ScoreHistogram) -> str:
    """Returns the histogram of one rule: documents by score, with those outside the bound in another colour.

    The bound is a line. Heights are logarithmic, since the few documents outside would not be visible otherwise.
    """
    counts = scores.inside + scores.outside
    total, broken = int(counts.sum()), int(scores.outside.sum())
    x_of = _axis(scores.edges, scores.logarithmic)
    top = max(math.log10(1 + int(counts.max())), 0.5)
    parts = _decades(top)
    base = HEIGHT - BOTTOM
    css = ' class="out"' if broken else ""
    parts.append(f'<text{css} x="{WIDTH - RIGHT}" y="11" text-anchor="end">{broken:,} of {total:,} outside</text>')
    for css, values in (("bars", counts), ("bars out", scores.outside)):
        heights = np.log10(1 + values) / top * (base - TOP)
        bars = [
            f"M{x_of(left):.1f} {base}V{base - tall:.1f}H{x_of(right):.1f}V{base}Z"
            for left, right, tall in zip(scores.edges[:-1], scores.edges[1:], heights, strict=True)
            if tall
        ]
        if bars:
            parts.append(f'<path class="{css}" d="{"".join(bars)}"/>')
    for word, limit in (("at least", scores.low), ("at most", scores.high)):
        if limit is not None:
            x = x_of(limit)
            parts.append(
                f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{base}">'
                f"<title>{word} {limit:g}</title></line>"
            )
    parts += _x_labels(scores.edges, scores.logarithmic, x_of)
    limits = [f"{sign} {limit:g}" for sign, limit in (("≥", scores.low), ("≤", scores.high)) if limit is not None]
    return figure(f"{scores.score} {', '.join(limits)}", WIDTH, HEIGHT, parts)


def sizes(title: str, edges: np.ndarray, before: np.ndarray, after: np.ndarray) -> str:
    """Returns the histogram of a source's documents by bytes, before and after the run; "" without documents."""
    used = np.flatnonzero(before)
    if not len(used):
        return ""
    first, last = used[0], used[-1] + 1
    edges, before, after = edges[first : last + 1], before[first:last], after[first:last]
    x_of = _axis(edges, True)
    marks = ticks(0, int(before.max()), 4, whole=True)
    base = HEIGHT - BOTTOM
    scale = (base - TOP) / marks[-1]
    parts = []
    for mark in marks:
        y = base - mark * scale
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{short(mark)}</text>')
    for css, values in (("bars out", before), ("bars", after)):
        for left, right, value in zip(edges[:-1], edges[1:], values.tolist(), strict=True):
            if value:
                x, y = x_of(left) + 0.5, base - value * scale
                note = f"<title>{short(left)} to {short(right)} bytes: {value:,}</title>"
                parts.append(
                    f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{x_of(right) - x - 0.5:.1f}" '
                    f'height="{base - y:.1f}">{note}</rect>'
                )
    parts += _x_labels(edges, True, x_of)
    return figure(title, WIDTH, HEIGHT, parts)


def bar(share: float) -> str:
    """Returns a bar for a table's cell, with `share` of the full length."""
    drawn = f'<rect class="bars" x="0" y="1" width="{120 * min(max(share, 0.0), 1.0):.1f}" height="8"/>'
    return f'<svg class="cell" viewBox="0 0 120 10">{drawn}</svg>'


class _axis:
    """Function from a value to its x coordinate; values below a logarithmic axis are put at its left end."""

    def __init__(self, edges: np.ndarray, logarithmic: bool) -> None:
        self._logarithmic, self._least = logarithmic, float(edges[0])
        self._low, self._high = self._of(float(edges[0])), self._of(float(edges[-1]))

    def _of(self, value: float) -> float:
        return math.log10(max(value, self._least)) if self._logarithmic else value

    def __call__(self, value: float) -> float:
        return LEFT + (self._of(float(value)) - self._low) / (self._high - self._low) * (WIDTH - LEFT - RIGHT)


def _decades(top: float) -> list[str]:
    """Returns grid lines with labels at 1, 10, 100 ... for logarithmic heights up to log10(1 + n) = `top`."""
    parts = []
    for power in range(int(top) + 1):
        value = 10**power
        y = HEIGHT - BOTTOM - math.log10(1 + value) / top * (HEIGHT - BOTTOM - TOP)
        if y >= TOP - 2:
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    return parts


def _x_labels(edges: np.ndarray, logarithmic: bool, x_of: _axis) -> list[str]:
    """Returns the labels of an x axis: round numbers, or its two ends where fewer than two are on the axis."""
    low, high = float(edges[0]), float(edges[-1])
    if logarithmic:
        factors = (1, 2, 5) if high < 100 * low else (1,)
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        values = [factor * 10.0**power for power in powers for factor in factors]
    else:
        values = ticks(low, high, 4)
    values = [value for value in values if low <= value <= high]
    parts = []
    for value in values if len(values) > 1 else (low, high):
        x = x_of(value)
        anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{short(value)}</text>')
    return parts
