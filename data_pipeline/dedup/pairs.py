"""Documents that share a key, as pairs: one task a kind of key and range of its values.

A task reads its range of every shard's sorted keys, sorts what it got, and links each document to the first one of
its group, so that a group of n gives n - 1 pairs. Its memory is the number of documents over the number of ranges.
Documents are numbered through, in the order of shards and rows, over those that the filter kept.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.dedup.signatures import read_range
from data_pipeline.realms import is_canary
from data_pipeline.tables import Mark, kept_rows, mark, read_parquet, shards_of

BYTES_A_KEY = 48  # a key, its document and the copies that sorting makes
INDEXED = -1  # stands for a document of an earlier run
_WHOLE = 1 << 64


@dataclass(frozen=True)
class Job:
    """One kind of key, by its column, and the values low to high."""

    kind: int
    low: int
    high: int

    @property
    def file(self) -> str:
        return f"{self.kind:03d}-{self.low:016x}.npy"


def jobs(kinds: Sequence[int], documents: int, memory: int) -> list[Job]:
    """Ranges so narrow that a task needs at most `memory` bytes, hashes being even."""
    ranges = max(1, -(-documents * BYTES_A_KEY // memory))
    edges = [_WHOLE * part // ranges for part in range(ranges + 1)]
    return [Job(kind, edges[part], edges[part + 1] - 1) for kind in kinds for part in range(ranges)]


class Numbering:
    """Documents that a stage kept, numbered through. Made once, by who plans; it holds a number a shard, no more."""

    def __init__(self, stage: str | Path) -> None:
        self.stage = stage
        self.shards = shards_of(stage)
        counts = [len(self.rows(place)) for place in range(len(self.shards))]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def documents(self) -> int:
        return int(self.starts[-1])

    def rows(self, shard: int) -> np.ndarray:
        """int64, the rows of a shard that the stage kept, ascending."""
        path = Path(self.stage) / f"{self.shards[shard]}.parquet"
        return _kept(path, mark(path))

    def numbers(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """int64 [rows], each row's number; INDEXED where the stage did not keep it."""
        kept = self.rows(shard)
        if not len(kept):
            return np.full(len(rows), INDEXED, np.int64)
        places = np.minimum(np.searchsorted(kept, rows), len(kept) - 1)
        return np.where(kept[places] == rows, places + self.starts[shard], INDEXED)

    def shard_of(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1


# Every kind of key asks for the same shards again.
@functools.lru_cache(maxsize=16)
def _kept(path: Path, _: Mark) -> np.ndarray:
    return kept_rows(read_parquet(path, ["row", "verdict"]))["row"].to_numpy()


class FindPairs(PipelineStep):
    """`<out>/<job>.npy`, int64 [pairs, 2]: two documents each, or INDEXED and a document."""

    name = "Pairs"
    type = "🫂 - DEDUPS"

    def __init__(
        self,
        out: str,
        documents: Numbering,
        signatures: str,
        todo: Sequence[Job],
        earlier: Sequence[tuple[str, Numbering]] = (),
    ) -> None:
        super().__init__()
        self.out = out
        self.documents = documents
        self.signatures = signatures
        self.todo = list(todo)
        self.earlier = list(earlier)  # folder of signatures and what was kept, of each run in the index

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for job in self.todo[rank::world_size]:
            keys, numbers = self._load(job)
            known = [self._known(job, signatures, kept) for signatures, kept in self.earlier]
            pairs = linked(keys, numbers, np.concatenate([np.zeros(0, np.uint64), *known]))
            np.save(Path(self.out) / job.file, pairs)
        yield from ()

    def _load(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        keys, numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for place, shard in enumerate(self.documents.shards):
            found, rows = read_range(self.signatures, shard, job.kind, max(job.low, 1), job.high)  # 0: it has none
            number = self.documents.numbers(place, rows)
            keys.append(found[number != INDEXED])
            numbers.append(number[number != INDEXED])
        return np.concatenate(keys), np.concatenate(numbers)

    @staticmethod
    def _known(job: Job, signatures: str, kept: Numbering) -> np.ndarray:
        """Keys of the documents that an earlier run kept."""
        found = [np.zeros(0, np.uint64)]
        for place, shard in enumerate(kept.shards):
            if is_canary(shard):
                continue
            keys, rows = read_range(signatures, shard, job.kind, max(job.low, 1), job.high)
            found.append(keys[kept.numbers(place, rows) != INDEXED])
        return np.concatenate(found)


def linked(keys: np.ndarray, numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: (first of the documents that share a key, another), and (INDEXED, first) if it is `known`."""
    order = np.lexsort((numbers, keys))
    keys, numbers = keys[order], numbers[order]
    new = np.r_[True, keys[1:] != keys[:-1]] if len(keys) else np.zeros(0, bool)
    heads = np.flatnonzero(new)
    firsts = numbers[heads][np.cumsum(new) - 1] if len(keys) else numbers
    pairs = np.stack([firsts, numbers], axis=1)[~new]
    met = heads[np.isin(keys[heads], known)]
    return np.concatenate([pairs, np.stack([np.full(len(met), INDEXED, np.int64), numbers[met]], axis=1)])
