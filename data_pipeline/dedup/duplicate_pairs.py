"""Finds pairs of documents that share a key; each task takes one kind of key and a range of its values.

A task reads its range of every shard's sorted keys, sorts the keys it read, and pairs the first document of each group
of equal keys with every other one, so that a group of n gives n - 1 pairs. Its memory is proportional to the number of
documents divided by the number of ranges. The documents that the filter stage kept are numbered from 0 on in the order
of shards and rows. Those that earlier runs kept are numbered likewise, run after run, and are encoded in pairs as
negative numbers: see `earlier_code`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.checked_parquet import read_parquet
from data_pipeline.core.tables import FileKey, file_key, kept_rows, shards_of
from data_pipeline.dedup.signatures import read_range
from data_pipeline.scan.words import Splitter

BYTES_A_KEY = 48  # memory for a key, its document and the copies that sorting makes
NOT_KEPT = -1  # stands for the number of a document that was not kept
_WHOLE = 1 << 64


@dataclass(frozen=True)
class KeyRange:
    """Task of `FindPairs`: one kind of key (its column) and the values from `low` to `high`, both included."""

    kind: int
    low: int
    high: int

    @property
    def file(self) -> str:
        """Name of the file with the pairs of this range."""
        return f"{self.kind:03d}-{self.low:016x}.npy"


def key_ranges(kinds: Sequence[int], documents: int, memory: int) -> list[KeyRange]:
    """Divides the values of each kind of key, which are uniform hashes, so that a task needs about `memory` bytes."""
    ranges = max(1, -(-documents * BYTES_A_KEY // memory))
    edges = [_WHOLE * part // ranges for part in range(ranges + 1)]
    return [KeyRange(kind, edges[part], edges[part + 1] - 1) for kind in kinds for part in range(ranges)]


class Numbering:
    """Numbers the documents that a stage kept, from 0 on, in the order of shards and rows.

    It is made once, by the leading process, and sent to all tasks; it holds one number per shard.
    """

    def __init__(self, stage: str | Path) -> None:
        self.stage = stage
        self.shards = shards_of(stage)
        counts = [len(self.rows(index)) for index in range(len(self.shards))]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def documents(self) -> int:
        return int(self.starts[-1])

    def rows(self, shard: int) -> np.ndarray:
        """Rows of a shard that the stage kept, int64, ascending."""
        path = Path(self.stage) / f"{self.shards[shard]}.parquet"
        return _kept(path, file_key(path))

    def numbers(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Numbers of the documents in these rows of a shard, int64 [rows]; NOT_KEPT for one that was not kept."""
        kept = self.rows(shard)
        if not len(kept):
            return np.full(len(rows), NOT_KEPT, np.int64)
        indices = np.minimum(np.searchsorted(kept, rows), len(kept) - 1)
        return np.where(kept[indices] == rows, indices + self.starts[shard], NOT_KEPT)

    def shard_of(self, number: int) -> int:
        """Index of the shard that holds a document."""
        return int(np.searchsorted(self.starts, number, side="right")) - 1


# Cached, since every kind of key reads the same shards.
@functools.lru_cache(maxsize=16)
def _kept(path: Path, _: FileKey) -> np.ndarray:
    """Rows of the documents that a table keeps; read again once the table is replaced, since its FileKey changes."""
    return kept_rows(read_parquet(path, ["row", "verdict"]))["row"].to_numpy()


@dataclass(frozen=True)
class EarlierRun:
    """A finished run that `dedup.index` names; duplicates of its documents are dropped."""

    folder: str  # its run.dir
    kept: Numbering  # of its dedup stage
    first: int  # number of its first document among those of all earlier runs
    splitters: dict[str, Splitter]  # how its texts are split into words, by rule set


def earlier_code(numbers: np.ndarray) -> np.ndarray:
    """Encodes numbers of earlier runs' documents as negative numbers for pairs; decodes them as well."""
    return -1 - numbers


class FindPairs(PipelineStep):
    """Step that writes the pairs of each key range to `<out>/<range>.npy`, int64 [pairs, 2], as `linked` makes them."""

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
    """Returns (keys, numbers) of the kept documents in `shards` that have a key of this range."""
    keys, numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    wanted = set(shards)
    for index, shard in enumerate(documents.shards):
        if shard not in wanted:
            continue
        found, rows = read_range(signatures, shard, job.kind, max(job.low, 1), job.high)  # 0 means no key
        number = documents.numbers(index, rows)
        keys.append(found[number != NOT_KEPT])
        numbers.append(number[number != NOT_KEPT])
    return np.concatenate(keys), np.concatenate(numbers)


def linked(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Pairs the documents of each group of equal keys that has a document of this run; returns int64 [pairs, 2].

    A pair is (this run's first document of the group, another of this run), or (an encoded document of an earlier run,
    this run's first).
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
    matched = own_keys[heads][index] == keys[~own]
    return np.concatenate([pairs, np.stack([numbers[~own][matched], own_numbers[heads][index[matched]]], axis=1)])
