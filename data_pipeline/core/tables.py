"""Parquet tables beside the text: a row per document, a file per shard, `<stage>/<source>/<shard>.parquet`.

Every table starts with source, shard, row, id and bytes, so that it can be read without the text. `verdict`
is empty for a document that goes on, else the reason why it was dropped. `TableStep` is the datatrove step
that fills one. Pieces of text in tables and samples are masked: no personal data and no key in them.
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

from data_pipeline.canaries.naming import is_canary
from data_pipeline.core.checked_parquet import read_parquet
from data_pipeline.core.integrity import seal
from data_pipeline.core.ledger import Tally
from data_pipeline.personal_data.find import mask
from data_pipeline.personal_data.hiding import hide

KEYS = ("source", "shard", "row", "id", "bytes")
SHOWN = ("head", "sample", "context")  # columns that hold a piece of a text
ORIGINS = ("url", "file")  # and what says where it is from
SAMPLES = 5


def write_table(folder: str | Path, shard: str, table: pa.Table) -> None:
    path = Path(folder) / f"{shard}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    seal(path)


Mark = tuple[int, int, int]


def mark(path: Path) -> Mark:
    """What changes when a file of this name is another one: for what is kept of files that have been read."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_table(folder: str | Path, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All columns, or those."""
    return read_parquet(Path(folder) / f"{shard}.parquet", columns)


def shards_of(folder: str | Path) -> list[str]:
    """Names `<source>/<shard>` of the tables in a stage's folder, sorted; those of canaries last, so that documents
    of the sources have the same numbers with and without.
    """
    folder = Path(folder)
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.parquet"))
    return sorted(found, key=lambda shard: (is_canary(shard), shard))


def kept_rows(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["verdict"], ""))


def count_verdicts(folder: str | Path, tally: Tally) -> None:
    """Adds what a stage's tables keep and drop to `tally`."""
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
    """`drops/<reason>.jsonl` under `folder`: the first few of `rows` per source and reason, in the given
    order.
    """
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
    """`row` without personal data in its pieces of text, its address and its file's name."""
    shown = {name: mask(row[name]) for name in SHOWN if isinstance(row.get(name), str)}
    return row | shown | {name: hide(row[name]) for name in ORIGINS if isinstance(row.get(name), str)}


def mask_samples(folder: str | Path) -> None:
    """Masks the samples that a stage has written line by line, in `drops/` and `rejected/` under `folder`."""
    for path in sorted([*Path(folder).glob("drops/*.jsonl"), *Path(folder).glob("rejected/*.jsonl")]):
        lines = path.with_suffix(".masked")
        with path.open(encoding="utf-8") as samples, lines.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(masked(json.loads(line)), ensure_ascii=False) + "\n" for line in samples)
        lines.replace(path)


def table_samples(folder: str | Path) -> None:
    """Samples of what a stage's own tables drop."""
    write_samples(folder, (row for shard in shards_of(folder) for row in dropped_rows(read_table(folder, shard))))


def dropped_rows(table: pa.Table) -> list[dict[str, Any]]:
    return table.filter(pc.not_equal(table["verdict"], "")).to_pylist()


class TableStep(PipelineStep):
    """Measures documents and writes a table per shard. Yields nothing: the text is written by nobody.

    With `select`, the tables of an earlier stage: only documents that stage kept are measured, and `measure`
    is given their row of it.
    """

    type = "📊 - TABLE"

    def __init__(self, folder: str, tallies: str, select: str = "") -> None:
        super().__init__()
        self.folder = folder
        self.tallies = tallies
        self.select = select

    @abstractmethod
    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        """The columns of this stage for one document."""

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
        """Called before the documents of a shard are measured."""

    def write(self, shard: str, rows: Sequence[dict[str, Any]]) -> None:
        """Publishes a shard's rows, in the folder of the stage."""
        write_table(self.folder, shard, as_table(rows))

    def _selected(self, shard: str) -> dict[int, dict[str, Any]]:
        if not self.select:
            return {}
        return {row["row"]: row for row in kept_rows(read_table(self.select, shard)).to_pylist()}


def as_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows to a table; a column of numpy rows becomes a list column of the same type."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if isinstance(values[0], np.ndarray):
            flat = pa.array(np.concatenate(values))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, len(values[0]))
        else:
            columns[name] = pa.array(values)
    return pa.table(columns)
