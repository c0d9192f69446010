"""Clusters of documents from pairs: all that are linked, directly or through others, and may be duplicates.

Union-find over arrays that lie in files, of `BYTES_A_DOCUMENT` each and the documents' ids, not held in memory. Which
documents of a cluster stay is decided in `survivors`.
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
from data_pipeline.dedup.pairs import EarlierRun, Numbering, earlier_code

MEMBERS = "members"  # the file that says how many documents are not alone in their cluster


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


OWN = -1  # in place of the number of an earlier run


class Population:
    """The documents that are held against each other: those of this run, numbered as in `own`, and behind them those
    of earlier runs that share a key with one. `met` is a file of int64, the numbers of these among all documents of
    earlier runs, ascending.
    """

    def __init__(self, own: Numbering, earlier: Sequence[EarlierRun] = (), met: str = "") -> None:
        self.own = own
        self.earlier = list(earlier)
        self._met = met

    @property
    def met(self) -> np.ndarray:
        return np.load(self._met) if self.earlier else np.zeros(0, np.int64)

    @property
    def documents(self) -> int:
        return self.own.documents + len(self.met)

    def numbers(self, pairs: np.ndarray) -> np.ndarray:
        """int64, the numbers of documents as they stand in pairs."""
        met = np.searchsorted(self.met, earlier_code(pairs))
        return np.where(pairs >= 0, pairs, met + self.own.documents)

    def location(self, number: int) -> tuple[int, str]:
        """(earlier run or OWN, shard) of a document."""
        if number < self.own.documents:
            return OWN, self.own.shards[self.own.shard_of(number)]
        there = int(self.met[number - self.own.documents])
        run = int(np.searchsorted([run.first for run in self.earlier], there, side="right")) - 1
        kept = self.earlier[run].kept
        return run, kept.shards[kept.shard_of(there - self.earlier[run].first)]

    def met_in(self, run: int, shard: str) -> list[tuple[int, int]]:
        """(number here, row there) of the documents of an earlier run's shard that are in this population."""
        earlier = self.earlier[run]
        index = earlier.kept.shards.index(shard)
        start, end = (earlier.first + int(edge) for edge in earlier.kept.starts[index : index + 2])
        first, last = (int(edge) for edge in np.searchsorted(self.met, [start, end]))
        rows = earlier.kept.rows(index)[self.met[first:last] - start]
        return list(zip(range(self.own.documents + first, self.own.documents + last), rows.tolist(), strict=True))


def write_met(path: Path, pairs: Sequence[str]) -> None:
    """The file `met` of a `Population`, from files of pairs."""
    found = [np.zeros(0, np.int64)]
    for file in pairs:
        codes = np.load(file)[:, 0]
        found.append(np.unique(earlier_code(codes[codes < 0])))
    np.save(path, np.unique(np.concatenate(found)))


@numba.njit(cache=True)
def count_members(labels: np.ndarray, sizes: np.ndarray) -> int:
    """Adds to `sizes` the members of each label; returns how many documents are not alone."""
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
    """What is known of each document, by its number, in files of one folder."""

    def __init__(self, folder: str | Path, documents: int, mode: Literal["r", "w+"] = "r") -> None:
        self.folder, self.documents = Path(folder), documents
        self.mode: Literal["r", "w+"] = mode
        self._opened: dict[str, np.ndarray] = {}

    def of(self, name: str) -> np.ndarray:
        if name not in self._opened:  # made anew, it would be empty
            path, kind = self.folder / f"{name}.bin", np.dtype(_TYPES[name])
            self._opened[name] = np.memmap(path, dtype=kind, mode=self.mode, shape=(self.documents,))
        return self._opened[name]

    def ids(self, numbers: Iterable[int]) -> list[str]:
        ends, found = self.of("id_end"), []
        with (self.folder / "ids").open("rb") as file:
            for number in numbers:
                start = int(ends[number - 1]) if number else 0
                file.seek(start)
                found.append(file.read(int(ends[number]) - start).decode())
        return found


class FindClusters(PipelineStep):
    """One task: pairs to labels and sizes, and what is known of each document, in the files of `ClusterArrays`."""

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
                    if rows := [row for _, row in population.met_in(run, shard)]:
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
        """Files what is known of documents `first`, first + 1... Returns how many bytes of ids are written."""
        last = first + table.num_rows
        signed = read_table(signatures, shard, ["row", "exact", "url"])
        signed = signed.take(pc.index_in(table["row"].combine_chunks(), signed["row"].combine_chunks()))
        for name, source in (("quality", table), ("chars", table), ("exact", signed), ("url", signed)):
            arrays.of(name)[first:last] = source[name].combine_chunks().to_numpy(zero_copy_only=False)
        names = [name.encode() for name in table["id"].to_pylist()]
        ids.write(b"".join(names))
        arrays.of("id_end")[first:last] = written + np.cumsum([len(name) for name in names])
        return written + sum(map(len, names))
