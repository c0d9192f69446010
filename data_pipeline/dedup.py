"""Clusters of equal and nearly equal documents, and the one of each cluster that stays.

Sources are deduplicated together. Band keys are sorted and equal neighbours joined by union-find; candidates
are not compared again, as in FineWeb. The survivor is the document of the highest quality score, then the
longest, then the first by source, shard and row. Everything is held in memory: 8 bytes a band and document.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from configs.data import DedupConfig
from data_pipeline.executor import ProgressFile
from data_pipeline.ledger import Tally
from data_pipeline.tables import KEYS, kept_rows, read_table, write_samples, write_table


class UnionFind:
    """Disjoint sets of 0..n-1; the smallest member is the root, so that labels do not depend on the order of
    joins.
    """

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size, dtype=np.int64)

    def find(self, member: int) -> int:
        parent = self._parent
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = int(parent[member])
        return member

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low

    def labels(self) -> np.ndarray:
        """int64 [n], each member's root."""
        labels = self._parent
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]
        return labels


def join_equal(sets: UnionFind, keys: np.ndarray) -> None:
    """Joins members that have equal entries in `keys` [n]."""
    order = np.argsort(keys, kind="stable")
    for place in np.flatnonzero(keys[order][1:] == keys[order][:-1]).tolist():
        sets.join(int(order[place]), int(order[place + 1]))


def clusters(exact: np.ndarray, keys: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(labels by exact hash, labels by exact hash or any shared band key), each int64 [n].

    `exact` is [n] of strings, or empty to skip; `keys` is uint64 [n, bands], or None to skip.
    """
    size = len(exact)
    same, near = UnionFind(size), UnionFind(size)
    join_equal(same, exact)
    join_equal(near, exact)
    if keys is not None:
        for band in keys.T:
            join_equal(near, band)
    return same.labels(), near.labels()


def survivors(labels: np.ndarray, quality: np.ndarray, chars: np.ndarray) -> np.ndarray:
    """int64 [n], each document's survivor: the best of its cluster, then the longest, then the first."""
    order = np.lexsort((np.arange(len(labels)), -chars, -quality, labels))
    heads = np.flatnonzero(np.r_[True, labels[order][1:] != labels[order][:-1]]) if len(labels) else order
    best = np.zeros(len(labels), np.int64)
    best[labels[order[heads]]] = order[heads]
    return best[labels]


class Deduplicate(PipelineStep):
    """One task over all shards: reads verdicts and signatures, writes cluster tables and samples."""

    name = "Deduplicate"
    type = "🫂 - DEDUPS"

    def __init__(
        self,
        folder: str,
        filtered: str,
        signatures: str,
        shards: Sequence[str],
        settings: DedupConfig,
        tallies: str,
        progress: str,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.filtered = filtered
        self.signatures = signatures
        self.shards = list(shards)
        self.settings = settings
        self.tallies = tallies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if world_size != 1:
            raise ValueError(f"deduplication sees all documents at once; it ran in {world_size} tasks, not 1")
        documents, exact, keys = self._load(rank)
        if not documents.num_rows:
            raise ValueError("no document is left to deduplicate; see the drops of the filter stage before it")
        same, near = clusters(exact, keys)
        best = survivors(near, documents["quality"].to_numpy(), documents["chars"].to_numpy())
        places = np.arange(len(best))
        verdicts = np.where(best == places, "", np.where(same == same[best], "exact_duplicate", "near_duplicate"))
        sizes = np.bincount(near, minlength=len(near))[near]
        ids = np.array(documents["id"].to_pylist(), dtype=object)
        table = documents.set_column(
            documents.schema.get_field_index("verdict"), "verdict", pa.array(verdicts.tolist(), pa.string())
        )
        table = table.append_column("cluster", pa.array(near)).append_column("cluster_size", pa.array(sizes))
        table = table.append_column("survivor", pa.array(ids[best].tolist(), pa.string()))
        for shard in self.shards:
            write_table(self.folder, shard, table.filter(pc.equal(table["shard"], shard)).drop_columns(["head"]))
        dropped = table.filter(pc.not_equal(table["verdict"], ""))
        write_samples(
            self.folder,
            dropped.select([*KEYS, "verdict", "survivor", "cluster", "cluster_size", "head"]).to_pylist(),
        )
        yield from ()

    def _load(self, rank: int) -> tuple[pa.Table, np.ndarray, np.ndarray | None]:
        tally, progress = Tally(), ProgressFile(self.progress, rank)
        parts, exact, keys = [], [], []
        for shard in self.shards:
            filtered = kept_rows(read_table(self.filtered, shard))
            for source, size in zip(filtered["source"].to_pylist(), filtered["bytes"].to_pylist(), strict=True):
                tally.came_in(source, size)
            signed = read_table(self.signatures, shard)
            wanted = pc.index_in(filtered["row"], signed["row"].combine_chunks())
            signed = signed.take(wanted)
            parts.append(filtered)
            exact.append(np.array(signed["exact"].to_pylist(), dtype="U32"))
            keys.append(_matrix(signed["keys"]))
            progress.advance(sum(filtered["bytes"].to_pylist()))
        tally.save(Path(self.tallies) / "in-00000.json")
        progress.close()
        documents = pa.concat_tables(parts)
        hashes = np.concatenate(exact)
        if not self.settings.exact:
            hashes = np.array([f"{place:032x}" for place in range(len(hashes))])
        return documents, hashes, np.concatenate(keys) if self.settings.minhash else None


def _matrix(column: Any) -> np.ndarray:
    """A fixed-size list column as [rows, size]."""
    size = column.type.list_size
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
