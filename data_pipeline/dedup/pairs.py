"""Documents that share a key, as pairs: one task a kind of key and range of its values.

A task reads its range of every shard's sorted keys, sorts what it got, and links each document to the first one of
its group, so that a group of n gives n - 1 pairs. Its memory is the number of documents over the number of ranges.
Documents are numbered through, in the order of shards and rows, over those that the filter kept. Documents that earlier
runs kept are numbered through as well, run after run, and stand in pairs as negative numbers: see `earlier_code`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.canaries.naming import is_canary
from data_pipeline.core.checked_parquet import read_parquet
from data_pipeline.core.tables import FileKey, file_key, kept_rows, shards_of
from data_pipeline.dedup.signatures import read_range
from data_pipeline.scan.words import Splitter

BYTES_A_KEY = 48  # a key, its document and the copies that sorting makes
NOT_KEPT = -1  # in place of a number
_WHOLE = 1 << 64


@dataclass(frozen=True)
class KeyRange:
    """One kind of key, by its column, and the values low to high."""

    kind: int
    low: int
    high: int

    @property
    def file(self) -> str:
        return f"{self.kind:03d}-{self.low:016x}.npy"


def key_ranges(kinds: Sequence[int], documents: int, memory: int) -> list[KeyRange]:
    """Ranges so narrow that a task needs at most `memory` bytes, hashes being even."""
    ranges = max(1, -(-documents * BYTES_A_KEY // memory))
    edges = [_WHOLE * part // ranges for part in range(ranges + 1)]
    return [KeyRange(kind, edges[part], edges[part + 1] - 1) for kind in kinds for part in range(ranges)]


class Numbering:
    """Documents that a stage kept, numbered through. Made once, by who plans; it holds a number a shard, no more."""

    def __init__(self, stage: str | Path) -> None:
        self.stage = stage
        self.shards = shards_of(stage)
        counts = [len(self.rows(index)) for index in range(len(self.shards))]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def documents(self) -> int:
        return int(self.starts[-1])

    def rows(self, shard: int) -> np.ndarray:
        """int64, the rows of a shard that the stage kept, ascending."""
        path = Path(self.stage) / f"{self.shards[shard]}.parquet"
        return _kept(path, file_key(path))

    def numbers(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """int64 [rows], each row's number; NOT_KEPT where the stage did not keep it."""
        kept = self.rows(shard)
        if not len(kept):
            return np.full(len(rows), NOT_KEPT, np.int64)
        indices = np.minimum(np.searchsorted(kept, rows), len(kept) - 1)
        return np.where(kept[indices] == rows, indices + self.starts[shard], NOT_KEPT)

    def shard_of(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1


# Every kind of key asks for the same shards again.
@functools.lru_cache(maxsize=16)
def _kept(path: Path, _: FileKey) -> np.ndarray:
    return kept_rows(read_parquet(path, ["row", "verdict"]))["row"].to_numpy()


@dataclass(frozen=True)
class EarlierRun:
    """A finished run whose documents are not to be kept again."""

    folder: str  # its run.dir
    kept: Numbering  # of its dedup stage
    first: int  # number of its first document among those of all earlier runs
    splitters: dict[str, Splitter]  # of its rule sets, by name


def earlier_code(numbers: np.ndarray) -> np.ndarray:
    """Numbers of documents of earlier runs as they stand in pairs, and back again."""
    return -1 - numbers


class FindPairs(PipelineStep):
    """`<out>/<job>.npy`, int64 [pairs, 2]: the first document of a group and another, or one of an earlier run and the
    first.
    """

    name = "Pairs"
    type = "🫂 - DEDUPS"

    def __init__(
        self,
        out: str,
        documents: Numbering,
        signatures: str,
        todo: Sequence[KeyRange],
        earlier: Sequence[EarlierRun] = (),
    ) -> None:
        super().__init__()
        self.out = out
        self.documents = documents
        self.signatures = signatures
        self.todo = list(todo)
        self.earlier = list(earlier)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for job in self.todo[rank::world_size]:
            found = [_load(job, self.documents, self.signatures, self.documents.shards)]
            for run in self.earlier:
                shards = [shard for shard in run.kept.shards if not is_canary(shard)]
                keys, numbers = _load(job, run.kept, f"{run.folder}/signatures", shards)
                found.append((keys, earlier_code(numbers + run.first)))
            keys, numbers = (np.concatenate(part) for part in zip(*found, strict=True))
            np.save(Path(self.out) / job.file, linked(keys, numbers))
        yield from ()


def _load(job: KeyRange, documents: Numbering, signatures: str, shards: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(keys, numbers) of the kept documents of `shards` that have a key of this job."""
    keys, numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    wanted = set(shards)
    for index, shard in enumerate(documents.shards):
        if shard not in wanted:
            continue
        found, rows = read_range(signatures, shard, job.kind, max(job.low, 1), job.high)  # 0: it has none
        number = documents.numbers(index, rows)
        keys.append(found[number != NOT_KEPT])
        numbers.append(number[number != NOT_KEPT])
    return np.concatenate(keys), np.concatenate(numbers)


def linked(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2] of the groups of equal keys that have a document of this run: (the first one, another one), and
    (a document of an earlier run, the first one).
    """
    own = numbers >= 0
    order = np.lexsort((numbers[own], keys[own]))
    own_keys, own_numbers = keys[own][order], numbers[own][order]
    new = np.r_[True, own_keys[1:] != own_keys[:-1]] if len(order) else np.zeros(0, bool)
    heads = np.flatnonzero(new)
    firsts = own_numbers[heads][np.cumsum(new) - 1] if len(heads) else own_numbers
    pairs = np.stack([firsts, own_numbers], axis=1)[~new]
    if own.all() or not len(heads):
        return pairs
    index = np.minimum(np.searchsorted(own_keys[heads], keys[~own]), len(heads) - 1)
    met = own_keys[heads][index] == keys[~own]
    return np.concatenate([pairs, np.stack([numbers[~own][met], own_numbers[heads][index[met]]], axis=1)])
