"""Writes the n-gram hashes of documents that share a MinHash key to files, from which true similarity is computed.

Only such documents, the candidates, are hashed again, both this run's and those of earlier runs that share a key with
one of this run. If documents are equal for the exact comparison, only one is written.
"""

import functools
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.core.shards import read_records, shard_path
from data_pipeline.core.tables import read_table
from data_pipeline.dedup.clusters import OWN, Population
from data_pipeline.dedup.duplicate_pairs import NOT_KEPT, EarlierRun
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter


def mark_candidates(path: Path, population: Population, near: Sequence[str], exact: Sequence[str]) -> None:
    """Writes which documents are candidates, as a raw file of bool [documents].

    These are all that occur in `near`, files of pairs that share a MinHash key, except copies: the second documents of
    this run's pairs in `exact`, files of pairs that are equal for the exact comparison.
    """
    marks = np.memmap(path, dtype=bool, mode="w+", shape=(population.documents,))
    for file in near:
        marks[population.numbers(np.load(file)).ravel()] = True
    for file in exact:
        found = np.load(file)
        marks[found[found[:, 0] >= 0, 1]] = False
    marks.flush()


def candidates_in(path: str | Path, population: Population) -> np.ndarray:
    """Opens the file that `mark_candidates` wrote: bool [documents], whether each is a candidate."""
    return np.memmap(path, dtype=bool, mode="r", shape=(population.documents,))


def shards_with(path: Path, population: Population) -> list[str]:
    """Names of this run's shards that hold a candidate."""
    starts, marks = population.own.starts, candidates_in(path, population)
    return [
        shard for index, shard in enumerate(population.own.shards) if marks[starts[index] : starts[index + 1]].any()
    ]


def shard_file(work: str, run: int, shard: str) -> Path:
    """Path, without its ending, of the files with the n-grams of a shard of this run (OWN) or an earlier one."""
    return Path(work) / ("own" if run == OWN else f"earlier-{run}") / shard


class WriteShingles(PipelineStep):
    """Step that writes the n-gram hashes of this run's candidates.

    Each shard gets two files: `<shard_file>.shingles.npy`, uint64, the hashes of one candidate after the other, and
    `<shard_file>.numbers.npy`, int64 [candidates, 2], each one's number and where its hashes end.
    """

    name = "Shingles"
    type = "🫂 - DEDUPS"

    def __init__(
        self, work: str, population: Population, candidates: str, splitters: dict[str, Splitter], language: str,
        ngram: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.work = work
        self.population = population
        self.candidates = candidates
        self.splitters = splitters
        self.language = language
        self.ngram = ngram

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        wanted = candidates_in(self.candidates, self.population)
        own = self.population.own
        indices = {shard: index for index, shard in enumerate(own.shards)}
        for shard, group in groupby(data, key=lambda document: document.metadata["shard"]):
            members = list(group)
            rows = np.array([document.metadata["row"] for document in members])
            numbers = own.numbers(indices[shard], rows)
            chosen = (numbers != NOT_KEPT) & wanted[numbers]
            if not chosen.any():
                continue
            rules = _rules(self.language, shard)
            texts = (
                (number, document.text, self.splitters[rules[document.metadata["row"]]])
                for document, number, take in zip(members, numbers.tolist(), chosen, strict=True)
                if take
            )
            _write_ngrams(shard_file(self.work, OWN, shard), texts, self.ngram)
        yield from ()


class WriteEarlierShingles(PipelineStep):
    """Step that writes the n-gram hashes of earlier runs' candidates, whose texts their extract stages published."""

    name = "Earlier shingles"
    type = "🫂 - DEDUPS"

    def __init__(self, work: str, population: Population, candidates: str, ngram: int) -> None:
        super().__init__()
        self.work = work
        self.population = population
        self.candidates = candidates
        self.ngram = ngram

    def shards(self) -> list[tuple[int, str]]:
        """Lists (earlier run, shard) of all shards that hold a candidate."""
        marks, first = candidates_in(self.candidates, self.population), self.population.own.documents
        return sorted({self.population.location(first + int(one)) for one in np.flatnonzero(marks[first:])})

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        wanted = candidates_in(self.candidates, self.population)
        for run, shard in self.shards()[rank::world_size]:
            rows = {row: number for number, row in self.population.matched_in(run, shard) if wanted[number]}
            texts = _texts(self.population.earlier[run], shard, rows)
            _write_ngrams(shard_file(self.work, run, shard), texts, self.ngram)
        yield from ()


def _texts(earlier: EarlierRun, shard: str, rows: dict[int, int]) -> Iterable[tuple[int, str, Splitter]]:
    """Yields (number, text, splitter) of the documents in `rows`, a map from row to number."""
    rules = _rules(f"{earlier.folder}/language", shard)
    for row, record in enumerate(read_records(shard_path(f"{earlier.folder}/extract", shard))):
        if row in rows:
            yield rows[row], record["text"], earlier.splitters[rules[row]]


def _rules(language: str, shard: str) -> dict[int, Any]:
    """Maps each row of a shard to the name of its rule set, as the language stage chose it."""
    table = read_table(language, shard, ["row", "rules"])
    return dict(zip(table["row"].to_pylist(), table["rules"].to_pylist(), strict=True))


def _write_ngrams(path: Path, texts: Iterable[tuple[int, str, Splitter]], ngram: int) -> None:
    """Writes the two files of one shard, see `WriteShingles`."""
    hashes, ends, end = [np.zeros(0, np.uint64)], [], 0
    for number, text, splitter in texts:
        hashes.append(np.unique(shingles(text, splitter.window(ngram))))
        end += len(hashes[-1])
        ends.append((number, end))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_name(path.name + ".shingles.npy"), np.concatenate(hashes))
    np.save(path.with_name(path.name + ".numbers.npy"), np.array(ends, np.int64).reshape(-1, 2))


def candidate_ngrams(work: str, population: Population, number: int) -> np.ndarray:
    """Reads the n-gram hashes of a candidate, uint64, ascending and distinct."""
    numbers, hashes = _mapped(shard_file(work, *population.location(number)))
    index = int(np.searchsorted(numbers[:, 0], number))
    start = int(numbers[index - 1, 1]) if index else 0
    return hashes[start : int(numbers[index, 1])]


@functools.lru_cache(maxsize=512)
def _mapped(shard: Path) -> tuple[np.ndarray, np.ndarray]:
    """Opens the two files of a shard: (int64 [candidates, 2] numbers and ends, uint64 hashes, memory-mapped)."""
    numbers = np.load(shard.with_name(shard.name + ".numbers.npy"), mmap_mode="r")
    return np.array(numbers), np.asarray(np.load(shard.with_name(shard.name + ".shingles.npy"), mmap_mode="r"))
