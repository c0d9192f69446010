"""Results of the demo's stages, as a table on the screen and as one page, runs/demo/report.html.

Reads only the files that stages write (ledger.json, plan.json, baselines.json, metrics.jsonl, trivium_export.json).
Curves are in the stages' own reports, which the page embeds.
"""

import hashlib
import html
import json
import os
import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from configs.files import file_sha256, write_atomic
from pages import page


@dataclass(frozen=True)
class DemoStage:
    """One subprocess of the demo.

    `command` follows `python -m`. `output` is the directory it writes; the file `mark` in it changes if and only if the
    stage did something. `describe(output)` returns what went in and what came out, as texts for the table. `needs` are
    the stages whose results a training stage starts from: training does not notice by itself that one of them was made
    again, so the demo compares their hashes (`made_from`). A stage that notices, such as an export, has none.
    """

    name: str
    title: str
    command: tuple[str, ...]
    output: Path
    mark: str
    describe: Callable[[Path], tuple[str, str]]
    needs: tuple["DemoStage", ...] = ()

    def made_from(self) -> dict[str, str | None]:
        """Hashes, by name, of the stage's config and of the results it starts from; none if it has no `needs`.

        Sections of the config that do not change the result are left out.
        """
        if not self.needs:
            return {}
        hashes = {f"the result of stage {stage.title}": stage.result() for stage in self.needs}
        for config in [Path(word) for word in self.command if word.endswith(".toml")]:
            tree = tomllib.loads(config.read_text(encoding="utf-8"))
            kept = {key: value for key, value in tree.items() if key not in ("checkpoint", "eval", "log", "parallel")}
            hashes[str(config)] = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
        return hashes

    def result(self) -> str | None:
        """Hash of what other stages start from: the newest checkpoint's manifest, or without checkpoints the mark."""
        manifests = list(self.output.glob("checkpoints/step_*/manifest.json"))
        newest = max(manifests, key=lambda path: int(path.parent.name.removeprefix("step_")), default=None)
        return file_sha256(newest) if newest else self.fingerprint()

    def fingerprint(self) -> str | None:
        """Hash of the file `mark`; None before the stage first wrote it."""
        path = self.output / self.mark
        return file_sha256(path) if path.is_file() else None

    @property
    def where_to_look(self) -> Path:
        """Path to open first: the stage's report, or else its directory."""
        report = self.output / "report.html"
        return report if report.is_file() else self.output


@dataclass(frozen=True)
class Specimen:
    """A text that a trained model writes at the demo's end: what `trivium` is called with, and what is typed to it."""

    command: tuple[str, ...]
    typed: str = ""

    def __str__(self) -> str:
        """Shell command that writes the same text again."""
        typed = f"echo {shlex.quote(self.typed)} | " if self.typed else ""
        return typed + shlex.join(["trivium", *self.command])


def describe_data(output: Path) -> tuple[str, str]:
    """Returns (documents read, documents kept with training tokens and rows) of a data run, as texts."""
    stages = {stage["name"]: stage["total"] for stage in _json(output / "ledger.json").get("stages", [])}
    plan = _json(output / "plan" / "plan.json")
    if not stages or not plan:
        return "", ""
    came_in, kept = next(iter(stages.values()))["in"], stages["documents"]["kept"]
    tokens = sum(source["tokens"] for source in plan["sources"])
    return (
        f"{came_in['documents']:,} documents, {came_in['bytes'] / 1e6:.1f} MB",
        f"{kept['documents']:,} documents kept, {tokens / 1e6:.2f}M tokens\n"
        f"{plan['samples']:,} rows of {plan['seq_length']}",
    )


def describe_baselines(output: Path) -> tuple[str, str]:
    """Returns (size of the held-out text, how it was measured) of a baselines stage, as texts."""
    measured = _json(output / "baselines.json")
    size = sum(values["bytes"] for values in measured.get("sources", {}).values())
    titles = ", ".join(measured.get("titles", {}).values())
    return (f"{size / 1e3:.0f} kB of held-out text", f"bits a byte, below: {titles}") if size else ("", "")


