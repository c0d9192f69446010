"""The documents stage: applies all cuts to the documents that are kept, and holds some of them out."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from configs.loader import plain
from data_pipeline.canaries.plant import FATES
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.ledger import Tally
from data_pipeline.core.run_context import RunContext, read_texts
from data_pipeline.core.shards import TextWriter
from data_pipeline.core.stage import Stage
from data_pipeline.core.tables import shards_of, write_samples
from data_pipeline.documents.write import StageFolders, Survey, WriteSplits, heldout_rules, split_record, surveyed


def documents_stage(
    context: RunContext, extract: Stage, language: Stage, score: Stage, dedup: Stage, cutting: Sequence[Stage]
) -> Stage:
    """Returns the documents stage; `cutting` are the enabled stages after dedup, decontaminate first if it is on."""
    config = context.config
    kept = cutting[0] if cutting and cutting[0].name == "decontaminate" else dedup
    return Stage(
        "documents",
        partial(_documents, context, kept.name, [stage.name for stage in cutting]),
        {"documents": plain(config.documents), "heldout": plain(config.heldout)},
        ("documents.write", "core.shards"),
        needs=(extract, language, score, dedup, *cutting),
        counted_against=kept,
        packages=("datatrove", "orjson", "zstandard"),
    )


def _documents(context: RunContext, kept: str, cutting: Sequence[str], folder: Path, logs: Path) -> Tally:
    """Runs the stage; `kept` is the last stage that sees all documents, `cutting` those with cuts or verdicts."""
    run_dir, config = context.run_dir, context.config
    before = StageFolders(
        kept=str(run_dir / kept),
        judges=tuple(str(run_dir / name) for name in cutting if name != kept),
        cutters=tuple(str(run_dir / name) for name in cutting),
        deduped=str(run_dir / "dedup"),
        scores=str(run_dir / "score"),
        languages=str(run_dir / "language"),
        cut_share_max=config.documents.cut_share_max,
        left_bytes_min=config.documents.left_bytes_min,
    )
    shards, settings = shards_of(before.kept), config.heldout
    survey = Survey(before, shards, settings.seed, str(logs / "survey" / "seen"))
    context.pipeline("documents: survey", logs / "survey", [survey], len(shards), 0)
    found = surveyed(logs / "survey" / "seen")
    chosen = heldout_rules(found, config.sources, settings.share, settings.seed)
    order: dict[str, int] = {}  # shard -> its number among the source's shards that are not empty
    numbers = Counter[str]()
    for seen in found:
        order[seen.shard] = numbers[seen.shard.split("/")[0]]
        numbers[seen.shard.split("/")[0]] += not is_canary(seen.shard)
    tallies = logs / "tallies"
    steps = [
        WriteSplits(before, chosen, str(tallies), order, config.pii if config.pii and config.pii.enabled else None),
        TextWriter(str(folder), "${split}/${source}/${output}", split_record),
    ]
    read_texts(context, "documents", steps, logs, list(order))
    write_samples(folder, (row for seen in found for row in seen.mostly_cut))
    if canaries := [fate for seen in found for fate in seen.canaries]:
        (folder / FATES).write_text("".join(json.dumps(one) + "\n" for one in canaries), encoding="utf-8")
    return Tally.load_all(tallies)
