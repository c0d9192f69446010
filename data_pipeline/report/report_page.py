"""The HTML page of a data run, `report.html` in its directory: what came in, what was dropped and why, what is left.

Numbers come from the ledger or are counted from the run's tables and plan. The page needs neither network nor server.
Text from documents is masked and escaped. For single documents see `trivium data explain`, for other thresholds
`trivium data what-if`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from configs.data import DataConfig
from configs.files import write_atomic
from data_pipeline.mixture.rows import Plan, open_plans
from data_pipeline.report import measures
from data_pipeline.report.drops import drops, sample, text_of
from data_pipeline.report.figures import Flow, bar, flow, flow_list, histogram, sizes
from pages import page, short

_CLUSTERS, _MEMBERS, _LANGUAGES = 8, 4, 20

STYLE = """
:root { --out: #c8322b; } @media (prefers-color-scheme: dark) { :root { --out: #ff6b5e; } }
svg rect.bar { fill: var(--s0); } svg path.band { fill: var(--s0); stroke: none; opacity: 0.25; }
svg path.lost { stroke: var(--out); stroke-linecap: butt; opacity: 0.7; } svg text.name { fill: var(--ink);
  font-weight: 600; } svg .bars { fill: var(--s0); stroke: none; } svg .out { fill: var(--out); }
svg line.bound { stroke: var(--s1); stroke-width: 1.5; stroke-dasharray: 4 2; } svg.cell { width: 120px;
  display: inline-block; vertical-align: middle; margin-right: 8px; }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); }
