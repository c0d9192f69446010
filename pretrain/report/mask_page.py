"""The part of a run's report that shows its loss mask: counts of all samples, and some of them token by token.

What it draws was written by `posttrain.chat.mask_xray`, as JSON. The module imports no torch.
"""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "loss_mask.json"  # in the folder of a fine-tuning run

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--grid);
  border-radius: 8px; padding: 12px; font: 13px/1.6 ui-monospace, monospace; max-height: 26em; overflow-y: auto; }
.tokens { color: var(--soft); }
.tokens b { font-weight: 400; color: var(--ink); background: rgba(23, 147, 106, 0.32); }
.tokens b:nth-of-type(even) { background: rgba(23, 147, 106, 0.18); }
.facts { overflow-wrap: anywhere; }
"""


def visible(text: str) -> str:
    """Returns a text whose control characters are spelled out, so that data cannot control a terminal or a page."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def section(run_dir: Path) -> str:
    """Returns the section as HTML; "" for a run without such a file, and a warning for one that cannot be read."""
    path = run_dir / FILE
    if not path.is_file():
        return ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        body = _table(found["sources"]) + "".join(map(_sample, found["samples"]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"<h2>What is trained</h2><p>Warning: {FILE} cannot be read ({html.escape(str(error))}).</p>"
    said = (
        "Tokens with a loss are on green; the model reads the others and does not learn to write them. A sample is "
        "unstable where a longer dialogue does not begin with the same tokens."
    )
    return f"<h2>What is trained</h2><p>{said}</p>{body}"


def _table(sources: Mapping[str, Any]) -> str:
    head = "".join(f'<th class="n">{name}</th>' for name in ("samples", "tokens", "trained", "share", "unstable"))
    rows = []
    for name, one in sources.items():
        share = f"{one['trained'] / max(1, one['tokens']):.1%}"
        numbers = (*(f"{one[key]:,}" for key in ("samples", "tokens", "trained")), share, f"{one['unstable']:,}")
        cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
        aside = [f"{count} {reason} (first: {first})" for reason, (count, first) in one["set_aside"].items()]
        text = _escaped(", ".join(aside) or "none")
        rows.append(f'<tr><td>{html.escape(name)}</td>{cells}<td class="facts">{text}</td></tr>')
    table = f"<table><tr><th>source</th>{head}<th>set aside</th></tr>{''.join(rows)}</table>"
    return f'<div class="scroll">{table}</div>'


def _sample(sample: Mapping[str, Any]) -> str:
    where = f"{sample['source']}: {sample['location']}"
    left = sample["tokens"] - len(sample["pieces"])
    more = f"<p>{left:,} more tokens</p>" if left else ""
    pieces = (f"<b>{_escaped(text)}</b>" if weight else _escaped(text) for text, weight in sample["pieces"] if text)
    return (
        f'<p class="facts"><strong>{_escaped(where)}</strong><br>{_escaped(sample["facts"])}</p>'
        f'<div class="tokens">{"".join(pieces)}</div>{more}'
    )


def _escaped(text: str) -> str:
    return html.escape(visible(text))
