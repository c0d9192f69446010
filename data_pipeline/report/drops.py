"""The page's section on drops and cuts, stage by stage and reason by reason, each with samples.

The numbers are those of the ledger. All text is masked and escaped.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.alarms import WATCHED
from configs.rules import RuleSet
from data_pipeline.personal_data.find import mask
from data_pipeline.provenance.excerpts import Excerpt
from data_pipeline.report import page_samples as samples
from data_pipeline.report.figures import bar

_SAMPLES = 4  # documents or cuts shown for each reason
_EXCERPT = 300  # characters
_BLANK_LINES = re.compile(r"\n\s*\n")


def drops(run_dir: Path, stages: Sequence[dict[str, Any]], rules: Mapping[str, RuleSet]) -> str:
    """Returns the page's section on drops as HTML, "" if nothing was dropped; `rules` are the rule sets by name."""
    parts = [
        "<h2>Why documents were dropped</h2><p>For each reason: documents, their share of what came into the stage, "
        "and bytes. For parts cut out of documents: bytes; in the samples, cut text is struck through and its "
        "replacement underlined. Open a reason for a random sample.</p>"
    ]
    for stage in stages:
        dropped = stage["total"]["dropped"]
        if not dropped or stage["name"] not in WATCHED:
            continue
        came_in = stage["total"]["in"]["documents"]
        drawn = samples.drop_samples(run_dir, stage["name"], _SAMPLES)
        for row in (row for rows in drawn.values() for row in rows):
            row["broke"] = samples.broken_rule(run_dir, row, rules)
        parts.append(f"<h3>{text_of(stage['name'])}</h3>")
        whole = {reason: amount for reason, amount in dropped.items() if amount["documents"]}
        most = max((amount["documents"] for amount in whole.values()), default=1)
        for reason, amount in sorted(whole.items(), key=lambda item: (-item[1]["documents"], -item[1]["bytes"])):
            said = f"{amount['documents']:,} ({amount['documents'] / came_in:.2%}), {amount['bytes']:,} bytes"
            parts.append(_reason(reason, amount["documents"] / most, said, drawn.get(reason, [])))
        parts += _cuts(run_dir, stages, {reason: dropped[reason] for reason in dropped.keys() - whole.keys()})
    return "".join(parts) if len(parts) > 1 else ""


def _cuts(run_dir: Path, stages: Sequence[dict[str, Any]], cut: Mapping[str, dict[str, int]]) -> list[str]:
    """Returns the reasons for which text was cut out of documents, by bytes; the documents stage counts them."""
    if not cut:
        return []
    drawn = samples.cut_samples(run_dir, [stage["name"] for stage in stages], _SAMPLES)
    notes = {name: count for stage in stages for name, count in stage["total"]["notes"].items()}
    most = max(amount["bytes"] for amount in cut.values()) or 1
    parts = []
    for reason, amount in sorted(cut.items(), key=lambda item: (-item[1]["bytes"], item[0])):
        said = (
            f"{amount['bytes']:,} bytes out of documents; {notes.get(f'{reason} cuts', 0):,} cuts found in "
            f"{notes.get(f'{reason} in documents', 0):,} documents"
        )
        parts.append(_reason(reason, amount["bytes"] / most, said, drawn.get(reason, [])))
    return parts


def _reason(reason: str, share: float, said: str, drawn: Sequence[Mapping[str, Any]]) -> str:
    """Returns one reason as HTML: a bar with `share` of the full length, the numbers, and samples to unfold."""
    shown = "".join(map(sample, drawn)) or "<p>no sample is kept</p>"
    return f"<details><summary>{bar(share)}<b>{text_of(reason)}</b> {said}</summary>{shown}</details>"


def sample(row: Mapping[str, Any]) -> str:
    """Returns one document as HTML: source, id, facts, and the beginning of its text or a cut."""
    text = _BLANK_LINES.sub("\n", row.get("head") or row.get("sample") or row.get("context") or "")
    shown = _cut(row["excerpt"]) if "excerpt" in row else text_of(mask(text[:_EXCERPT]))
    facts = [f"{row['bytes']:,} bytes"] if "bytes" in row else []
    facts += [row["broke"]] if row.get("broke") else []
    facts += [f"{row['survivor']} is kept instead"] if row.get("survivor") and row["verdict"] else []
    facts += [f"{size:,} of them for {reason}" for reason, size in row.get("cut_bytes", {}).items()]
    return (
        f'<div class="sample"><code>{text_of(row["source"])} {text_of(row["id"])}</code> {text_of(", ".join(facts))}'
        f"<pre>{shown}</pre></div>"
    )


def _cut(one: Excerpt) -> str:
    """Returns a cut as HTML: cut text struck through, its replacement underlined."""
    marked = "".join(
        f"<{tag}>{text_of(part)}</{tag}>" for tag, part in (("del", one.removed), ("ins", one.replacement)) if part
    )
    return f"{text_of(one.before)}{marked}{text_of(one.after)}"


def text_of(value: Any) -> str:
    """Returns a value as text with HTML escapes."""
    return html.escape(str(value))
