"""Parquet tables about documents: one row per document, one file per shard, `<stage>/<source>/<shard>.parquet`.

Every table begins with the columns source, shard, row, id and bytes, so that it can be read without the texts.
`verdict` is empty for a document that is kept, else the reason why it was dropped. `TableStep` is the datatrove step
that writes a table. Excerpts of texts in tables and samples are masked, so that they show no personal data and no keys.
"""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.checked_parquet import read_parquet
from data_pipeline.core.integrity import seal
from data_pipeline.core.ledger import Tally
from data_pipeline.personal_data.find import mask
from data_pipeline.personal_data.hiding import hide

# Stages that write a table with a verdict for each document, in the order in which they run.
TABLE_STAGES = ("language", "score", "filter", "dedup", "decontaminate", "web_lines", "lines", "substrings", "pii")
KEYS = ("source", "shard", "row", "id", "bytes")
SHOWN = ("head", "sample", "context")  # columns that hold an excerpt of a text
ORIGINS = ("url", "file")  # columns that name where a text comes from
SAMPLES = 5  # dropped documents shown per source and reason


def write_table(folder: str | Path, shard: str, table: pa.Table) -> None:
    """Writes and seals the table of one shard in a stage's folder."""
    path = Path(folder) / f"{shard}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    seal(path)


FileKey = tuple[int, int, int]


def file_key(path: Path) -> FileKey:
    """Cache key of a file (inode, mtime, size); changes when it is replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_table(folder: str | Path, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the table of one shard, all columns or the named ones. Raises DamagedData if it cannot be read."""
    return read_parquet(Path(folder) / f"{shard}.parquet", columns)


def shards_of(folder: str | Path) -> list[str]:
    """Names `<source>/<shard>` of the tables in a stage's folder, sorted, canaries (planted documents) last.

    So the sources' documents are numbered the same with and without canaries.
    """
    folder = Path(folder)
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.parquet"))
    return sorted(found, key=lambda shard: (is_canary(shard), shard))


def kept_rows(table: pa.Table) -> pa.Table:
    """Rows of the documents that a stage kept."""
    return table.filter(pc.equal(table["verdict"], ""))


def count_verdicts(folder: str | Path, tally: Tally) -> None:
    """Adds the documents that a stage's tables keep, and those that they drop by reason, to `tally`."""
    for shard in shards_of(folder):
        table = read_table(folder, shard, ["source", "bytes", "verdict"])
        groups = table.group_by(["source", "verdict"]).aggregate([("bytes", "sum"), ("bytes", "count")])
        for group in groups.to_pylist():
            documents, size = group["bytes_count"], group["bytes_sum"]
            if group["verdict"]:
                tally.dropped(group["source"], group["verdict"], size, documents)
            else:
                tally.kept(group["source"], size, documents=documents)


def write_samples(folder: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes the first 5 of `rows` per source and reason, masked, to `drops/<reason>.jsonl` under `folder`."""
    taken: Counter[tuple[str, str]] = Counter()
    lines: dict[str, list[str]] = {}
    for row in rows:
        key = (row["source"], row["verdict"])
        taken[key] += 1
        if taken[key] <= SAMPLES:
            lines.setdefault(row["verdict"], []).append(json.dumps(masked(row), ensure_ascii=False) + "\n")
    for reason, text in sorted(lines.items()):
        path = Path(folder) / "drops" / f"{reason}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(text), encoding="utf-8")


def masked(row: dict[str, Any]) -> dict[str, Any]:
    """Returns `row` with personal data replaced by placeholders in its excerpts, its URL and its file name."""
    shown = {name: mask(row[name]) for name in SHOWN if isinstance(row.get(name), str)}
    return row | shown | {name: hide(row[name]) for name in ORIGINS if isinstance(row.get(name), str)}


def mask_samples(folder: str | Path) -> None:
    """Masks personal data in the samples that a stage wrote to `drops/` and `rejected/` under `folder`."""
    for path in sorted([*Path(folder).glob("drops/*.jsonl"), *Path(folder).glob("rejected/*.jsonl")]):
        lines = path.with_suffix(".masked")
        with path.open(encoding="utf-8") as samples, lines.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(masked(json.loads(line)), ensure_ascii=False) + "\n" for line in samples)
        lines.replace(path)


def table_samples(folder: str | Path) -> None:
    """Writes samples of the documents that a stage's own tables drop."""
    write_samples(folder, (row for shard in shards_of(folder) for row in dropped_rows(read_table(folder, shard))))


def dropped_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of the documents that a stage dropped, as dicts."""
    return table.filter(pc.not_equal(table["verdict"], "")).to_pylist()


class TableStep(PipelineStep):
    """datatrove step that measures documents and writes one table per shard; it yields no documents.

    If `select`, the folder of an earlier stage, is given, only the documents that this stage kept are measured, and
    `measure` gets each one's row of that stage's table.
    """

    type = "📊 - TABLE"

    def __init__(self, folder: str, tallies: str, select: str = "") -> None:
        super().__init__()
        self.folder = folder
        self.tallies = tallies
        self.select = select

    @abstractmethod
    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        """Returns this stage's columns for one document; `before` is its row in the stage `select`, or empty."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally = Tally()
        for shard, documents in groupby(data, key=lambda document: document.metadata["shard"]):
            selected = self._selected(shard)
            self.open_shard(shard)
            rows = []
            for document in documents:
                metadata = document.metadata
                before = selected.get(metadata["row"]) if self.select else {}
                if before is None:
                    continue
                tally.came_in(metadata["source"], metadata["bytes"])
                with self.track_time():
                    columns = self.measure(document, before)
                location = {"source": metadata["source"], "shard": shard, "row": metadata["row"]}
                row = {**location, "id": document.id, "bytes": metadata["bytes"], "verdict": "", **columns}
                rows.append(masked(row))
            if rows:
                self.write(shard, rows)
        tally.save(Path(self.tallies) / f"in-{rank:05d}.json")
        yield from ()

    def open_shard(self, shard: str) -> None:
        """Prepares for the documents of a shard; called before the first one is measured."""

    def write(self, shard: str, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the rows of one shard as a table in the stage's folder."""
        write_table(self.folder, shard, as_table(rows))

    def _selected(self, shard: str) -> dict[int, dict[str, Any]]:
        """Rows of the stage `select` that it kept, by row number."""
        if not self.select:
            return {}
        return {row["row"]: row for row in kept_rows(read_table(self.select, shard)).to_pylist()}


def as_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Makes a table from rows; values that are numpy arrays become a fixed-size list column of the same type."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if isinstance(values[0], np.ndarray):
            flat = pa.array(np.concatenate(values))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, len(values[0]))
        else:
            columns[name] = pa.array(values)
    return pa.table(columns)