def describe_training(output: Path) -> tuple[str, str]:
    """Returns (steps and tokens, first and last loss or reward and held-out results) of a training run, as texts."""
    records = _jsonl(output / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    evals = [record for record in records if "eval" in record]
    if not steps:
        return "", ""
    first, last = steps[0], steps[-1]
    out = [f"loss {first['loss']:.2f} → {last['loss']:.2f}"]
    if "reward" in last:  # of GRPO's loss, only its gradient means anything
        out = [f"reward {first['reward']:.2f} → {last['reward']:.2f}"]
    results, before = evals[-1]["eval"] if evals else {}, evals[0]["eval"] if len(evals) > 1 else {}
    for measure, title in (
        ("bits_per_byte", "held-out bits a byte"),
        ("greedy", "answered right, greedy"),
        ("sampled", "answered right, sampled"),
    ):
        changes = [
            f"{source} "
            + (f"{before[source][measure]:.2f} → " if measure in before.get(source, {}) else "")
            + f"{measures[measure]:.2f}"
            for source, measures in results.items()
            if measure in measures
        ]
        if changes:
            out.append(f"{title}: {', '.join(changes)}")
    return f"{last['step']:,} steps, {last['tokens'] / 1e6:.2f}M tokens", "\n".join(out)


def describe_export(output: Path) -> tuple[str, str]:
    """Returns (checkpoint, results of the comparison with transformers) of an export, as texts."""
    record = _json(output / "trivium_export.json")
    checks = [
        f"{name}: {measured}"
        for name, measured in record.get("checks", {}).items()
        if name.startswith(("logits", "greedy"))
    ]
    checkpoint = record.get("checkpoint")
    return Path(checkpoint).name if checkpoint else "", "\n".join(checks)


def show(stages: Sequence[DemoStage], times: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Prints the table of all stages: a stage's time, what went into it, and what came out."""
    table = Table(title="Trivium demo", title_justify="left", box=SIMPLE, pad_edge=False)
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


def comparison(stages: Sequence[DemoStage]) -> Comparison:
    """Returns the comparison, with a column for each stage that measured one of the sources, and then the baselines."""
    measured = next((_json(stage.output / stage.mark) for stage in stages if stage.name == "baselines"), {})
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
    last = [record["eval"] for record in _jsonl(output / "metrics.jsonl") if "eval" in record][-1:]
    return {name: got["bits_per_byte"] for one in last for name, got in one.items() if "bits_per_byte" in got}


def show_comparison(stages: Sequence[DemoStage], console: Console) -> None:
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


def duration(seconds: float) -> str:
    """Formats seconds for the table: `8.3 s`, or from a minute on `2 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


STYLE = """
body { max-width: 1100px; } table { font-size: 14px; } a { color: inherit; }
pre { white-space: pre-wrap; }
th, td { padding: 6px 18px 6px 0; } td { white-space: pre-line; } td.n { white-space: nowrap; }
summary { cursor: pointer; margin: 14px 0 6px; font-weight: 600; }
iframe { width: 100%; height: 70vh; border: 1px solid var(--grid); border-radius: 8px; }
"""


def write_html(
    stages: Sequence[DemoStage],
    times: Mapping[str, Mapping[str, Any]],
    written: Iterable[tuple[Specimen, str]],
    directory: Path,
) -> Path:
    """Writes `directory`/report.html and returns its path.

    The page holds the tables, the texts that the models wrote, and the stages' own reports.
    """
    rows, frames = [], []
    for stage in stages:
        came_in, out = stage.describe(stage.output)
        link = os.path.relpath(stage.where_to_look, directory)
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in (stage.title, came_in, out))
        rows.append(
            f'<tr>{cells}<td class="n">{duration(times[stage.name]["seconds"])}</td>'
            f'<td><a href="{html.escape(link)}">{html.escape(link)}</a></td></tr>'
        )
        if stage.where_to_look.suffix == ".html":
            frames.append(
                f'<details><summary>{html.escape(stage.title)}</summary><iframe src="{html.escape(link)}" '
                f'loading="lazy" title="{html.escape(stage.title)}"></iframe></details>'
            )
    head = "".join(f"<th>{name}</th>" for name in ("stage", "went in", "came out", "time", "where to look"))
    body = [
        "<h1>Trivium demo</h1>",
        f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>',
        *_comparison_html(comparison(stages)),
        *(f"<pre>$ {html.escape(str(specimen))}\n{html.escape(text)}</pre>" for specimen, text in written),
        *frames,
    ]
    path = directory / "report.html"
    write_atomic(path, page("Trivium demo", body, STYLE).encode())
    return path


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


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _jsonl(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
