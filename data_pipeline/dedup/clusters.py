"""Builds clusters from pairs of documents; a cluster holds all that are linked, directly or through others.

Union-find over arrays in memory-mapped files, of `BYTES_A_DOCUMENT` bytes per document and its id. The documents of a
cluster may be duplicates; `survivors` decides which of them stay.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Literal

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.core.tables import kept_rows, read_table
from data_pipeline.dedup.duplicate_pairs import EarlierRun, Numbering, earlier_code

MEMBERS = "members"  # file with the number of documents that share their cluster with another


@numba.njit(cache=True)
def join(parents: np.ndarray, pairs: np.ndarray) -> None:
    """Merges the sets of both members of each pair (union-find), in place.

    `parents` int64 [documents], `pairs` int64 [pairs, 2]. A set's root is its smallest member, in any order of pairs.
    """
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
    """Replaces each member's parent by its root; works in one pass, since a parent is never larger than its child."""
    for member in range(len(parents)):
        parents[member] = parents[parents[member]]


OWN = -1  # stands for this run where an earlier run would have a number


class Population:
    """All documents that are compared: those of this run, then those of earlier runs that share a key with one.

    This run's documents are numbered as in `own`. The file `matched` holds, int64 and ascending, the
    numbers of those that share a key among all documents of earlier runs.
    """

    def __init__(self, own: Numbering, earlier: Sequence[EarlierRun] = (), matched: str = "") -> None:
        self.own = own
        self.earlier = list(earlier)
        self._matched = matched

    @property
    def matched(self) -> np.ndarray:
        """Indices, int64 and ascending, of the compared documents among all those of earlier runs."""
        return np.load(self._matched) if self.earlier else np.zeros(0, np.int64)

    @property
    def documents(self) -> int:
        """Number of all compared documents."""
        return self.own.documents + len(self.matched)

    def numbers(self, pairs: np.ndarray) -> np.ndarray:
        """Translates documents from their codes in pairs to their numbers in this population, int64."""
        matched = np.searchsorted(self.matched, earlier_code(pairs))
        return np.where(pairs >= 0, pairs, matched + self.own.documents)

    def location(self, number: int) -> tuple[int, str]:
        """Returns (earlier run or OWN, shard) of a document."""
        if number < self.own.documents:
            return OWN, self.own.shards[self.own.shard_of(number)]
        there = int(self.matched[number - self.own.documents])
        run = int(np.searchsorted([run.first for run in self.earlier], there, side="right")) - 1
        kept = self.earlier[run].kept
        return run, kept.shards[kept.shard_of(there - self.earlier[run].first)]

    def matched_in(self, run: int, shard: str) -> list[tuple[int, int]]:
        """Lists (number, row in the shard) of the compared documents in one shard of an earlier run."""
        earlier = self.earlier[run]
        index = earlier.kept.shards.index(shard)
        start, end = (earlier.first + int(edge) for edge in earlier.kept.starts[index : index + 2])
        first, last = (int(edge) for edge in np.searchsorted(self.matched, [start, end]))
        rows = earlier.kept.rows(index)[self.matched[first:last] - start]
        return list(zip(range(self.own.documents + first, self.own.documents + last), rows.tolist(), strict=True))


def write_matched(path: Path, pairs: Sequence[str]) -> None:
    """Writes the file `matched` of a `Population`: the earlier runs' documents that occur in files of pairs."""
    found = [np.zeros(0, np.int64)]
    for file in pairs:
        codes = np.load(file)[:, 0]
        found.append(np.unique(earlier_code(codes[codes < 0])))
    np.save(path, np.unique(np.concatenate(found)))


@numba.njit(cache=True)
def count_members(labels: np.ndarray, sizes: np.ndarray) -> int:
    """Counts the members of each cluster into `sizes`; returns how many documents share their cluster with another."""
    alone = 0
    for root in labels:
        sizes[root] += 1
        alone += 1 if sizes[root] == 1 else -1 if sizes[root] == 2 else 0
    return len(labels) - alone


