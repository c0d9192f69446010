"""Draws a proof as one HTML page that needs neither network nor server: verdicts, and a chart for each layout.

A chart shows the errors of tensors, in the order in which a step computes them, on a logarithmic scale; a line shows
the bounds. So the eye finds where a layout begins to differ.
"""

import html
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pages import LEFT, RIGHT, TOP, grid_line, page
from pretrain.proof.verdict import COLUMNS, RelativeError, Verdict, kind_of

WIDTH, HEIGHT, BOTTOM = 960, 250, 24
LABELLED = 7  # about how many decades of the scale are labelled

STYLE = """
:root { --pass: #12805c; --fail: #c8322b; }
@media (prefers-color-scheme: dark) { :root { --pass: #3cbd8e; --fail: #ff6b5e; } }
.pass { color: var(--pass); font-weight: 600; } .fail { color: var(--fail); font-weight: 700; }
td small { display: block; color: var(--soft); } .first { font-size: 22px; color: var(--ink); margin: 8px 0; }
.first code { color: var(--fail); font-weight: 700; } ul { margin: 4px 0 12px; padding-left: 20px; font-size: 13px; }
svg circle { fill: var(--s0); } svg circle.low { fill: var(--card); stroke: var(--s0); }
svg circle.fail { fill: var(--fail); } svg path.bound { stroke: var(--s1); stroke-dasharray: 5 3; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; font-size: 13px; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def draw(facts: dict[str, Any], verdicts: Sequence[Verdict]) -> str:
    """Returns the page. `facts` are the entries of prove.json other than the layouts."""
    failed = sum(not verdict.passed for verdict in verdicts)
    result = f'<span class="fail">{failed} of {len(verdicts)} layouts FAIL</span>' if failed else "all layouts pass"
    body = [
        f"<h1>Parallel layouts against one rank: {result}</h1>",
        _header(facts),
        _table(verdicts),
        f"<p>Relative errors (Frobenius); in each cell the tensor nearest to its bound. {_text(facts['bounds'])}</p>",
        *(_section(verdict) for verdict in verdicts),
    ]
    return page(f"Trivium proof: {facts['config']}", body, STYLE)


def chart(verdict: Verdict) -> str:
    """Returns one <svg>: errors as dots, bounds as a dashed line, the passes of a step side by side."""
    errors = [error for _, error in verdict.errors]
    # Errors below a thousandth of the smallest bound are as good as zero: they are drawn at the bottom, hollow.
    floor = math.floor(math.log10(min(error.allowed for error in errors))) - 3
    # Bounds of the state may be far above all others, since Adam divides by small gradients; they are cut off.
    bounds = [math.log10(error.allowed) for error in errors if kind_of(error.name) != "state"]
    top = math.ceil(max(*bounds, *(_log(error, floor) for error in errors), floor + 4) + 0.2)

    def x_of(index: float) -> float:
        return LEFT + (index + 0.5) / verdict.num_tensors * (WIDTH - LEFT - RIGHT)

    def y_of(power: float) -> float:
        return HEIGHT - BOTTOM - (power - floor) / (top - floor) * (HEIGHT - TOP - BOTTOM)

    parts = []
    every = math.ceil((top - floor) / LABELLED)
    for power in range(floor, top + 1, every):
        label = "less" if power == floor else f"1e{power}"
        parts.append(grid_line(y_of(power), WIDTH, label))
    for kind, group in groupby(verdict.errors, key=lambda item: kind_of(item[1].name)):
        run = list(group)
        x = x_of(run[0][0] - 0.5)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{HEIGHT - BOTTOM + 15}">{COLUMNS[kind]}</text>')
        line = "L".join(f"{x_of(index):.1f} {y_of(min(top, math.log10(error.allowed))):.1f}" for index, error in run)
        parts.append(f'<path class="bound" d="M{line}"/>')
        for index, error in run:
            css = ' class="fail"' if not error.within else ' class="low"' if error.found < 10**floor else ""
            y = y_of(_log(error, floor))
            note = f"<title>{_text(str(error))}</title>"
            parts.append(f'<circle{css} cx="{x_of(index):.1f}" cy="{y:.1f}" r="3">{note}</circle>')
    label = f"Relative error of each tensor in {verdict.layout}, {verdict.precision}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(label)}">{"".join(parts)}</svg>'


def number(value: float) -> str:
    """Formats a number like 1.7e-15, and zero as 0."""
    return f"{value:.1e}" if value else "0"


def _log(error: RelativeError, floor: int) -> float:
    """Returns the logarithm of the error found; NaN and infinity go to the top of the chart, above the bound."""
    if not math.isfinite(error.found):
        return max(0.0, math.log10(error.allowed) + 2)
    return max(floor, math.log10(error.found)) if error.found else floor


def _section(verdict: Verdict) -> str:
    word = '<span class="pass">pass</span>' if verdict.passed else '<span class="fail">FAIL</span>'
    parts = [f'<h2 id="{_text(_anchor(verdict))}">{_text(verdict.layout)} in {verdict.precision}: {word}</h2>']
    if not verdict.passed:
        parts.append(f'<p class="first">First on the way: <code>{_text(verdict.first or verdict.failed[0])}</code></p>')
        lines = "".join(f"<li>{_text(line)}</li>" for line in verdict.failed)
        more = verdict.num_failed - len(verdict.failed)
        parts.append(
            f"<p>{verdict.num_failed} out of bounds{f', the first {len(verdict.failed)}' if more else ''}:</p>"
        )
        parts.append(f"<ul>{lines}</ul>")
    if verdict.errors:
        left_out = verdict.num_tensors - len(verdict.errors)
        drawn = f"the {len(verdict.errors)} of {verdict.num_tensors} tensors that matter most" if left_out else "all"
        caption = f"Relative error by tensor, in the order of the step ({drawn}); dashed: what rounding allows"
        parts.append(f"<figure><figcaption>{caption}</figcaption>{chart(verdict)}</figure>")
    return "".join(parts)


def _anchor(verdict: Verdict) -> str:
    return f"{verdict.layout}-{verdict.precision}"


def _header(facts: dict[str, Any]) -> str:
    model, batch = facts["model"], facts["batch"]
    moe = f", {model['moe']['num_experts']} experts, {model['moe']['top_k']} a token" if "moe" in model else ""
    rows = {
        "model": f"{facts['config']}: {facts['parameters']:,} parameters, {model['num_layers']} layers, hidden size "
        f"{model['hidden_size']}, {model['num_heads']} heads, vocabulary {model['vocab_size']:,}{moe}",
        "batch": f"{batch['global_batch_size']} rows of {batch['seq_length']} tokens, {batch['micro_batch_size']} a "
        f"micro-batch; seed {facts['seed']}",
        "precision": facts["precision"],
        "on": f"{facts['device']}; " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "date": facts["date"],
    }
    if facts["inject"]:
        rows["planted bug"] = facts["inject"]
    return f"<dl>{''.join(f'<dt>{key}</dt><dd>{_text(value)}</dd>' for key, value in rows.items())}</dl>"


def _table(verdicts: Sequence[Verdict]) -> str:
    head = "".join(f'<th class="n">{title}</th>' for title in COLUMNS.values())
    rows = []
    for verdict in verdicts:
        cells = []
        for column in COLUMNS:
            error = verdict.worst.get(column)  # none if not one such tensor is in both
            css = "n fail" if error and not error.within else "n"
            numbers = f"{number(error.found)}<small>≤ {number(error.allowed)}</small>" if error else ""
            cells.append(f'<td class="{css}" title="{_text(error.name if error else "")}">{numbers}</td>')
        word = '<td class="pass">pass</td>' if verdict.passed else '<td class="fail">FAIL</td>'
        link = f'<a href="#{_text(_anchor(verdict))}">{_text(verdict.layout)}</a>'
        name = f"<td>{link}<small>{verdict.ranks} ranks, {verdict.precision}</small>"
        rows.append(f"<tr>{name}</td>{''.join(cells)}{word}<td class=n>{verdict.seconds:.0f} s</td></tr>")
    return (
        f'<div class="scroll"><table><tr><th>layout</th>{head}<th>verdict</th><th class="n">took</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def _text(value: str) -> str:
    return html.escape(value)
