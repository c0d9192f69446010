"""`trivium data explain CONFIG --id ID [--run RUN]`: prints everything that happened to one document, stage by stage.

It shows where the document comes from, each score beside its bound, the rule that dropped it or the duplicate that was
kept in its place, the rows of the plan that contain it and, given a training run, the steps that trained on it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.cli import entrypoint, parse_args
from configs.data import DataConfig
from configs.loader import ConfigError
from configs.rules import RuleSet
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.shards import TRAIN
from data_pipeline.core.stage import has_finished
from data_pipeline.provenance.lookup import (
    StoredDocument,
    data_spans,
    given,
    locations,
    plans,
    rows_of,
    set_aside,
    stages_of,
    steps,
    stored,
    uses,
)
from data_pipeline.reading.ids import published_id

_SHOWN = 8  # rows of the plan, steps, or ids, that are listed at most


def explain(config: DataConfig, document: str, run: Path | None) -> list[str]:
    """Returns the lines to print; raises ConfigError for an id of no document, or one that several records share."""
    run_dir = Path(config.run.dir)
    stages = stages_of(run_dir)
    document = published_id(document)
    lines: list[str] = []
    for record in set_aside(run_dir, {document}):
        lines += [document, f"  extract    set aside: {record['reason']}, at {record['file']}:{record['position']}"]
    found = locations(run_dir, {document})
    if not found and not lines:
        if alike := given(run_dir, document):
            more = f", and {len(alike) - _SHOWN} more" if len(alike) > _SHOWN else ""
            raise ConfigError(
                f"--id {document!r} is the id of {len(alike)} records, whose documents have their locations added to "
                f"it; name one of them: {', '.join(map(repr, alike[:_SHOWN]))}{more}"
            )
        raise ConfigError(
            f"--id {document!r} is not a document of {run_dir}; give a record's own id, or SOURCE/FILE/POSITION of "
            "one that has none"
        )
    stores = stored(run_dir, {document}) if has_finished(run_dir, "tokens") else []
    for location in found:
        lines += [document, f"  extract    source {location.source}, shard {location.shard}, row {location.row}"]
        for stage in stages:
            row = rows_of(run_dir, stage, location)
            if row is None:
                break
            lines += _stage_lines(stage, row, config.rules)
        lines += _training_lines(run_dir, [one for one in stores if one.source == location.source], run)
    return lines


def _stage_lines(stage: str, row: dict[str, Any], rules: dict[str, RuleSet]) -> list[str]:
    """Returns the lines that describe a document's row in a stage's table."""
    verdict = f"dropped: {row['verdict']}" if row["verdict"] else "kept"
    if stage == "language":
        parts = f"; paragraphs in {row['languages']}" if row.get("languages") else ""
        said = f"{row['language']}, {row['language_score']:.3f}{parts}; rules {row['rules'] or '-'}"
        return [f"  language   {said}; {verdict}"]
    if stage == "score":
        return ["  score", *_score_lines(row, rules.get(row["rules"]))]
    if stage == "dedup":
        size = row["cluster_size"]
        cluster = f"cluster {row['cluster']} of {size} documents" if size > 1 else "alone in its cluster"
        whose = " of an earlier run" if row["verdict"] == "in_index" else ""
        lost = f"; {row['survivor']}{whose} is kept in its place" if row["verdict"] and row["survivor"] else ""
        return [f"  dedup      {cluster}; {verdict}{lost}"]
    cuts = f"; {row['cuts']} cuts, {row['cut_bytes']:,} bytes" if row.get("cuts") else ""
    return [f"  {stage:<10} {verdict}{cuts}"]


def _score_lines(row: dict[str, Any], rules: RuleSet | None) -> list[str]:
    """Returns a line for each score, with its bound in the rule set, if any, and a mark if it is broken."""
    lines = []
    bounds = rules.bounds() if rules else {}
    for name in RuleSet.model_fields:
        value, bound = row.get(name), bounds.get(name)
        if not isinstance(value, float):
            continue
        said = ""
        if bound is not None:
            limits = [f"at least {bound.min:g}"] if bound.min is not None else []
            limits += [f"at most {bound.max:g}"] if bound.max is not None else []
            outside = (bound.min is not None and value < bound.min) or (bound.max is not None and value > bound.max)
            said = f"{' and '.join(limits)}{'   <- broken' if outside else ''}"
        lines.append(f"    {name:<22} {value:<12.5g} {said}".rstrip())
    return lines


def _training_lines(run_dir: Path, documents: Sequence[StoredDocument], run: Path | None) -> list[str]:
    """Returns lines that say where a document is in token stores and plans, and which steps of a run trained on it."""
    if not documents:
        return []
    lines = [
        f"  tokens     {one.split}/{one.source}/{one.store}, document {one.document}: {one.tokens:,} tokens, from "
        f"{one.origin[0]}:{one.origin[1]}"
        for one in documents
    ]
    if not has_finished(run_dir, "plan"):
        return lines
    trained_on = data_spans(run) if run else []
    for name, plan in plans(run_dir, trained_on).items():
        for one, segments in uses(plan, documents).items():
            if one.split != TRAIN:
                lines.append(f"  {name:<10} held out: in no training row")
                continue
            samples = sorted({sample for sample, _, _ in segments})
            shown = ", ".join(
                f"{sample} (tokens {start} to {start + length})" for sample, start, length in segments[:_SHOWN]
            )
            more = f" and {len(segments) - _SHOWN} more" if len(segments) > _SHOWN else ""
            lines.append(f"  {name:<10} {len(segments)} pieces in {len(samples)} rows: {shown}{more}")
            if run is not None:
                seen = steps(trained_on, plan, samples)
                shown = ", ".join(str(step) for step in seen[:_SHOWN]) + (" ..." if len(seen) > _SHOWN else "")
                lines.append(f"  steps      {len(seen)} of {run}: {shown}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    config, args = parse_args(
        DataConfig,
        argv,
        prog="trivium data explain",
        description="Prints what happened to one document, from its file to the training steps that saw it.",
        example="trivium data explain configs/data/demo.toml --id sotu/1847_james_polk_d --run runs/demo/pretrain",
        options=[("--id", "", "id of the document"), ("--run", "", "directory of a training run, to list its steps")],
    )
    if not args.id:
        raise ConfigError("trivium data explain needs --id, the document to explain")
    try:
        lines = explain(config, args.id, Path(args.run) if args.run else None)
    except ConfigError:
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console: Console = wide_console()
    for line in lines:
        say(line, console)
    return 0


if __name__ == "__main__":
    entrypoint(main)
