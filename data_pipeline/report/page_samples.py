"""Draws samples for the page: dropped documents, and cuts of other documents; random, but the same in every report.

Rows are drawn by hashes of their ids (`provenance.smallest`). Excerpts come from the tables, where they are masked
already; if a table has none, the texts of the few documents drawn are read and masked.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.rules import RuleSet
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.checked_parquet import columns_in, readable
from data_pipeline.core.hashing import stable_hash
from data_pipeline.core.tables import SHOWN, read_table, shards_of
from data_pipeline.cutting.cuts import FOLDER as CUTS
from data_pipeline.provenance.excerpts import excerpt, piece, texts
from data_pipeline.provenance.smallest import Row, Smallest

_EXCERPT = 300  # characters


def columns_of(folder: Path, names: list[str], where: Any = None) -> Iterator[pa.Table]:
    """Yields, for each shard of a stage but canaries, the columns among `names` that its table has."""
    for shard in shards_of(folder) if folder.is_dir() else []:
        if is_canary(shard):
            continue
        path = folder / f"{shard}.parquet"
        present = set(columns_in(path))
        with readable(path):
            table = pq.read_table(path, columns=[name for name in names if name in present], filters=where)
        yield table


def drop_samples(run_dir: Path, stage: str, count: int) -> dict[str, list[Row]]:
    """Returns {reason: up to `count` documents that a stage dropped}, each with an excerpt of its text.

    They are drawn from the tables of all shards or, if the stage has no tables, from its JSONL files of samples.
    """
    folder = run_dir / stage
    drawn: dict[str, Smallest] = {}
    dropped = pc.field("verdict") != ""
    for table in columns_of(folder, ["source", "shard", "row", "id", "bytes", "verdict", "head", "survivor"], dropped):
        for row in table.to_pylist():
            drawn.setdefault(row["verdict"], Smallest(count)).offer(row)
    lines = [] if drawn else sorted([*folder.glob("drops/*.jsonl"), *folder.glob("rejected/*.jsonl")])
    if any("head" not in row for one in drawn.values() for row in one.rows()):
        lines = sorted(folder.glob("drops/*.jsonl"))  # its tables have no excerpts, its samples have
        drawn = {}
    for path in lines:
        with path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                # The extract stage names these files `<source>-<unit>`.
                row.setdefault("source", path.stem.rpartition("-")[0])
                if is_canary(row["source"]):
                    continue
                drawn.setdefault(row.get("verdict") or row["reason"], Smallest(count)).offer(row)
    chosen = {reason: one.rows() for reason, one in drawn.items()}
    for row in (row for rows in chosen.values() for row in rows if "row" in row and not row.keys() & set(SHOWN)):
        ((_, text),) = texts(run_dir, row["shard"], {row["row"]})
        row["head"] = piece(text, 0, _EXCERPT)
    return chosen


def broken_rule(run_dir: Path, row: Row, rules: Mapping[str, RuleSet]) -> str:
    """Describes the score and bound for which a rule dropped a document; returns "" if no rule did.

    `row` is its row in a stage's table; the score is read from the tables of the score or language stage.
    """
    score, _, side = row.get("verdict", "").rpartition("_")
    if side not in ("min", "max") or score not in RuleSet.model_fields or "shard" not in row:
        return ""
    for stage in ("score", "language"):
        path = run_dir / stage / f"{row['shard']}.parquet"
        if path.is_file() and {score, "rules"} <= set(columns_in(path)):
            table = read_table(run_dir / stage, row["shard"], ["row", "rules", score])
            found = table.filter(pc.equal(table["row"], row["row"])).to_pylist()
            bound = rules[found[0]["rules"]].bounds().get(score) if found and found[0]["rules"] in rules else None
            limit = getattr(bound, side, None)
            if limit is not None:
                word = "at least" if side == "min" else "at most"
                return f"{score} is {found[0][score]:.6g}, rules.{found[0]['rules']} requires {word} {limit:g}"
    return ""


def cut_samples(run_dir: Path, stages: Iterable[str], count: int) -> dict[str, list[Row]]:
    """Returns {reason: up to `count` rows of tables of cuts}, each with source, id and `excerpt`.

    First up to `count` cuts for each reason are chosen in each shard, so that one long table does not dominate; only
    the texts of the cuts drawn in the end are read.
    """
    drawn: dict[str, Smallest] = {}
    for stage in stages:
        for shard in shards_of(run_dir / stage / CUTS) if (run_dir / stage / CUTS).is_dir() else []:
            if is_canary(shard):
                continue
            table = read_table(run_dir / stage / CUTS, shard)
            reasons = np.array(table["reason"].to_pylist(), dtype=object)
            random = np.random.default_rng(stable_hash(f"{stage}\0{shard}"))
            for reason in sorted(set(reasons)):
                rows = random.permutation(np.flatnonzero(reasons == reason))[:count]
                for cut in table.take(rows).to_pylist():
                    location = {"source": shard.split("/")[0], "shard": shard, "stage": stage}
                    drawn.setdefault(reason, Smallest(count)).offer(
                        location | cut | {"id": f"{shard}:{cut['row']}:{cut['start']}"}
                    )
    chosen = {reason: one.rows() for reason, one in drawn.items()}
    for shard, cuts in groupby(sorted((cut for rows in chosen.values() for cut in rows), key=_shard), _shard):
        found = list(cuts)
        named = read_table(run_dir / found[0]["stage"], shard)
        ids = dict(zip(named["row"].to_pylist(), named["id"].to_pylist(), strict=True))
        held = dict(texts(run_dir, shard, {cut["row"] for cut in found}))
        for cut in found:
            cut |= {"id": ids[cut["row"]], "excerpt": excerpt(held[cut["row"]], cut)}
    return chosen


def _shard(row: Row) -> str:
    return str(row["shard"])
