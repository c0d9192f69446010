"""Who stays of each cluster, and for whom each of the others goes.

In order of priority: the highest quality score, then the longest, then the first by source, shard and row; documents of
earlier runs before all. `greedy` says how they are gone through: with `dedup.verify` every document dropped as a
near-duplicate has at least that similarity to the one that it is dropped for, which is kept. Without, two documents of
one cluster count as duplicates however they came into it, and one of them stays, or none beside an earlier run's.
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
from data_pipeline.dedup.shingles import candidates_in, laid_out

BYTES_A_MEMBER = 200  # a document of a cluster, and the copies that sorting makes
_IN_MEMORY = 64 << 20  # bytes of n-grams of one cluster, or of its index; larger ones lie in files
_BLOCK = 1 << 20  # documents looked at together


def part_of(roots: np.ndarray, parts: int) -> np.ndarray:
    """Which task has the cluster of each root: even, though roots are small numbers."""
    return (roots.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(parts)


class ChooseSurvivors(PipelineStep):
    """A part of the clusters each task: `<work>/chosen-<part>.npy`, int64 [3, members], by ascending number: document,
    the document that stays in its place (itself, if kept), and how many documents that stands for.

    `candidates` is the file of documents whose n-grams are laid out, "" if none are to be compared; `least` is None
    where all of a cluster are taken for duplicates.
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
            sizes = counts[index] - (causes >= self.population.own.documents)  # an earlier run's is not counted
            order = np.argsort(members)
            np.save(Path(self.work) / chosen(part), np.stack([members, causes, sizes])[:, order])
        yield from ()

    def _in_order(self, arrays: ClusterArrays, part: int) -> tuple[np.ndarray, np.ndarray]:
        """(the members of the part's clusters, cluster by cluster and in order of priority; where clusters begin)."""
        labels, sizes, found = arrays.of("labels"), arrays.of("sizes"), [np.zeros(0, np.int64)]
        for first in range(0, len(labels), _BLOCK):
            roots = np.array(labels[first : first + _BLOCK])
            found.append(first + np.flatnonzero((sizes[roots] > 1) & (part_of(roots, self.parts) == part)))
        members = np.concatenate(found)
        late = members < self.population.own.documents
        quality, chars = arrays.of("quality")[members], arrays.of("chars")[members]
        order = np.lexsort((members, np.where(late, -chars, 0), np.where(late, -quality, 0), late, labels[members]))
        members = members[order]
        roots = labels[members]
        starts = np.flatnonzero(np.r_[True, roots[1:] != roots[:-1]]) if len(members) else members
        return members, np.r_[starts, len(members)]

    def _decide(self, arrays: ClusterArrays, members: np.ndarray) -> np.ndarray:
        """int64, the index of the member that stays for each member of a cluster, or KEPT."""
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
        """`ends` and `grams` of a Cluster; of documents that are equal, those of one whose n-grams are laid out."""
        count = int(groups.max()) + 1
        found: list[np.ndarray] = [np.zeros(0, np.uint64)] * count
        if self.candidates:
            wanted = np.flatnonzero(candidates_in(self.candidates, self.population)[members])
            asked, indices = np.unique(groups[wanted], return_index=True)
            for group, number in zip(asked.tolist(), members[wanted[indices]].tolist(), strict=True):
                found[group] = laid_out(self.work, self.population, number)
        ends = np.cumsum([len(one) for one in found])
        grams = zeros(self.work, f"{members[0]}-grams", int(ends[-1]), np.uint64)
        for end, one in zip(ends.tolist(), found, strict=True):
            grams[end - len(one) : end] = one
        return ends, grams


def zeros(work: str, name: str, entries: int, dtype: type[np.generic]) -> np.ndarray:
    """In a file of `work` if they are many; never of numpy's class for that, for which code would be compiled again."""
    if entries * np.dtype(dtype).itemsize <= _IN_MEMORY:
        return np.zeros(entries, dtype)
    path = Path(work) / f"{name}-{len(list(Path(work).glob(f'{name}-*.tmp')))}.tmp"
    return np.asarray(np.memmap(path, dtype=dtype, mode="w+", shape=(entries,)))


def chosen(part: int) -> str:
    return f"chosen-{part:05d}.npy"


class JudgeDocuments(PipelineStep):
    """Each shard's verdicts: who stays, and why the others do not.

    A cluster in the tables is a kept document and those that were dropped for it.
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
        lost = np.flatnonzero(stays != numbers)
        names[lost] = arrays.ids(stays[lost].tolist())
        return table.append_column("survivor", pa.array(names.tolist(), pa.string()))


def sample_duplicates(folder: Path, shards: Sequence[str]) -> None:
    """`drops/` of the first duplicates a source."""
    columns = [*KEYS, "verdict", "survivor", "cluster", "cluster_size", "head"]
    tables = (read_table(folder, shard).select(columns) for shard in shards)
    write_samples(folder, (row for table in tables for row in dropped_rows(table)))
