"""True Jaccard similarity of the pairs that MinHash proposes: which of them are near-duplicates indeed.

The n-grams of every document in a pair are hashed again and laid in files, sorted; then each group of documents that
share a key is gone through in their order, and a document joins the first one before it that it is similar to.
"""

import functools
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numba
import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.dedup.pairs import INDEXED, Numbering
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter
from data_pipeline.tables import read_table


@numba.njit(cache=True)
def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of two ascending arrays without repetition."""
    common = i = j = 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            common += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    return common / max(len(one) + len(other) - common, 1)


def mark_candidates(path: Path, documents: int, pairs: Sequence[str]) -> None:
    """Writes bool [documents], raw: which of them are in a pair with another of this run."""
    marks = np.memmap(path, dtype=bool, mode="w+", shape=(documents,))
    for file in pairs:
        found = np.load(file, mmap_mode="r")
        marks[found[found[:, 0] != INDEXED].ravel()] = True
    marks.flush()


class LayOutShingles(PipelineStep):
    """`<work>/<shard>.shingles.npy`, the candidates' n-gram hashes, and `.numbers.npy`, int64 [n, 2]: document, end."""

    name = "Shingles"
    type = "🫂 - DEDUPS"

    def __init__(
        self,
        work: str,
        documents: Numbering,
        candidates: str,
        splitters: dict[str, Splitter],
        language: str,
        ngram: int,
    ) -> None:
        super().__init__()
        self.work = work
        self.documents = documents
        self.candidates = candidates
        self.splitters = splitters
        self.language = language
        self.ngram = ngram

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        wanted = np.memmap(self.candidates, dtype=bool, mode="r", shape=(self.documents.documents,))
        for shard, group in groupby(data, key=lambda document: document.metadata["shard"]):
            members = list(group)
            rows = np.array([document.metadata["row"] for document in members])
            numbers = self.documents.numbers(self.documents.shards.index(shard), rows)
            table = read_table(self.language, shard)
            rules = dict(zip(table["row"].to_pylist(), table["rules"].to_pylist(), strict=True))
            hashes = [np.zeros(0, np.uint64)]
            ends: list[tuple[int, int]] = []
            for document, row, number in zip(members, rows.tolist(), numbers.tolist(), strict=True):
                if number == INDEXED or not wanted[number]:
                    continue
                hashes.append(np.unique(shingles(document.text, self.splitters[rules[row]].window(self.ngram))))
                ends.append((number, (ends[-1][1] if ends else 0) + len(hashes[-1])))
            path = Path(self.work) / shard
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_name(path.name + ".shingles.npy"), np.concatenate(hashes))
            np.save(path.with_name(path.name + ".numbers.npy"), np.array(ends, np.int64).reshape(-1, 2))
        yield from ()


class Verify(PipelineStep):
    """Each file of pairs to `verified-` and its name, with the pairs of at least the given similarity."""

    name = "Jaccard"
    type = "🫂 - DEDUPS"

    def __init__(self, work: str, documents: Numbering, pairs: Sequence[str], least: float) -> None:
        super().__init__()
        self.work = work
        self.documents = documents
        self.pairs = list(pairs)
        self.least = least

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for name in self.pairs[rank::world_size]:
            path = Path(name)
            pairs = np.load(path)
            held = pairs[pairs[:, 0] == INDEXED].tolist()
            for first, members in groupby(pairs[pairs[:, 0] != INDEXED].tolist(), key=lambda pair: pair[0]):
                kept = [(first, self._shingles(first))]
                for _, number in members:
                    mine = self._shingles(number)
                    for other, theirs in kept:
                        if jaccard(mine, theirs) >= self.least:
                            held.append([other, number])
                            break
                    else:
                        kept.append((number, mine))
            np.save(path.with_name(f"verified-{path.name}"), np.array(held, np.int64).reshape(-1, 2))
        yield from ()

    def _shingles(self, number: int) -> np.ndarray:
        shard = Path(self.work) / self.documents.shards[self.documents.shard_of(number)]
        numbers, hashes = _laid_out(shard)
        place = int(np.searchsorted(numbers[:, 0], number))
        start = int(numbers[place - 1, 1]) if place else 0
        return hashes[start : int(numbers[place, 1])]


@functools.lru_cache(maxsize=64)
def _laid_out(shard: Path) -> tuple[np.ndarray, np.ndarray]:
    """(numbers and ends, hashes) of a shard, mapped."""
    numbers = np.load(shard.with_name(shard.name + ".numbers.npy"), mmap_mode="r")
    return numbers, np.load(shard.with_name(shard.name + ".shingles.npy"), mmap_mode="r")
