"""Results of a recipe's stages, as a table on the screen and as one page, report.html in the recipe's folder.

Reads only the files that stages write (ledger.json, plan.json, baselines.json, metrics.jsonl, trivium_export.json).
Curves are in the stages' own reports, which the page embeds.
"""

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from configs.files import write_atomic
from launch.recipe_results import read_json, read_jsonl
from launch.recipe_stages import BASELINES, RecipeStage, Specimen
from launch.recipe_stop import Stop
from pages import duration, page


def show(title: str, stages: Sequence[RecipeStage], times: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Prints the table of all stages: a stage's time, what went into it, and what came out."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("what went in → what came out")
    for stage in stages:
        came_in, out = stage.describe(stage.output)
        table.add_row(stage.title, duration(times[stage.name]["seconds"]), f"{came_in} → {out}")
    table.add_row("all", duration(sum(times[stage.name]["seconds"] for stage in stages)), "")
    console.print(table)


@dataclass(frozen=True)
class Comparison:
    """Bits per byte of each source's held-out text: the trained models' beside those of xz and an n-gram model.

    `rows` are [source, value of each of `columns`]; a value that was not measured is empty.
    """

    columns: list[str]
    rows: list[list[str]]

    title = "Bits per byte of the held-out text (lower is better)"


def comparison(stages: Sequence[RecipeStage]) -> Comparison:
    """Returns the comparison, with a column for each stage that measured one of the sources, and then the baselines."""
    measured = next((read_json(stage.output / stage.mark) for stage in stages if stage.mark == BASELINES), {})
    sources, titles = measured.get("sources", {}), measured.get("titles", {})
    models = {stage.title: _held_out(stage.output) for stage in stages}
    models = {title: found for title, found in models.items() if found.keys() & sources.keys()}
    rows = [
        [
            source,
            *(f"{found[source]:.2f}" if source in found else "" for found in models.values()),
            *(f"{values[name]:.2f}" if name in values else "" for name in titles),
        ]
        for source, values in sources.items()
    ]
    return Comparison([*models, *titles.values()], rows)


def _held_out(output: Path) -> dict[str, float]:
    """Returns the bits per byte of each source at the end of a training run; empty for other stages."""
    last = [record["eval"] for record in read_jsonl(output / "metrics.jsonl") if "eval" in record][-1:]
    return {name: got["bits_per_byte"] for one in last for name, got in one.items() if "bits_per_byte" in got}


def show_comparison(stages: Sequence[RecipeStage], console: Console) -> None:
    """Prints the table of held-out bits per byte, nothing if none were measured."""
    found = comparison(stages)
    if not found.rows:
        return
    table = Table(title=Comparison.title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("source", no_wrap=True)
    for name in found.columns:
        table.add_column(name, justify="right")
    for row in found.rows:
        table.add_row(*row)
    console.print(table)


def show_specimens(specimens: Sequence[Specimen], written: Sequence[str], console: Console) -> None:
    """Prints each specimen's command and, indented below it, the text that the model wrote."""
    for specimen, text in zip(specimens, written, strict=True):
        console.print(f"$ {specimen}", style="dim", highlight=False, markup=False, soft_wrap=True)
        console.print(Padding(Text(text), (0, 0, 1, 2)))


STYLE = """
body { max-width: 1100px; } table { font-size: 14px; } a { color: inherit; }
pre { white-space: pre-wrap; }
th, td { padding: 6px 18px 6px 0; } td { white-space: pre-line; } td.n { white-space: nowrap;
  min-width: 140px; }
summary { cursor: pointer; margin: 14px 0 6px; font-weight: 600; }
p.about { margin: 4px 0 0; max-width: 34ch; font-size: 12px; color: var(--soft); }
iframe { width: 100%; height: 70vh; border: 1px solid var(--grid); border-radius: 8px; }
"""


READING = (
    "An arrow leads from the first value to the last one. Losses are means over the tokens, pairs or examples that are "
    "trained on. What is held out is never trained on; bits a byte are the loss on it for each byte of text. Held-out "
    "problems are answered twice: greedy answers consist of the likeliest tokens, sampled ones of tokens drawn at "
    "random. A mean score is that of all rewards together, and NAME/accuracy the mean of the reward that says whether "
    "an answer to the problems NAME is right."
)


def write_html(
    title: str,
    stages: Sequence[RecipeStage],
    times: Mapping[str, Mapping[str, Any]],
    written: Iterable[tuple[Specimen, str]],
    directory: Path,
    stop: Stop | None = None,
    left: Sequence[RecipeStage] = (),
) -> Path:
    """Writes `directory`/report.html and returns its path.

    The page holds the tables of results, gates and origins, the texts that the models wrote, and the stages' own
    reports. `stop` is why the recipe stopped after `stages`, and `left` the stages that did not run.
    """
    rows, frames = [], []
    whole, begun = sum(times[stage.name]["seconds"] for stage in stages) or 1.0, 0.0
    for stage in stages:
        seconds = times[stage.name]["seconds"]
        came_in, out = stage.describe(stage.output)
        link = os.path.relpath(stage.where_to_look, directory)
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in (came_in, out))
        rows.append(
            f'<tr><td>{_named(stage)}</td>{cells}<td class="n">{duration(seconds)}<div class="share" '
            f'style="margin-left: {100 * begun / whole:.1f}%; width: {100 * seconds / whole:.1f}%"></div></td>'
            f'<td><a href="{html.escape(link)}">{html.escape(link)}</a></td></tr>'
        )
        begun += seconds
        if stage.where_to_look.suffix == ".html":
            frames.append(
                f'<details><summary>{html.escape(stage.title)}</summary><iframe src="{html.escape(link)}" '
                f'loading="lazy" title="{html.escape(stage.title)}"></iframe></details>'
            )
    if stop and stop.stage:
        link = html.escape(os.path.relpath(stop.log, directory))
        cells = f'<td></td><td>{stop.how}</td><td></td><td><a href="{link}">{link}</a></td>'
        rows.append(f"<tr><td>{_named(stop.stage)}</td>{cells}</tr>")
    rows += [f"<tr><td>{_named(stage)}</td><td></td><td>did not run</td><td></td><td></td></tr>" for stage in left]
    head = "".join(f"<th>{name}</th>" for name in ("stage", "went in", "came out", "time", "where to look"))
    body = [
        f"<h1>{html.escape(title)}</h1>",
        *([f"<p><b>{html.escape(stop.what)}</b></p><p>{html.escape(stop.remedy)}</p>"] if stop else []),
        f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>',
        f"<p>{READING}</p>",
        *_gates_html(stages),
        *_comparison_html(comparison(stages)),
        *(f"<pre>$ {html.escape(str(specimen))}\n{html.escape(text)}</pre>" for specimen, text in written),
        *_origins_html(stages, times),
        *frames,
    ]
    path = directory / "report.html"
    write_atomic(path, page(title, body, STYLE).encode())
    return path


def _named(stage: RecipeStage) -> str:
    """Returns a stage's title, and what it is for, as HTML."""
    return html.escape(stage.title) + (f"<p class=about>{html.escape(stage.about)}</p>" if stage.about else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of texts as HTML."""
    cells = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows)
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{names}</tr>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def _gates_html(stages: Sequence[RecipeStage]) -> list[str]:
    """Returns the table of the gates and its heading, as HTML; an empty list if no stage has one."""
    rows = [
        [stage.title, gate.metric, gate.shown(value), str(gate), "passed" if gate.passes(value) else "missed"]
        for stage in stages
        for gate, value in stage.measured_gates()
    ]
    if not rows:
        return []
    return [
        "<h2>Gates: bounds that a stage has to reach before the next one begins</h2>",
        _table(("stage", "measure, on held-out problems unless it is a loss", "value", "bound", ""), rows),
    ]


def _origins_html(stages: Sequence[RecipeStage], times: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the table of what each result was made from, as HTML; an empty list if the record has nothing of it."""
    rows = []
    for stage in stages:
        made_from = {name: value for name, value in times[stage.name].get("made_from", {}).items()}
        origins = [
            f"{name.removeprefix('the ')}: {value[:12]}"
            for name, value in made_from.items()
            if value and not name.startswith("the override of ")
        ]
        if origins:
            rows.append([stage.title, "\n".join(origins), str(times[stage.name].get("result") or "")[:12]])
    if not rows:
        return []
    return [
        "<h2>What each result was made from</h2>",
        "<p>The first digits of SHA-256: of a checkpoint's manifest, which has the hashes of its weights, or of a file."
        " recipe.json has them whole, and the overrides of every config.</p>",
        _table(("stage", "made from", "result"), rows),
    ]


def _comparison_html(found: Comparison) -> list[str]:
    """Returns the table of held-out bits per byte and its heading, as HTML; an empty list if none were measured."""
    if not found.rows:
        return []
    head = "".join(f'<th class="n">{html.escape(name)}</th>' for name in found.columns)
    rows = "".join(
        f"<tr><td>{html.escape(row[0])}</td>{''.join(f'<td class=n>{value}</td>' for value in row[1:])}</tr>"
        for row in found.rows
    )
    return [
        f"<h2>{Comparison.title}</h2>",
        f'<div class="scroll"><table><tr><th>source</th>{head}</tr>{rows}</table></div>',
        "<p>All columns are about the same held-out text. The trained models read it in rows and see nothing before "
        "the row. The n-gram model, and xz after training text, have read the source's whole training text; the "
        "trained models have read as much of it as their time allows.</p>",
    ]
