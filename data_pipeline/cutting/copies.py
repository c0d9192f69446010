"""Decides which copies of a unit of text (a line, a window of bytes) stay, over all documents in bounded memory.

A unit is identified by a digest of up to 16 bytes. There are three passes:
1. `CountUnits` reads the texts. For each shard and each distinct unit in it, it writes a record (digest, shard, count)
   to one of several partitions on disk, chosen by the first bits of the digest.
2. `AllotQuotas` reads and sorts one partition at a time. For each unit with more than `max_copies` copies, and each
   shard that has it, it writes how many copies that shard may keep: the first ones in the order of shards.
3. The stage's own step reads the texts again and looks up each unit in the shard's `Quota`.

Memory holds the digests of one shard, then one partition. A unit that occurs everywhere takes only one record per
shard. The number of tasks does not change the result.
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.core.progress import ProgressFile
from data_pipeline.core.tables import kept_rows, read_table

# numpy drops trailing zero bytes of these strings; since all digests have one length, they still differ.
DIGEST = np.dtype("S16")
RECORD = np.dtype([("digest", DIGEST), ("shard", "<u4"), ("count", "<u4")])
PARTITION_BYTES = 64 << 20  # sorting takes about four times as much
_BUFFER_BYTES = 32 << 20
_MAX_PARTITIONS = 4096


class TextUnits:
    """Base class of objects that split a text into units; they are sent to the workers."""

    @abstractmethod
    def digests(self, text: str, source: str, shard: str) -> np.ndarray:
        """Returns the digests of a text's units, DIGEST [units], in order; empty for a source that is left out."""


def partitions_for(records: int) -> int:
    """Number of partitions such that each has about PARTITION_BYTES, at most 4096."""
    return max(1, min(-(-records * RECORD.itemsize // PARTITION_BYTES), _MAX_PARTITIONS))


class CountUnits(PipelineStep):
    """Step that counts the units in the documents that the stage `select` kept, in a file per partition and task."""

    name, type = "Count units", "🧮 - COPIES"

    def __init__(self, folder: str, select: str, shards: Sequence[str], units: TextUnits, partitions: int) -> None:
        super().__init__()
        self.folder = folder
        self.select = select
        self.shards = list(shards)  # all shards; a shard's number is its index here
        self.units = units
        self.partitions = partitions

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        numbers = {shard: number for number, shard in enumerate(self.shards)}
        spill = _Spill(Path(self.folder), rank, self.partitions)
        for shard, documents in groupby(data, key=lambda document: document.metadata["shard"]):
            kept = set(kept_rows(read_table(self.select, shard))["row"].to_pylist())
            found = [
                self.units.digests(document.text, document.metadata["source"], shard)
                for document in documents
                if document.metadata["row"] in kept
            ]
            if found:
                digests, counts = np.unique(np.concatenate(found), return_counts=True)
                records = np.zeros(len(digests), RECORD)
                records["digest"], records["shard"], records["count"] = digests, numbers[shard], counts
                spill.add(records)
        spill.flush()
        yield from ()


class _Spill:
    """Writer of one task's records: buffers them by partition and appends them to the task's file of each."""

    def __init__(self, folder: Path, rank: int, partitions: int) -> None:
        self._paths = [folder / f"{number:04d}" / f"{rank:05d}.bin" for number in range(partitions)]
        self._parts: list[list[np.ndarray]] = [[] for _ in range(partitions)]
        self._size = 0
        for path in self._paths:  # emptied first: a task that is run again must not append to its old files
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    def add(self, records: np.ndarray) -> None:
        """Adds RECORDs to the buffers of their partitions; writes the buffers once they hold 32 MiB."""
        first = np.frombuffer(records["digest"].tobytes(), np.uint8).reshape(-1, DIGEST.itemsize)[:, :4].copy()
        partition = (first.view(">u4").ravel().astype(np.uint64) * np.uint64(len(self._paths))) >> np.uint64(32)
        order = np.argsort(partition, kind="stable")
        edges = np.searchsorted(partition[order], np.arange(len(self._paths) + 1, dtype=np.uint64))
        for number, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            if end > start:
                self._parts[number].append(records[order[start:end]])
        self._size += records.nbytes
        if self._size >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        for path, parts in zip(self._paths, self._parts, strict=True):
            if parts:
                with path.open("ab") as file:
                    file.write(np.concatenate(parts).tobytes())
                parts.clear()
        self._size = 0


class AllotQuotas(PipelineStep):
    """Step that turns each partition of counts into a file of quotas, ordered by shard.

    A second file per partition, `-starts.npy`, holds the index at which each shard's quotas begin.
    """

    name, type = "Share out copies", "🧮 - COPIES"

    def __init__(self, counts: str, folder: str, partitions: int, shards: int, max_copies: int, progress: str) -> None:
        super().__init__()
        self.counts = counts
        self.folder = folder
        self.partitions = partitions
        self.shards = shards
        self.max_copies = max_copies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        progress = ProgressFile(self.progress, rank)
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(rank, self.partitions, world_size):
            parts = [np.fromfile(path, RECORD) for path in sorted((Path(self.counts) / f"{number:04d}").iterdir())]
            quotas = allot_quotas(np.concatenate(parts), self.max_copies)
            np.save(folder / f"{number:04d}-starts.npy", np.searchsorted(quotas["shard"], np.arange(self.shards + 1)))
            quotas.tofile(folder / f"{number:04d}.bin")
            progress.advance(sum(part.nbytes for part in parts))
        progress.close()
        yield from ()


def allot_quotas(records: np.ndarray, max_copies: int) -> np.ndarray:
    """Allots the first `max_copies` copies of each unit to shards in their order.

    Takes RECORDs of counts. Returns RECORDs of the units with more copies, in which `count` is how many of them the
    shard may keep, sorted by shard and digest.
    """
    records = records[np.lexsort((records["shard"], records["digest"]))]
    if not len(records):
        return records
    heads = np.flatnonzero(np.r_[True, records["digest"][1:] != records["digest"][:-1]])
    sizes = np.diff(np.r_[heads, len(records)])
    counts = records["count"].astype(np.int64)
    ends = np.cumsum(counts)
    first = ends[heads] - counts[heads]  # copies of all units before this one
    before = ends - counts - np.repeat(first, sizes)
    totals = np.repeat(np.add.reduceat(counts, heads), sizes)
    records["count"] = np.clip(max_copies - before, 0, counts)
    records = records[totals > max_copies]
    return records[np.lexsort((records["digest"], records["shard"]))]


class Quota:
    """Number of copies of each unit that one shard may keep; a unit that is missing here may be kept always."""

    def __init__(self, folder: str | Path, shard: int) -> None:
        parts = [np.zeros(0, RECORD)]
        for path in sorted(Path(folder).glob("*.bin")):
            start, end = np.load(path.with_name(f"{path.stem}-starts.npy"), mmap_mode="r")[shard : shard + 2].tolist()
            parts.append(np.fromfile(path, RECORD, end - start, offset=start * RECORD.itemsize))
        records = np.concatenate(parts)
        records = records[np.argsort(records["digest"])]
        self.digests = records["digest"].copy()  # DIGEST [units], ascending
        self.left = records["count"].astype(np.int64)  # [units]

    def indices(self, digests: np.ndarray) -> np.ndarray:
        """Returns int64 [digests], the index of each in `self.digests`; -1 for a missing one."""
        if not len(self.digests):
            return np.full(len(digests), -1)
        indices = np.minimum(np.searchsorted(self.digests, digests), len(self.digests) - 1)
        return np.where(self.digests[indices] == digests, indices, -1)