.charts.small figcaption { font-size: 12px; } .wide { margin: 12px 0; overflow-x: auto; }
.alarms { border: 2px solid var(--out); border-radius: 8px; padding: 8px 16px; margin: 12px 0; }
del { color: var(--out); } .missed { color: var(--out); }
.alarms li { margin: 4px 0; } summary { cursor: pointer; padding: 4px 0; } .sample { margin: 6px 0 10px 16px;
  font-size: 12px; } .sample code { color: var(--soft); overflow-wrap: anywhere; } .sample pre { margin: 2px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.narrow { display: none; margin: 12px 0; } .narrow ol { list-style: none; margin: 0; padding: 0; font-size: 13px; }
.narrow li { margin: 8px 0; } .narrow i { display: block; height: 8px; background: var(--s0); min-width: 1px; }
.narrow .lost { color: var(--out); overflow-wrap: anywhere; }
@media (max-width: 760px) { .wide { display: none; } .narrow { display: block; } summary svg.cell { width: 50px; }
  summary { overflow-wrap: anywhere; } .sample { margin-left: 4px; }
  th, td { padding-right: 8px; white-space: nowrap; } }
"""


def write(config: DataConfig, run_dir: Path, ledger: dict[str, Any]) -> Path:
    """Writes the page and returns its path; a run that is only partly done gets the sections of its finished stages.

    `config` is the config of that run. Raises OSError if tables are missing or cannot be read, and ValueError for a
    damaged plan.
    """
    stages = {stage["name"]: stage for stage in ledger["stages"]}
    chain = chain_of(stages)
    body = [
        f"<h1>Data run {text_of(run_dir)}</h1>",
        f"<p>{text_of(summary(chain))}</p>",
        _alarms(ledger["alarms"]),
        *_flows(chain),
        _stages(ledger["stages"]),
        _canaries(ledger["canaries"]),
        drops(run_dir, ledger["stages"], config.rules),
        *(_documents(measures.documents(run_dir, last_judge(chain))) if "language" in stages else []),
        *(_duplicates(*measures.clusters(run_dir, _CLUSTERS, _MEMBERS)) if "dedup" in stages else []),
        *(_scores(measures.scores(run_dir, config.rules)) if "filter" in stages else []),
        *(_mixture(stages, open_plans(run_dir / "plan")) if "plan" in stages else []),
        _config(run_dir),
    ]
    path = run_dir / "report.html"
    write_atomic(path, page(f"{run_dir.name}: Trivium data run", body, STYLE).encode("utf-8", "replace"))
    return path


def chain_of(stages: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the stages that documents pass one after another, without those that only read them on the side."""
    chain: list[dict[str, Any]] = []
    name: str | None = list(stages)[-1]
    while name is not None:
        chain.insert(0, stages[name])
        name = stages[name]["after"]
    return chain


def last_judge(chain: Sequence[dict[str, Any]]) -> str:
    """Returns the name of the last stage before documents, whose tables say which documents are kept."""
    names = [stage["name"] for stage in chain]
    return names[names.index("documents") - 1] if "documents" in names else names[-1]


def summary(chain: Sequence[dict[str, Any]]) -> str:
    """Returns a sentence on the documents and bytes that came in and what is left of them."""
    first, last = chain[0]["total"]["in"], chain[-1]["total"]["passed_on"]
    tokens = sum(stage["total"]["notes"].get("tokens", 0) for stage in chain)
    return (
        f"{first['documents']:,} documents and {first['bytes']:,} bytes came in; {last['documents']:,} documents, "
        f"{last['bytes']:,} bytes of text and {tokens:,} tokens are in the plan."
    )


def _alarms(alarms: Sequence[str]) -> str:
    """Returns a box with the alarms, "" if there are none."""
    if not alarms:
        return ""
    items = "".join(f"<li>{text_of(alarm)}</li>" for alarm in alarms)
    word = "1 alarm" if len(alarms) == 1 else f"{len(alarms)} alarms"
    return f'<div class="alarms"><strong>{word}</strong><ul>{items}</ul></div>'


def _canaries(canaries: Sequence[Mapping[str, Any]]) -> str:
    """Returns the section on canaries, "" if there are none."""
    if not canaries:
        return ""
    rows = [
        [
            one["name"],
            one["source"],
            one["reason"],
            ", ".join(one["texts"].values()),
            "as expected" if one["caught"] else Html('<b class="missed">missed</b>'),
        ]
        for one in canaries
    ]
    caught = sum(one["caught"] for one in canaries)
    return (
        f"<h2>Canaries</h2><p>Documents that the run planted in its own input; {caught} of {len(canaries)} met the "
        "fate that the config expects. No other number on this page counts them.</p>"
        + table(["canary", "source", "expected fate", "fate of its texts", ""], rows, numeric=())
    )


def _flows(chain: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the flow charts of documents and of bytes, each for wide and for narrow screens."""
    drawn = []
    for unit in ("documents", "bytes"):
        stages = []
        for stage in chain:
            total = stage["total"]
            lost = sorted(total["dropped"].items(), key=lambda item: -item[1][unit])
            reasons = ", ".join(f"{reason} {amount[unit]:,}" for reason, amount in lost[:5] if amount[unit])
            dropped = sum(amount[unit] for _, amount in lost)
            stages.append(Flow(stage["name"], total["in"][unit], dropped, total["passed_on"][unit], reasons))
        title = f"{unit.capitalize()} from stage to stage"
        drawn.append(f'<div class="wide">{flow(title, stages)}</div>')
        drawn.append(f'<div class="narrow">{flow_list(title, stages)}</div>')
    return [
        *drawn,
        "<p>A band that narrows without a drop shows rewritten text: main text of HTML, or repaired text.</p>",
    ]


def _stages(stages: Sequence[dict[str, Any]]) -> str:
    """Returns the table of stages."""
    rows = []
    for stage in stages:
        total = stage["total"]
        lost = [sum(amount[unit] for amount in total["dropped"].values()) for unit in ("documents", "bytes")]
        numbers = [total["in"]["documents"], total["kept"]["documents"], lost[0]]
        numbers += [total["in"]["bytes"], total["kept"]["bytes"], lost[1], total["passed_on"]["bytes"]]
        notes = ", ".join(f"{name}: {count:,}" for name, count in total["notes"].items())
        rows.append([stage["name"], *numbers, f"{stage['seconds']:.1f}", notes])
    heads = ["stage", "in", "kept", "dropped", "bytes in", "bytes kept", "bytes dropped", "bytes passed on"]
    return "<h2>Stages</h2>" + table([*heads, "seconds", "notes"], rows, numeric=range(1, 9))


def _documents(found: measures.DocumentCounts) -> list[str]:
    """Returns the sections on languages and on sizes of documents."""
    most = max((counts[0] for counts in found.languages.values()), default=1)
    ranked = sorted(found.languages.items(), key=lambda item: (-item[1][0], item[0]))
    rows = [[name, *counts, Html(bar(counts[0] / most))] for name, counts in ranked[:_LANGUAGES]]
    if rest := ranked[_LANGUAGES:]:
        counts = [sum(counts[index] for _, counts in rest) for index in range(3)]
        rows.append([f"{len(rest)} others", *counts, Html(bar(counts[0] / most))])
    charts = [
        sizes(name, measures.SIZE_EDGES, before, found.after.get(name, 0 * before))
        for name, before in sorted(found.before.items())
    ]
    return [
        "<h2>Languages</h2><p>The identified languages of all documents that the extract stage published.</p>",
        table(["language", "documents", "bytes", "kept by its stage", ""], rows, numeric=(1, 2, 3)),
        "<h2>Sizes of documents</h2><p>Bytes of text; kept documents in blue, dropped ones on top of them.</p>",
        f'<div class="charts small">{"".join(charts)}</div>',
    ]


def _duplicates(largest: Sequence[measures.ShownCluster], by_size: Mapping[int, int]) -> list[str]:
    """Returns the section on clusters of duplicates; empty if there are none."""
    if not largest:
        return []
    copies = sum((size - 1) * count for size, count in by_size.items())
    parts = [
        "<h2>Duplicates</h2>",
        f"<p>{sum(by_size.values()):,} clusters of duplicates hold {copies:,} documents beyond one each. "
        f"By size: {', '.join(f'{count:,} of {size:,}' for size, count in list(by_size.items())[:12])}"
        f"{' ...' if len(by_size) > 12 else ''}. The largest:</p>",
    ]
    for cluster in largest:
        shown = "".join(map(sample, cluster.members.rows()))
        parts.append(
            f"<details><summary>cluster {cluster.number}: {cluster.size:,} documents</summary>{shown}</details>"
        )
    return parts


def _scores(drawn: Sequence[measures.ScoreHistogram]) -> list[str]:
    """Returns the histograms of each rule set, those of broken rules unfolded."""
    parts = [
        "<h2>Scores and thresholds</h2><p>For each rule set, documents by score; heights are logarithmic. Red is "
        "outside the bound, the dashed line. A document is dropped for the first rule that it breaks, so the "
        "numbers of rules add up to more than the drops.</p>"
    ]
    for rules, group in groupby(drawn, key=lambda one: one.rules):
        charts: dict[bool, list[str]] = {True: [], False: []}
        for one in group:
            charts[bool(one.outside.any())].append(histogram(one))
        for broken, figures in charts.items():
            if figures:
                said = "broken by some" if broken else "broken by none"
                parts.append(
                    f"<details{' open' if broken else ''}><summary><b>{text_of(rules)}</b>, {len(figures)} rules {said}"
                    f'</summary><div class="charts small">{"".join(figures)}</div></details>'
                )
    return parts if drawn else []


def _mixture(stages: Mapping[str, dict[str, Any]], plans: Mapping[str, Plan]) -> list[str]:
    """Returns a table of the sources' tokens and rows, and a table of shares for each plan."""
    tokens, planned = stages["tokens"], stages["plan"]
    trained = Counter[str]()
    for plan in plans.values():
        trained.update({source["name"]: source["trained_tokens"] for source in plan.description["sources"]})
    all_rows = planned["total"]["notes"].get("rows", 0) or 1
    rows = []
    for name, counts in [*sorted(tokens["sources"].items()), ("all", tokens["total"])]:
        mine = planned["total"] if name == "all" else planned["sources"][name]
        taken, held = mine["notes"].get("rows", 0), counts["notes"].get("tokens", 0)
        rows.append(
            [
                name,
                counts["kept"]["documents"],
                counts["kept"]["bytes"],
                held,
                f"{counts['kept']['bytes'] / held:.3f}" if held else "",
                taken,
                f"{taken / all_rows:.2%}",
                trained.get(name, ""),
                Html(bar(taken / all_rows)),
            ]
        )
    heads = ["source", "documents", "bytes", "tokens", "bytes per token", "rows", "share of rows", "tokens trained", ""]
    parts = ["<h2>Tokens and mixture</h2>", table(heads, rows, numeric=range(1, 8))]
    for name, plan in plans.items():
        facts = plan.description
        parts.append(
            f"<h3>{text_of(name or 'plan')}</h3><p>{facts['samples']:,} rows of {facts['seq_length']:,} tokens, packed "
            f"by {facts['packing']}, {facts['padding_share']:.2%} of them padding"
            + (f"; after {plan.first_sample:,} rows of earlier stages" if plan.first_sample else "")
            + "</p>"
        )
        rows = [_share(source, facts["samples"]) for source in facts["sources"]]
        parts.append(table(_SHARES, rows, numeric=range(1, 7)))
    return parts


_SHARES = ["source", "rows", "share of rows", "epochs before", "epochs", "cap", "epochs end at", ""]


def _share(source: Mapping[str, Any], samples: int) -> list[Any]:
    """Returns a source's row in the table of a plan's shares."""
    forecast = source["forecast"]
    ends = ", ".join(f"{end['epoch']}: {end['fraction']:.1%}" for end in forecast["epoch_ends"])
    share = source["samples"] / samples
    numbers = [short(forecast["begun"]), short(source["epochs"]), short(forecast["max_epochs"])]
    return [source["name"], source["samples"], f"{share:.2%}", *numbers, ends or "not within it", Html(bar(share))]


def _config(run_dir: Path) -> str:
    """Returns the section with the run's config."""
    text = text_of((run_dir / "config.toml").read_text(encoding="utf-8", errors="backslashreplace"))
    return f"<h2>Config</h2><details><summary>config.toml, resolved</summary><pre>{text}</pre></details>"


class Html(str):
    """A string that is HTML already and is not escaped."""


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], numeric: Sequence[int]) -> str:
    """Returns an HTML table; cells are text, whole numbers or Html, and the columns `numeric` are aligned right."""

    def cell(tag: str, column: int, value: Any) -> str:
        said = value if isinstance(value, Html) else text_of(f"{value:,}" if isinstance(value, int) else value)
        return f'<{tag} class="n">{said}</{tag}>' if column in numeric else f"<{tag}>{said}</{tag}>"

    lines = [("th", heads), *(("td", row) for row in rows)]
    body = "".join(f"<tr>{''.join(cell(tag, at, one) for at, one in enumerate(row))}</tr>" for tag, row in lines)
    return f'<div class="scroll"><table>{body}</table></div>'
