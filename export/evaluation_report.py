"""Results of `trivium eval`: held-out text by source and language beside its baselines, tables, and the JSON file."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.mixture.rows import Plan
from data_pipeline.report.baselines_file import TITLES, kept
from pretrain.evaluation.heldout_text import Tallies, TextLoss

COUNTS = ("documents", "tokens", "bytes")
MEANS = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits a byte"}


def grouped(tallies: Tallies, plan: Plan) -> dict[str, Any]:
    """Returns the measures of each source, with those of its languages, of each language, and of everything.

    If the data run has current baselines, they stand beside each source.
    """
    baselines = _baselines(plan)
    sources: dict[str, Any] = {}
    for source in plan.sources:
        own = {language: tally for (name, language), tally in tallies.items() if name == source and tally.tokens}
        if own:
            languages = {language: own[language].measures() for language in sorted(own)}
            sources[source] = {**sum(own.values(), TextLoss()).measures(), "languages": languages}
            if source in baselines:
                sources[source]["baselines"] = baselines[source]
    by_language = {
        language: sum((t for (_, name), t in tallies.items() if name == language), TextLoss())
        for language in sorted({language for _, language in tallies})
    }
    return {
        "sources": sources,
        "languages": {name: tally.measures() for name, tally in by_language.items() if tally.tokens},
        "all": sum(tallies.values(), TextLoss()).measures(),
    }


def _baselines(plan: Plan) -> dict[str, dict[str, float]]:
    """Returns the baselines of the data run whose plan it is, of all its held-out text, by source."""
    found = kept(Path(plan.path, plan.description["tokens"]).resolve().parent)
    return {source: {name: values[name] for name in TITLES if name in values} for source, values in found.items()}


def collected(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Returns the result joined with those that the file has of other tasks and held-out text of the same model."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        same = all(before["model"][fact] == result["model"][fact] for fact in ("sha256", "precision"))
    except (OSError, ValueError, KeyError, TypeError):
        return result
    if not same:
        return result
    merged = {**before, **result}
    for part in ("tasks", "groups"):
        if part in before or part in result:
            merged[part] = {**before.get(part, {}), **result.get(part, {})}
    return merged


def show(result: dict[str, Any]) -> None:
    """Prints a result as tables."""
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    if "held_out" in result:
        console.print(_held_out_table(result["held_out"]))
    if "tasks" in result:
        console.print(_task_table(result["tasks"], result["groups"]))


def _held_out_table(found: dict[str, Any]) -> Table:
    """Makes the table: a row for each source and, where there are several, for each of its languages."""
    baselines = [name for name in TITLES if any(name in s.get("baselines", {}) for s in found["sources"].values())]
    table = Table(title="Held-out text", title_justify="left")
    for title in ("source", "language"):
        table.add_column(title)
    for title in (*COUNTS, *MEANS.values(), *(TITLES[name] for name in baselines)):
        table.add_column(title, justify="right")

    def add(source: str, language: str, values: dict[str, Any], beside: dict[str, float]) -> None:
        counts = [f"{values[name]:,}" for name in COUNTS]
        means = [_number(values.get(name)) for name in MEANS]
        table.add_row(source, language, *counts, *means, *(_number(beside.get(name)) for name in baselines))

    for source, values in found["sources"].items():
        several = len(values["languages"]) > 1
        add(source, "" if several else next(iter(values["languages"])), values, values.get("baselines", {}))
        for language, own in values["languages"].items() if several else ():
            add("", language, own, {})
    table.add_section()
    if len(found["languages"]) > 1:
        for language, values in found["languages"].items():
            add("all", language, values, {})
    add("all", "", found["all"], {})
    return table


def _task_table(tasks: dict[str, Any], groups: dict[str, Any]) -> Table:
    table = Table(title="Tasks", title_justify="left")
    for title in ("task", "shots", "documents", "measure", "value"):
        table.add_column(title, justify="left" if title in ("task", "measure") else "right")
    for name, values in tasks.items():
        first = (name, str(values["num_fewshot"]), f"{values['documents']:,}")
        for measure, value in values["measures"].items():
            table.add_row(*first, measure, _number(value))
            first = ("", "", "")
    for name, values in groups.items():
        for measure, value in values["measures"].items():
            table.add_row(f"{name} (group)", "", "", measure, _number(value))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 10_000 else f"{value:.4g}"
