"""Chooses the documents of each cluster that stay, and writes for each other one which document it is dropped for.

The order of priority is: documents of earlier runs, then the highest quality score, then the longest text, then the
first by source, shard and row. `greedy` makes the choice. With `dedup.verify`, every document dropped as a
near-duplicate has at least that similarity to the kept one that it is dropped for. Without it, all documents of a
cluster count as duplicates of each other: one stays, or none if the cluster holds a document of an earlier run.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.core.ledger import Tally
from data_pipeline.core.progress import ProgressFile
from data_pipeline.core.tables import KEYS, dropped_rows, kept_rows, read_table, write_samples, write_table
from data_pipeline.dedup.clusters import ClusterArrays, Population
from data_pipeline.dedup.greedy import KEPT, ClusterNgrams, all_but_the_first, survivors
from data_pipeline.dedup.shingles import candidate_ngrams, candidates_in

BYTES_A_MEMBER = 200  # memory for one document of a cluster and the copies that sorting makes
_IN_MEMORY = 64 << 20  # bytes; larger arrays of a cluster's n-grams or index lie in files
_BLOCK = 1 << 20  # documents read at a time


def part_of(roots: np.ndarray, parts: int) -> np.ndarray:
    """Divides clusters, given by their roots, into `parts` about equal parts, by a hash; returns the part of each."""
    return (roots.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(parts)


class ChooseSurvivors(PipelineStep):
    """Step that decides which documents stay, one part of the clusters at a time.

    Writes `<work>/chosen-<part>.npy`, int64 [3, members], ordered by the first line: the document, the document that
    stays in its place (itself, if it is kept), and how many of this run's documents that one stands for. `candidates`
    is the file of documents whose n-grams were written, "" if none are to be compared; `least` is the similarity of
    duplicates, None if all documents of a cluster are duplicates.
    """

    name = "Survivors"
    type = "🫂 - DEDUPS"

    def __init__(
        self, work: str, population: Population, parts: int, urls: bool, least: float | None, candidates: str
    ) -> None:
        super().__init__()
        self.work = work
        self.population = population
        self.parts = parts
        self.urls = urls
        self.least = least
        self.candidates = candidates

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        arrays = ClusterArrays(self.work, self.population.documents)
        for part in range(rank, self.parts, world_size):
            members, edges = self._in_order(arrays, part)
            causes = members.copy()
            for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                mine = members[first:last]
                indices = self._decide(arrays, mine)
                causes[first:last] = np.where(indices == KEPT, mine, mine[indices])
            _, index, counts = np.unique(causes, return_inverse=True, return_counts=True)
            sizes = counts[index] - (causes >= self.population.own.documents)  # earlier runs' are not counted
            order = np.argsort(members)
            np.save(Path(self.work) / chosen(part), np.stack([members, causes, sizes])[:, order])
        yield from ()

    def _in_order(self, arrays: ClusterArrays, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (documents of the part's clusters, by cluster and priority; where each cluster begins, and the end).

        Clusters of one document are left out.
        """
        labels, sizes, found = arrays.of("labels"), arrays.of("sizes"), [np.zeros(0, np.int64)]
        for first in range(0, len(labels), _BLOCK):
            roots = np.array(labels[first : first + _BLOCK])
            found.append(first + np.flatnonzero((sizes[roots] > 1) & (part_of(roots, self.parts) == part)))
        members = np.concatenate(found)
        ours = members < self.population.own.documents
        quality, chars = arrays.of("quality")[members], arrays.of("chars")[members]
        order = np.lexsort((members, np.where(ours, -chars, 0), np.where(ours, -quality, 0), ours, labels[members]))
        members = members[order]
        roots = labels[members]
        starts = np.flatnonzero(np.r_[True, roots[1:] != roots[:-1]]) if len(members) else members
        return members, np.r_[starts, len(members)]

    def _decide(self, arrays: ClusterArrays, members: np.ndarray) -> np.ndarray:
        """Returns int64 [members]: the index of the member that each is dropped for, or KEPT."""
        earlier = members >= self.population.own.documents
        if self.least is None:
            return all_but_the_first(earlier)
        _, groups = np.unique(arrays.of("exact")[members], return_inverse=True)
        urls = arrays.of("url")[members]
        addresses = np.unique(urls, return_inverse=True)[1] if self.urls else np.full(len(members), -1)
        ends, grams = self._grams(members, groups)
        cluster = ClusterNgrams(groups, np.where(urls == 0, -1, addresses), earlier, ends, grams)
        found = survivors(cluster, self.least, partial(zeros, self.work, f"{members[0]}-index"))
        for path in Path(self.work).glob(f"{members[0]}-*.tmp"):
            path.unlink()
        return found

    def _grams(self, members: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `ends` and `grams` of a `ClusterNgrams`; a group's n-grams are those of a member in the files."""
        count = int(groups.max()) + 1
        found: list[np.ndarray] = [np.zeros(0, np.uint64)] * count
        if self.candidates:
            wanted = np.flatnonzero(candidates_in(self.candidates, self.population)[members])
            present, indices = np.unique(groups[wanted], return_index=True)
            for group, number in zip(present.tolist(), members[wanted[indices]].tolist(), strict=True):
                found[group] = candidate_ngrams(self.work, self.population, number)
        ends = np.cumsum([len(one) for one in found])
        grams = zeros(self.work, f"{members[0]}-grams", int(ends[-1]), np.uint64)
        for end, one in zip(ends.tolist(), found, strict=True):
            grams[end - len(one) : end] = one
        return ends, grams


def zeros(work: str, name: str, entries: int, dtype: type[np.generic]) -> np.ndarray:
    """Allocates an array of zeros in memory, or in a file of `work` if it is larger than 64 MiB.

    The result is a plain ndarray even then, since numba would compile its functions again for numpy's memmap class.
    """
    if entries * np.dtype(dtype).itemsize <= _IN_MEMORY:
        return np.zeros(entries, dtype)
    path = Path(work) / f"{name}-{len(list(Path(work).glob(f'{name}-*.tmp')))}.tmp"
    return np.asarray(np.memmap(path, dtype=dtype, mode="w+", shape=(entries,)))


def chosen(part: int) -> str:
    """Name of the file with the decisions about one part of the clusters."""
    return f"chosen-{part:05d}.npy"


class JudgeDocuments(PipelineStep):
    """Step that writes each shard's table of verdicts: which documents stay, and why others are dropped.

    The column `cluster` is the number of the document that stays: a cluster of the table is a kept document and those
    that were dropped for it.
    """

    name = "Verdicts"
    type = "🫂 - DEDUPS"

    def __init__(
        self, folder: str, work: str, population: Population, parts: int, urls: bool, tallies: str, progress: str
    ) -> None:
        super().__init__()
        self.urls = urls
        self.folder = folder
        self.work = work
        self.population = population
        self.parts = parts
        self.tallies = tallies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally, progress = Tally(), ProgressFile(self.progress, rank)
        own = self.population.own
        arrays = ClusterArrays(self.work, self.population.documents)
        for index in range(rank, len(own.shards), world_size):
            shard = own.shards[index]
            table = kept_rows(read_table(own.stage, shard))
            for source, size in zip(table["source"].to_pylist(), table["bytes"].to_pylist(), strict=True):
                tally.came_in(source, size)
                progress.advance(size)
            write_table(self.folder, shard, self._judge(table, arrays, int(own.starts[index])))
        tally.save(Path(self.tallies) / f"in-{rank:05d}.json")
        progress.close()
        yield from ()

    def _judge(self, table: pa.Table, arrays: ClusterArrays, first: int) -> pa.Table:
        """Returns a shard's table with verdicts and the columns cluster, cluster_size and survivor.

        `first` is the number of the table's first document.
        """
        numbers = np.arange(first, first + table.num_rows)
        stays, sizes = numbers.copy(), np.ones(len(numbers), np.int64)
        for part in range(self.parts):
            found = np.load(Path(self.work) / chosen(part), mmap_mode="r")
            low, high = np.searchsorted(found[0], [first, first + len(numbers)])
            stays[found[0, low:high] - first] = found[1, low:high]
            sizes[found[0, low:high] - first] = found[2, low:high]
        exact, url = arrays.of("exact"), arrays.of("url")
        same = exact[numbers] == exact[stays]
        moved = self.urls & (url[numbers] == url[stays]) & (url[numbers] != 0)
        near = np.where(same, "exact_duplicate", np.where(moved, "url_duplicate", "near_duplicate"))
        known = stays >= self.population.own.documents
        verdicts = np.where(stays == numbers, "", np.where(known, "in_index", near))
        at = table.schema.get_field_index("verdict")
        table = table.set_column(at, "verdict", pa.array(verdicts.tolist(), pa.string()))
        table = table.append_column("cluster", pa.array(stays))
        table = table.append_column("cluster_size", pa.array(sizes))
        names = np.array(table["id"].to_pylist(), dtype=object)
        dropped = np.flatnonzero(stays != numbers)
        names[dropped] = arrays.ids(stays[dropped].tolist())
        return table.append_column("survivor", pa.array(names.tolist(), pa.string()))


def sample_duplicates(folder: Path, shards: Sequence[str]) -> None:
    """Writes samples of dropped duplicates to `drops/`: the first few of each source and reason."""
    columns = [*KEYS, "verdict", "survivor", "cluster", "cluster_size", "head"]
    tables = (read_table(folder, shard).select(columns) for shard in shards)
    write_samples(folder, (row for table in tables for row in dropped_rows(table)))