_TYPES: dict[str, type[np.number]] = {
    "labels": np.int64,
    "sizes": np.int64,
    "quality": np.float64,
    "chars": np.int64,
    "exact": np.uint64,
    "url": np.uint64,
    "id_end": np.int64,
}
BYTES_A_DOCUMENT = sum(np.dtype(kind).itemsize for kind in _TYPES.values())


class ClusterArrays:
    """Arrays with one value per document, memory-mapped from files of one folder; `mode` "w+" creates them."""

    def __init__(self, folder: str | Path, documents: int, mode: Literal["r", "w+"] = "r") -> None:
        self.folder, self.documents = Path(folder), documents
        self.mode: Literal["r", "w+"] = mode
        self._opened: dict[str, np.ndarray] = {}

    def of(self, name: str) -> np.ndarray:
        """Array [documents] of one property of the documents, such as `labels` or `sizes`."""
        if name not in self._opened:  # opening it again with "w+" would empty it
            path, kind = self.folder / f"{name}.bin", np.dtype(_TYPES[name])
            self._opened[name] = np.memmap(path, dtype=kind, mode=self.mode, shape=(self.documents,))
        return self._opened[name]

    def ids(self, numbers: Iterable[int]) -> list[str]:
        """Ids of the documents with these numbers."""
        ends, found = self.of("id_end"), []
        with (self.folder / "ids").open("rb") as file:
            for number in numbers:
                start = int(ends[number - 1]) if number else 0
                file.seek(start)
                found.append(file.read(int(ends[number]) - start).decode())
        return found


class FindClusters(PipelineStep):
    """Step of a single task that builds clusters from files of pairs and writes all files of `ClusterArrays`."""

    name = "Clusters"
    type = "🫂 - DEDUPS"

    def __init__(self, work: str, population: Population, signatures: str, pairs: Sequence[str]) -> None:
        super().__init__()
        self.work = work
        self.population = population
        self.signatures = signatures
        self.pairs = list(pairs)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        population = self.population
        arrays = ClusterArrays(self.work, population.documents, "w+")
        labels = arrays.of("labels")
        labels[:] = np.arange(len(labels))
        for path in self.pairs:
            join(labels, population.numbers(np.load(path)))
        label(labels)
        members = count_members(labels, arrays.of("sizes"))
        (Path(self.work) / MEMBERS).write_text(str(members), encoding="utf-8")
        own, written = population.own, 0
        with (Path(self.work) / "ids").open("wb") as ids:
            for index, shard in enumerate(own.shards):
                table = kept_rows(read_table(own.stage, shard))
                written = self._fill(arrays, int(own.starts[index]), table, self.signatures, shard, ids, written)
            first = own.documents
            for run, earlier in enumerate(population.earlier):
                for shard in earlier.kept.shards:
                    if rows := [row for _, row in population.matched_in(run, shard)]:
                        table = read_table(earlier.kept.stage, shard)
                        table = table.take(pc.index_in(pa.array(rows), table["row"].combine_chunks()))
                        signatures = f"{earlier.folder}/signatures"
                        written = self._fill(arrays, first, table, signatures, shard, ids, written)
                        first += len(rows)
        yield from ()

    @staticmethod
    def _fill(
        arrays: ClusterArrays, first: int, table: pa.Table, signatures: str, shard: str, ids: IO[bytes], written: int
    ) -> int:
        """Writes the properties and ids of the table's documents, numbered from `first` on.

        `written` is the number of bytes in `ids` before; returns the number after.
        """
        last = first + table.num_rows
        signed = read_table(signatures, shard, ["row", "exact", "url"])
        signed = signed.take(pc.index_in(table["row"].combine_chunks(), signed["row"].combine_chunks()))
        for name, source in (("quality", table), ("chars", table), ("exact", signed), ("url", signed)):
            arrays.of(name)[first:last] = source[name].combine_chunks().to_numpy(zero_copy_only=False)
        names = [name.encode() for name in table["id"].to_pylist()]
        ids.write(b"".join(names))
        arrays.of("id_end")[first:last] = written + np.cumsum([len(name) for name in names])
        return written + sum(map(len, names))
