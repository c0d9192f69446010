"""Clusters of documents from pairs, and the one of each cluster that stays.

Union-find over arrays that lie in files, of `BYTES_A_DOCUMENT` each and the documents' ids, not held in memory. The
survivor is the document of the highest quality score, then the longest, then the first by source, shard and row. A
cluster that meets a document of an earlier run loses all of its own.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.dedup.pairs import INDEXED, Numbering
from data_pipeline.executors.progress import ProgressFile
from data_pipeline.ledger import Tally
from data_pipeline.tables import KEYS, dropped_rows, kept_rows, read_table, write_samples, write_table


@numba.njit(cache=True)
def join(parents: np.ndarray, pairs: np.ndarray) -> None:
    """Joins both members of each pair; the smallest member of a set is its root, whatever the order of pairs."""
    for pair in range(len(pairs)):
        one, other = pairs[pair, 0], pairs[pair, 1]
        while parents[one] != one:
            parents[one] = parents[parents[one]]
            one = parents[one]
        while parents[other] != other:
            parents[other] = parents[parents[other]]
            other = parents[other]
        parents[max(one, other)] = min(one, other)


@numba.njit(cache=True)
def label(parents: np.ndarray) -> None:
    """Each member's root in place of its parent; a parent is never after its child."""
    for member in range(len(parents)):
        parents[member] = parents[parents[member]]


@numba.njit(cache=True)
def elect(
    labels: np.ndarray, quality: np.ndarray, chars: np.ndarray, first: int, best: np.ndarray, sizes: np.ndarray,
    marks: np.ndarray,
) -> None:  # fmt: skip
    """Holds documents `first`, first + 1, ... against the best so far of their clusters.

    `best` int64, `sizes` int64 and `marks` float64 [documents, 2] (quality and length of the best) are by root.
    """
    for place in range(len(quality)):
        root = labels[first + place]
        sizes[root] += 1
        better = quality[place] > marks[root, 0] or (quality[place] == marks[root, 0] and chars[place] > marks[root, 1])
        if sizes[root] == 1 or better:
            best[root], marks[root, 0], marks[root, 1] = first + place, quality[place], chars[place]


_TYPES: dict[str, type[np.number]] = {
    "labels": np.int64,
    "best": np.int64,
    "sizes": np.int64,
    "exact": np.uint64,
    "url": np.uint64,
    "known": np.uint8,
    "id_end": np.int64,
}
_MARKS = 2  # float64: quality and length of the best so far
BYTES_A_DOCUMENT = sum(np.dtype(kind).itemsize for kind in _TYPES.values()) + 8 * _MARKS


