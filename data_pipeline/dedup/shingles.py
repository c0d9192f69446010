"""N-grams of the documents that share a key, hashed again and laid in files: what their true similarity is taken from.

Texts of this run and of earlier runs, of which only those documents are read that share a MinHash key with one of this
run. Of documents that are equal for the exact comparison one is laid out.
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
from data_pipeline.dedup.pairs import NOT_KEPT, EarlierRun
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter


def mark_candidates(path: Path, population: Population, near: Sequence[str], exact: Sequence[str]) -> None:
    """Writes bool [documents], raw: which documents share a MinHash key with another, copies left out.

    `near` and `exact` are files of pairs, found by MinHash and by the exact comparison.
    """
    marks = np.memmap(path, dtype=bool, mode="w+", shape=(population.documents,))
    for file in near:
        marks[population.numbers(np.load(file)).ravel()] = True
    for file in exact:
        found = np.load(file)
        marks[found[found[:, 0] >= 0, 1]] = False
    marks.flush()


def candidates_in(path: str | Path, population: Population) -> np.ndarray:
    """bool [documents], as `mark_candidates` wrote it."""
    return np.memmap(path, dtype=bool, mode="r", shape=(population.documents,))


def shards_with(path: Path, population: Population) -> list[str]:
    """The shards of this run that hold a candidate."""
    starts, marks = population.own.starts, candidates_in(path, population)
    return [
        shard for index, shard in enumerate(population.own.shards) if marks[starts[index] : starts[index + 1]].any()
    ]


def shard_file(work: str, run: int, shard: str) -> Path:
    return Path(work) / ("own" if run == OWN else f"earlier-{run}") / shard


class LayOutShingles(PipelineStep):
    """`<shard_file>.shingles.npy`, the candidates' n-gram hashes, and `.numbers.npy`, int64 [n, 2]: document, end."""

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
            _lay_out(shard_file(self.work, OWN, shard), texts, self.ngram)
        yield from ()


class LayOutEarlier(PipelineStep):
    """The same of documents of earlier runs, from what their extract stage published."""

    name = "Earlier shingles"
    type = "🫂 - DEDUPS"

    def __init__(self, work: str, population: Population, candidates: str, ngram: int) -> None:
        super().__init__()
        self.work = work
        self.population = population
        self.candidates = candidates
        self.ngram = ngram

    def shards(self) -> list[tuple[int, str]]:
        """(earlier run, shard) of all that hold a candidate."""
        marks, first = candidates_in(self.candidates, self.population), self.population.own.documents
        return sorted({self.population.location(first + int(one)) for one in np.flatnonzero(marks[first:])})

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        wanted = candidates_in(self.candidates, self.population)
        for run, shard in self.shards()[rank::world_size]:
            rows = {row: number for number, row in self.population.met_in(run, shard) if wanted[number]}
            texts = _texts(self.population.earlier[run], shard, rows)
            _lay_out(shard_file(self.work, run, shard), texts, self.ngram)
        yield from ()


def _texts(earlier: EarlierRun, shard: str, rows: dict[int, int]) -> Iterable[tuple[int, str, Splitter]]:
    rules = _rules(f"{earlier.folder}/language", shard)
    for row, record in enumerate(read_records(shard_path(f"{earlier.folder}/extract", shard))):
        if row in rows:
            yield rows[row], record["text"], earlier.splitters[rules[row]]


def _rules(language: str, shard: str) -> dict[int, Any]:
    """Row -> name of its rule set."""
    table = read_table(language, shard, ["row", "rules"])
    return dict(zip(table["row"].to_pylist(), table["rules"].to_pylist(), strict=True))


def _lay_out(path: Path, texts: Iterable[tuple[int, str, Splitter]], ngram: int) -> None:
    hashes, ends, end = [np.zeros(0, np.uint64)], [], 0
    for number, text, splitter in texts:
        hashes.append(np.unique(shingles(text, splitter.window(ngram))))
        end += len(hashes[-1])
        ends.append((number, end))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_name(path.name + ".shingles.npy"), np.concatenate(hashes))
    np.save(path.with_name(path.name + ".numbers.npy"), np.array(ends, np.int64).reshape(-1, 2))


def laid_out(work: str, population: Population, number: int) -> np.ndarray:
    """uint64, the n-grams of a candidate, ascending and distinct."""
    numbers, hashes = _mapped(shard_file(work, *population.location(number)))
    index = int(np.searchsorted(numbers[:, 0], number))
    start = int(numbers[index - 1, 1]) if index else 0
    return hashes[start : int(numbers[index, 1])]


@functools.lru_cache(maxsize=512)
def _mapped(shard: Path) -> tuple[np.ndarray, np.ndarray]:
    """(numbers and ends, hashes) of a shard."""
    numbers = np.load(shard.with_name(shard.name + ".numbers.npy"), mmap_mode="r")
    return np.array(numbers), np.asarray(np.load(shard.with_name(shard.name + ".shingles.npy"), mmap_mode="r"))