class Arrays:
    """What is known of each document, by its number, in files of one folder."""

    def __init__(self, folder: str | Path, documents: int, mode: Literal["r", "w+"] = "r") -> None:
        self.folder, self.documents = Path(folder), documents
        self.mode: Literal["r", "w+"] = mode

    def of(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        return np.memmap(path, dtype=np.dtype(_TYPES[name]), mode=self.mode, shape=(self.documents,))

    def ids(self, numbers: Iterable[int]) -> list[str]:
        ends, found = self.of("id_end"), []
        with (self.folder / "ids").open("rb") as file:
            for number in numbers:
                start = int(ends[number - 1]) if number else 0
                file.seek(start)
                found.append(file.read(int(ends[number]) - start).decode())
        return found


class Cluster(PipelineStep):
    """One task: pairs to labels, survivors and sizes, in the files of `Arrays`."""

    name = "Clusters"
    type = "🫂 - DEDUPS"

    def __init__(self, work: str, documents: Numbering, signatures: str, pairs: Sequence[str]) -> None:
        super().__init__()
        self.work = work
        self.documents = documents
        self.signatures = signatures
        self.pairs = list(pairs)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        documents = self.documents
        arrays = Arrays(self.work, documents.documents, "w+")
        labels, known = arrays.of("labels"), arrays.of("known")
        labels[:] = np.arange(len(labels))
        for path in self.pairs:
            pairs = np.load(path)
            met = pairs[:, 0] == INDEXED
            known[pairs[met, 1]] = 1
            join(labels, pairs[~met])
        label(labels)
        known[labels[known.astype(bool)]] = 1  # from members to roots
        best, sizes = arrays.of("best"), arrays.of("sizes")
        marks = np.memmap(Path(self.work) / "marks.bin", dtype=np.float64, mode="w+", shape=(len(labels), _MARKS))
        exact, url, ends = arrays.of("exact"), arrays.of("url"), arrays.of("id_end")
        written = 0
        with (Path(self.work) / "ids").open("wb") as ids:
            for place, shard in enumerate(documents.shards):
                first, last = int(documents.starts[place]), int(documents.starts[place + 1])
                table = kept_rows(read_table(documents.stage, shard))
                elect(labels, _numbers(table, "quality"), _numbers(table, "chars"), first, best, sizes, marks)
                signed = read_table(self.signatures, shard)
                signed = signed.take(pc.index_in(table["row"], signed["row"].combine_chunks()))
                exact[first:last], url[first:last] = _numbers(signed, "exact"), _numbers(signed, "url")
                names = [name.encode() for name in table["id"].to_pylist()]
                ids.write(b"".join(names))
                ends[first:last] = written + np.cumsum([len(name) for name in names])
                written += sum(map(len, names))
        yield from ()


class Judge(PipelineStep):
    """Each shard's verdicts: who survives, and why the others do not."""

    name = "Survivors"
    type = "🫂 - DEDUPS"

    def __init__(self, folder: str, work: str, documents: Numbering, tallies: str, progress: str) -> None:
        super().__init__()
        self.folder = folder
        self.work = work
        self.documents = documents
        self.tallies = tallies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally, progress = Tally(), ProgressFile(self.progress, rank)
        documents = self.documents
        arrays = Arrays(self.work, documents.documents)
        for place in range(rank, len(documents.shards), world_size):
            shard = documents.shards[place]
            table = kept_rows(read_table(documents.stage, shard))
            for source, size in zip(table["source"].to_pylist(), table["bytes"].to_pylist(), strict=True):
                tally.came_in(source, size)
                progress.advance(size)
            judged = self._judge(table, arrays, int(documents.starts[place]))
            write_table(self.folder, shard, judged)
        tally.save(Path(self.tallies) / f"in-{rank:05d}.json")
        progress.close()
        yield from ()

    @staticmethod
    def _judge(table: pa.Table, arrays: Arrays, first: int) -> pa.Table:
        numbers = np.arange(first, first + table.num_rows)
        roots = np.array(arrays.of("labels")[first : first + len(numbers)])
        best, known = arrays.of("best")[roots], arrays.of("known")[roots].astype(bool)
        exact, url = arrays.of("exact"), arrays.of("url")
        same = exact[numbers] == exact[best]
        moved = (url[numbers] == url[best]) & (url[numbers] != 0)
        near = np.where(same, "exact_duplicate", np.where(moved, "url_duplicate", "near_duplicate"))
        verdicts = np.where(known, "in_index", np.where(best == numbers, "", near))
        at = table.schema.get_field_index("verdict")
        table = table.set_column(at, "verdict", pa.array(verdicts.tolist(), pa.string()))
        table = table.append_column("cluster", pa.array(roots))
        table = table.append_column("cluster_size", pa.array(np.array(arrays.of("sizes")[roots])))
        survivors = np.array(table["id"].to_pylist(), dtype=object)
        lost = np.flatnonzero((best != numbers) & ~known)
        survivors[lost] = arrays.ids(best[lost].tolist())
        survivors[known] = ""
        return table.append_column("survivor", pa.array(survivors.tolist(), pa.string()))


def sample_duplicates(folder: Path, shards: Sequence[str]) -> None:
    """`drops/` of the first duplicates a source."""
    columns = [*KEYS, "verdict", "survivor", "cluster", "cluster_size", "head"]
    tables = (read_table(folder, shard).select(columns) for shard in shards)
    write_samples(folder, (row for table in tables for row in dropped_rows(table)))


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().to_numpy(zero_copy_only=False)
